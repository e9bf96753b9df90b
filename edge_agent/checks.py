"""What a device demands of a hub before it does anything. Each refusal has a name; each has a test.

These are the laws as code: whole blocs or nothing (law 1), the owner is sovereign (law 3), nothing is believed that is
not signed (law 4). The hub cannot waive any of them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_agent import believed
from edge_agent.effects import AgentState
from edge_agent.policy import Policy
from fedge import formation, limits
from fedge.errors import PolicyError, ProtocolError
from fedge.identity import Opened, Signer, Verifier
from fedge.lora import RULES
from fedge.messages import (
    Announcement,
    BlocCard,
    Message,
    Open,
    Ready,
    Result,
    decode_envelope,
)

# The only kinds that a hub may send on a command topic.
COMMANDS: Final[dict[str, type[Message]]] = {"bloccard": BlocCard, "open": Open, "result": Result}


def announcement(opened: Opened[Announcement], current: Announcement | None, policy: Policy) -> None:
    """A newer announcement may move adapter, address and check-in time, close the campaign, and change nothing else."""
    new = opened.message
    if opened.subject != new.hub:
        raise ProtocolError("wrong-hub", "announcement in another hub's name", field="hub", value=new.hub)
    if new.training.rule not in RULES:
        raise ProtocolError(
            "unknown-rule",
            "this agent does not know the campaign's rule",
            field="rule",
            value=new.training.rule,
            hint="Update the agent",
        )
    if policy.publishers and new.publisher.hex() not in policy.publishers:
        raise PolicyError(
            "the owner's policy does not list this publisher", field="publisher", value=new.publisher.hex()
        )
    if current is None or (current.closed and new.campaign != current.campaign):
        return
    moving = {
        "sequence": 0,
        "closed": False,
        "adapter": current.adapter,
        "adapter_version": 0,
        "url": "",
        "checkin_seconds": 60,
    }
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


def formed(new: BlocCard, signer: Signer, campaign: Announcement, verifier: Verifier, now: float) -> None:
    """The bloc follows from what its members said and from the beacon that was announced before (fedge.formation).

    A card without its members' READYs proves nothing and is refused, and so is one whose READY at our place another
    key than ours has signed.
    """
    if len(new.roster) != len(new.members):
        raise ProtocolError(
            "bad-formation", "a READY of every member must be there", field="roster", value=len(new.roster)
        )
    readys = []
    for member, envelope in zip(new.members, new.roster, strict=True):
        opened = _formed_with(envelope, verifier, now)
        if not opened.subject == opened.message.device == member or opened.message.campaign != new.campaign:
            raise ProtocolError("bad-formation", "READY of another member", field="roster", value=member)
        readys.append((opened.message, opened.digest))
    if signer.certificate not in (decode_envelope(envelope).certificate for envelope in new.roster):
        raise ProtocolError("bad-formation", "we did not sign the READY at our place", field="roster")
    formation.check_card(new, readys, campaign.beacon, campaign.adapter.size)


def _formed_with(envelope: bytes, verifier: Verifier, now: float) -> Opened[Ready]:
    try:
        return verifier.open(envelope, Ready, role="device", now=now)
    except ProtocolError as error:
        raise ProtocolError(
            "bad-formation", f"a member's READY is not believed: {error}", field="roster"
        ) from error


def owner_allows(opening: Open, policy: Policy) -> None:
    """The owner may have become stricter since the OPEN was accepted: asked again before masks are made."""
    _check_floor(len(opening.roster), policy)
    _check_plan(opening.steps, opening.depths, policy)


def _check_floor(devices: int, policy: Policy) -> None:
    floor = max(policy.bloc_devices_min, limits.BLOC_DEVICES_MIN)
    if devices < floor:
        raise ProtocolError("small-bloc", f"bloc below the floor of {floor}", field="members", value=devices)


def round_opening(opening: Open, state: AgentState, campaign: Announcement, policy: Policy) -> BlocCard:
    """The OPEN is of this campaign, this model and the pinned bloc (returned), is new, and idles nobody."""
    if opening.campaign != campaign.campaign:
        raise ProtocolError(
            "other-campaign", "OPEN of another campaign", field="campaign", value=opening.campaign
        )
    if not state.card:
        raise ProtocolError("no-card", "no bloc is pinned yet", field="bloc", value=opening.bloc)
    pinned, digest = believed.card_in(state.card)
    if opening.card != digest:
        raise ProtocolError("foreign-bloc", "not this device's bloc", field="bloc", value=opening.bloc)
    if opening.round <= state.last_round:
        raise ProtocolError("stale-round", "round numbers must grow", field="round", value=opening.round)
    if opening.manifest != campaign.manifest.sha256 or opening.adapter.size != campaign.adapter.size:
        raise ProtocolError(
            "other-model", "not the campaign's model", field="manifest", value=opening.manifest.hex()
        )
    members = pinned.members
    _check_floor(len(members), policy)
    if not len(opening.roster) == len(opening.steps) == len(members):
        raise ProtocolError(
            "foreign-roster", "roster is not the bloc", field="roster", value=len(opening.roster)
        )
    _check_plan(opening.steps, opening.depths, policy)
    return pinned


def _check_plan(steps: tuple[int, ...], depths: tuple[int, ...], policy: Policy) -> None:
    """No member may be planned more than 2/k of the work: a hub must not let seven idle and open the eighth.

    Work is counted in steps, and in steps times adapted layers. How many layers "all" is, an OPEN does not say: where
    some members adapt all and others not, those with all must bear the rule alone.
    """
    share = min(policy.plan_share_max, limits.PLAN_SHARE_MAX)
    if min(steps) < 1 or max(steps) > limits.STEPS_MAX or max(steps) * len(steps) > share * sum(steps):
        raise ProtocolError("idle-plan", "one member would do most of the work", field="steps", value=steps)
    if not depths:
        return
    if len(depths) != len(steps) or min(depths) < 0:
        raise ProtocolError("idle-plan", "plan does not fit the bloc", field="depths", value=depths)
    layers = depths if min(depths) > 0 else tuple(int(depth == 0) for depth in depths)
    work = [count * depth for count, depth in zip(steps, layers, strict=True)]
    if max(work) * len(work) > share * sum(work):
        raise ProtocolError("idle-plan", "one member would do most of the work", field="depths", value=depths)


def roster(opening: Open, pinned: BlocCard, own: Ready, verifier: Verifier, now: float) -> None:
    """Every member of the pinned bloc, in order, each with its own signed READY; at our place our current prekey.

    Any READY of ours will do that has this prekey: facts and stay may have been said anew since the hub chose.
    """
    prekeys: set[bytes] = set()
    for member, envelope in zip(pinned.members, opening.roster, strict=True):
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
        if member == own.device and ready.prekey != own.prekey:
            raise ProtocolError(
                "swapped-prekey", "the roster does not have our prekey at our place", field="roster"
            )
        prekeys.add(ready.prekey)
    if len(prekeys) != len(pinned.members):
        raise ProtocolError("cloned-member", "two members share a prekey", field="roster", value=len(prekeys))
