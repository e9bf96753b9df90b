"""What travels in a round, and what an opened sum makes of the adapter: a campaign's rule, on the hub.

The rules are `fedge.rules`'. Under `ffa` a sum is added to the beginning of the adapter file and nothing is known of
its tensors. Under the others a round's part follows from its number and from the version that it began with, so that
nothing more than those two must be kept.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from fedge.lora import AdapterLayout
from fedge.rules import Rule, rule_of
from hub import aggregation
from hub.aggregation import OpenedSum, RoundPart
from hub.effects import BlocRow, CampaignRow, RoundRow

_LITTLE: Final = np.dtype("<f4")


def rule(campaign: CampaignRow) -> Rule:
    """The campaign's rule over its bundle's layout."""
    layout = AdapterLayout.of(
        campaign.layers,
        campaign.lora_shapes,
        campaign.lora,
        layer_path=campaign.layer_path,
        dense=campaign.dense,
    )
    numbers = campaign.adapter.size // _LITTLE.itemsize
    return rule_of(campaign.training.rule, layout, campaign.training.a_seed, numbers=numbers)


def next_round(campaign: CampaignRow, bloc: BlocRow) -> int:
    """The number of the bloc's next round. After one of which nothing was opened the same half moves again.

    So what its members carry over is of the half that moves.
    """
    again = campaign.training.rule == "alternating" and bloc.sat_out > 0
    return bloc.round + (2 if again else 1)


def part_of(campaign: CampaignRow, number: int, base_version: int) -> RoundPart:
    """What travels in a bloc's round `number` from the adapter `base_version`."""
    if campaign.training.rule == "ffa":
        return aggregation.usual_part(campaign)
    probing = campaign.probes and base_version == 0
    part = rule(campaign).part(number, probing=probing)
    tuned = campaign.spread, campaign.mean_norm
    if part.name == "a":
        tuned = campaign.spread_a, campaign.mean_norm_a
    elif probing:
        tuned = 0.0, 0.0  # there is one kind of probe and one sum of it: public bounds
    return RoundPart(part.name, part.numbers, *tuned)


def round_part(campaign: CampaignRow, row: RoundRow) -> RoundPart:
    """What travels in this round."""
    return part_of(campaign, row.round, row.base_version)


def apply(campaign: CampaignRow, row: RoundRow, adapter: bytes, opened: OpenedSum, times: float) -> bytes:
    """The adapter file after the sum of this round, little-endian float32."""
    if campaign.training.rule == "ffa" or not opened.contributors:
        return aggregation.apply(adapter, opened, times)
    whole = rule(campaign)
    part = whole.part(row.round, probing=campaign.probes and row.base_version == 0)
    state = np.frombuffer(adapter, _LITTLE).astype(np.float32)
    return whole.apply(part, state, opened.total, times).astype(_LITTLE).tobytes()


def doubted(campaign: CampaignRow, part: RoundPart) -> CampaignRow:
    """The campaign after a sum that wrapped."""
    spread = aggregation.doubted(part.spread)
    if part.name == "a":
        return msgspec.structs.replace(campaign, spread_a=spread)
    return campaign if part.name == "probe" else msgspec.structs.replace(campaign, spread=spread)


def tuned(campaign: CampaignRow, part: RoundPart, opened: OpenedSum) -> CampaignRow:
    """The campaign when the next codec of this kind of round has room for what was seen."""
    spread = aggregation.roomy(part.spread, opened.spread)
    mean_norm = aggregation.roomy(part.mean_norm, opened.mean_norm)
    if part.name == "a":
        return msgspec.structs.replace(campaign, spread_a=spread, mean_norm_a=mean_norm)
    if part.name == "probe":
        return campaign
    return msgspec.structs.replace(campaign, spread=spread, mean_norm=mean_norm)
