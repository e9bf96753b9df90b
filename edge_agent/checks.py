"""What a device demands of a hub before it does anything. Each refusal has a name; each has a test.

These are the laws as code: whole blocs or nothing (law 1), the owner is sovereign (law 3), nothing is believed that is
not signed (law 4). The hub cannot waive any of them.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from edge_agent.effects import AgentState
from edge_agent.policy import Policy
from fedge import limits
from fedge.errors import PolicyError, ProtocolError
from fedge.identity import Opened, Verifier
from fedge.messages import (
    Announcement,
    BlocCard,
    Message,
    Open,
    Ready,
    Result,
    decode,
    decode_envelope,
    kind_in,
)

_COMMANDS: Final[dict[str, type[Message]]] = {"bloccard": BlocCard, "open": Open, "result": Result}


def command_kind(body: bytes) -> type[Message]:
    """Which command a body claims to be; only the kinds a hub may send on a command topic."""
    return kind_in(body, _COMMANDS)


def announcement(opened: Opened[Announcement], current: Announcement | None, policy: Policy) -> None:
    """A newer announcement may move the adapter on and close the campaign, and change nothing else."""
    new = opened.message
    if opened.subject != new.hub:
        raise ProtocolError("wrong-hub", "announcement in another hub's name", field="hub", value=new.hub)
    if policy.publishers and new.publisher.hex() not in policy.publishers:
        raise PolicyError(
            "the owner's policy does not list this publisher", field="publisher", value=new.publisher.hex()
        )
    if current is None or (current.closed and new.campaign != current.campaign):
        return
    moving = {"sequence": 0, "closed": False, "adapter": current.adapter, "adapter_version": 0, "url": ""}
    same = msgspec.structs.replace(new, **moving) == msgspec.structs.replace(current, **moving)
    forward = new.adapter_version >= current.adapter_version and new.closed >= current.closed
    if not same or not forward or new.adapter.size != current.adapter.size:
        raise ProtocolError(
            "changed-campaign", "a running campaign cannot change", field="campaign", value=new.campaign
        )


def card(new: BlocCard, device: str, campaign: str, pinned: bool, policy: Policy) -> None:
    """The first bloc card of a campaign is pinned; a second partition is refused for ever (law 1)."""
    if new.campaign != campaign:
        raise ProtocolError(
            "other-campaign", "bloc card of another campaign", field="campaign", value=new.campaign
        )
    if pinned:
        raise ProtocolError(
            "second-partition", "this device is bound to another bloc", field="bloc", value=new.bloc
        )
    if device not in new.members:
        raise ProtocolError(
            "foreign-bloc", "this device is not in that bloc", field="members", value=new.members
        )
    if len(set(new.members)) != len(new.members):
        raise ProtocolError(
            "cloned-member", "a member stands twice in the bloc", field="members", value=new.members
        )
    _check_floor(len(new.members), policy)


def _check_floor(devices: int, policy: Policy) -> None:
    floor = max(policy.bloc_devices_min, limits.BLOC_DEVICES_MIN)
    if devices < floor:
        raise ProtocolError("small-bloc", f"bloc below the floor of {floor}", field="members", value=devices)


def round_opening(
    opening: Open, device: str, state: AgentState, campaign: Announcement, policy: Policy
) -> None:
    """The OPEN is of this campaign, this model and the pinned bloc, is new, and idles nobody."""
    if opening.campaign != campaign.campaign:
        raise ProtocolError(
            "other-campaign", "OPEN of another campaign", field="campaign", value=opening.campaign
        )
    if not state.card:
        raise ProtocolError("no-card", "no bloc is pinned yet", field="bloc", value=opening.bloc)
    body = decode_envelope(state.card).body
    if opening.card != hashlib.sha256(body).digest():
        raise ProtocolError("foreign-bloc", "not this device's bloc", field="bloc", value=opening.bloc)
    if opening.round <= state.last_round:
        raise ProtocolError("stale-round", "round numbers must grow", field="round", value=opening.round)
    if opening.manifest != campaign.manifest.sha256 or opening.adapter.size != campaign.adapter.size:
        raise ProtocolError(
            "other-model", "not the campaign's model", field="manifest", value=opening.manifest.hex()
        )
    members = decode(body, BlocCard).members
    _check_floor(len(members), policy)
    if not len(opening.roster) == len(opening.steps) == len(members):
        raise ProtocolError(
            "foreign-roster", "roster is not the bloc", field="roster", value=len(opening.roster)
        )
    _check_plan(opening.steps, policy)


def _check_plan(steps: tuple[int, ...], policy: Policy) -> None:
    """No member may be planned more than 2/k of the work: a hub must not let seven idle and open the eighth."""
    share = min(policy.plan_share_max, limits.PLAN_SHARE_MAX)
    if min(steps) < 1 or max(steps) > limits.STEPS_MAX or max(steps) * len(steps) > share * sum(steps):
        raise ProtocolError("idle-plan", "one member would do most of the work", field="steps", value=steps)


def roster(opening: Open, state: AgentState, verifier: Verifier, now: float) -> None:
    """Every member of the pinned bloc, in order, each with its own signed READY; ours exactly as we said it."""
    members = decode(decode_envelope(state.card).body, BlocCard).members
    prekeys: set[bytes] = set()
    for member, envelope in zip(members, opening.roster, strict=True):
        opened = verifier.open(envelope, Ready, role="device", now=now)
        ready = opened.message
        if not opened.subject == ready.device == member:
            raise ProtocolError(
                "foreign-roster", "roster is not the bloc", field="device", value=ready.device
            )
        if ready.campaign != opening.campaign:
            raise ProtocolError("other-campaign", "READY of another campaign", field="device", value=member)
        if ready.facts.samples_bucket == 0:
            raise ProtocolError("empty-member", "a member has no data", field="device", value=member)
        prekeys.add(ready.prekey)
    if len(prekeys) != len(members):
        raise ProtocolError("cloned-member", "two members share a prekey", field="roster", value=len(prekeys))
    if state.ready not in opening.roster:
        raise ProtocolError(
            "swapped-prekey", "the roster does not have our READY as we signed it", field="roster"
        )


def mask_roster(opening: Open) -> tuple[tuple[bytes, bool], ...]:
    """(prekey, has AES instructions) of every member by position; the envelopes were verified by `roster`."""
    readys = (decode(decode_envelope(envelope).body, Ready) for envelope in opening.roster)
    return tuple((ready.prekey, ready.facts.aes) for ready in readys)
