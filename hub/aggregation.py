"""From masked reports to a new adapter: running sums only, opened whole, applied at once.

Every LoRA rule is linear in what travels (`hub.parts`, `fedge.rules`); under `ffa` that is B, whose mean is exactly
the mean of the adapters because A is frozen and public. Each opened sum is applied at once, times `factor`: its
bloc's mean, shared with the blocs that can train beside it, so that blocs which start from one adapter add up to the
mean over all of them, where means of one bloc each would overshoot (a server rate of 1.75 loses 0.27 nats). What
comes late counts less (ADR 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.errors import IntegrityError, ProtocolError
from fedge.secagg.bloc import BlocSum
from fedge.update import codec as coding
from fedge.update.report import read_sum, report_layout
from fedge.update.spec import UpdateCodec
from hub.effects import CampaignRow

Vector = NDArray[np.float32]
_LITTLE: Final = np.dtype("<f4")
# Blocs differ: the codec has room for the largest sum of late, which fades by this with every sum. Tuned to the last
# one alone, 6 % of the sums of a fleet of unlike boards wrapped.
FADE: Final = 0.98
GROWTH: Final = 1.5  # of that room when a sum has wrapped: the same bloc comes again, and with its carry
_STEPS_MEMORY: Final = 32  # sums that the running mean of steps looks back on, about


@dataclass(frozen=True, slots=True)
class RoundPart:
    """What a device sends in a round: name, how many numbers; `spread`, `mean_norm` of the last sums of its kind."""

    name: str
    numbers: int
    spread: float
    mean_norm: float


def usual_part(campaign: CampaignRow) -> RoundPart:
    """What travels under `ffa`, in every round: B."""
    return RoundPart("b", campaign.numbers, campaign.spread, campaign.mean_norm)


@dataclass(frozen=True, slots=True)
class OpenedSum:
    """What an opened bloc says: the `total` of its devices' clipped updates, and sums over all of them."""

    total: Vector
    bits: int  # width of the words it came in
    devices: int
    contributors: int
    spread: float  # of the total, per number: the next step follows from it
    mean_norm: float  # of the members' updates before clipping: the next clip follows from it
    loss_sum: float
    labels: int
    samples: int
    steps: int

    def summary(self) -> dict[str, float | int | str]:
        """The public figures of the round, for the ledger."""
        loss = self.loss_sum / self.labels if self.labels else 0.0
        return {
            "devices": self.devices,
            "bits": self.bits,
            "contributors": self.contributors,
            "training_loss": round(loss, 6),
            "labels": self.labels,
            "samples": self.samples,
            "steps": self.steps,
            "mean_norm": round(self.mean_norm, 6),
            "sum_norm": round(float(np.linalg.norm(self.total)), 6),
        }


def next_codec(campaign: CampaignRow, steps: int, seed: bytes, part: RoundPart | None = None) -> UpdateCodec:
    """The codec of the next OPEN: from the sums opened of late, or from public bounds (16 bits) while there is none.

    Also after a sum that wrapped, which a `spread` below 0 says. No room is made beyond what all devices at the clip
    bound could fill, however many sums have wrapped. `part`: what travels, where that is not the campaign's usual.
    """
    part, devices = part or usual_part(campaign), campaign.bloc_devices
    if part.name == "probe":
        return coding.probe_codec(campaign.training.rate, part.numbers, devices, seed)
    if part.spread <= 0 or part.mean_norm <= 0:
        return coding.first_codec(steps, campaign.training.rate, part.numbers, devices, seed)
    most = coding.aligned_spread(coding.CLIP_SLACK * part.mean_norm, part.numbers, devices)
    return coding.next_codec(min(part.spread, most), part.mean_norm, devices, seed)


def roomy(known: float, seen: float) -> float:
    """The spread, or the mean norm, that the next codec has room for, after a sum of which it was `seen`."""
    return max(seen, FADE * abs(known))


def doubted(spread: float) -> float:
    """The spread after a sum that wrapped: below 0, because the next OPEN starts from public bounds."""
    return -GROWTH * abs(spread)


def empty_sum(transcript: bytes, members: tuple[str, ...], numbers: int, codec: UpdateCodec) -> BlocSum:
    """The running sum of a round that was just opened."""
    return BlocSum(transcript, members, report_layout(numbers, codec.bits))


def open_sum(total: BlocSum, codec: UpdateCodec, numbers: int) -> OpenedSum:
    """Opens a whole bloc. ProtocolError `bad-sum` when check-sums say that a word wrapped or a mask is left."""
    words, metadata = total.open()
    devices = len(total.members)
    try:
        reading = read_sum(words, metadata, codec=codec, devices=devices, numbers=numbers)
    except IntegrityError as error:
        raise ProtocolError("bad-sum", str(error), field=error.field, value=error.value) from error
    figures = reading.metadata
    return OpenedSum(
        total=reading.total,
        bits=codec.bits,
        devices=devices,
        contributors=figures.contributors,
        spread=coding.spread(reading.total),
        mean_norm=figures.norm * codec.clip / max(figures.contributors, 1),
        loss_sum=figures.loss_sum,
        labels=figures.labels,
        samples=figures.samples,
        steps=figures.steps,
    )


def factor(devices: int, *, beside: int, server_rate: float, behind: int) -> float:
    """What an opened sum of `devices` is multiplied with.

    `beside` blocs can train at one time, this one included: min(1, server_rate / beside) is its share of the step.
    `behind` versions were made since its model; one by each bloc beside it is what running side by side means, and
    what is more is discounted by 1/sqrt(1 + staleness).
    """
    return min(1.0, server_rate / beside) * share(devices, staleness(behind, beside))


def share(devices: int, late: int) -> float:
    """1 / devices, discounted by the square root of how many versions too late it comes."""
    return 1.0 / (devices * math.sqrt(1 + late))


def staleness(behind: int, beside: int) -> int:
    """Versions since a bloc's model beyond one of every bloc beside it."""
    return max(0, behind - (beside - 1))


def mean_steps(known: float, opened: OpenedSum) -> float:
    """The campaign's running mean of local steps a member, from summed step counts only; 0 = nothing known yet."""
    here = opened.steps / opened.devices
    return known + (here - known) / _STEPS_MEMORY if known else here


def step_correction(known: float, opened: OpenedSum) -> float:
    """FedNova's idea from sums alone: a sum of few steps counts more, one of many less, by at most a factor of 2.

    `known` is the campaign's mean of steps (Wang et al. 2020, arXiv 2007.07481, normalises each device; here nobody's
    own count is ever seen).
    """
    if not known or not opened.steps:
        return 1.0
    return min(2.0, max(0.5, known * opened.devices / opened.steps))


def apply(adapter: bytes, opened: OpenedSum, times: float) -> bytes:
    """The new adapter, little-endian float32: the sum counts for the numbers that the file begins with.

    The same bytes when nobody had anything to give (weight zero).
    """
    if not opened.contributors:
        return adapter
    moved = opened.total.size
    vector = np.frombuffer(adapter, _LITTLE)
    moving = vector[:moved] + opened.total * np.float32(times)
    return moving.astype(_LITTLE).tobytes() + vector[moved:].tobytes()
