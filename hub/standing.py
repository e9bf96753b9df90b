"""How a campaign stands, for people: why each device is not working, who holds each bloc up, and what was earned.

Pure: `standing(hub, now)` reads a hub's book and changes nothing. It walks over all devices, so it is made only when
somebody asks (`hub.server`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from hub import scheduler
from hub.book import BlocState, CampaignState, Contact
from hub.hub import Hub

WORKING: Final = "working"


class DeviceStanding(msgspec.Struct, frozen=True, kw_only=True):
    """One device. `why` is `working`, or the first thing that keeps it from working."""

    id: str
    campaign: str = ""
    bloc: str = ""
    why: str = ""
    board: str = ""
    blocked_seconds: float = 0.0  # how long its bloc waited for it alone, until now
    failed: int = 0  # rounds that sat out because its report was missing


class BlocStanding(msgspec.Struct, frozen=True, kw_only=True):
    """One bloc. `breaker` is the one member that it waits for now, or the one that it waited for longest."""

    campaign: str
    id: str
    state: str
    ready: int  # members that are READY and here
    reported: int  # in the open round
    devices: int
    opened: int
    tried: int
    opened_at: float  # Unix seconds; 0 = never
    breaker: str = ""
    blocked_hours: float = 0.0  # by the breaker alone
    share: float = 0.0  # of all opened sums of its campaign


class CampaignStanding(msgspec.Struct, frozen=True, kw_only=True):
    """One campaign: what came of the work, and whom it reaches. Shares are 0 to 1."""

    id: str
    closed: bool
    starving: bool
    blocs: int
    live: int  # whole, at work, or opened within two hours
    done: int
    training: int  # devices at work now
    versions: int
    yielded: float  # of all accepted reports, those that were opened
    never_served: dict[str, float]  # by board: share of the devices in blocs of which no sum was ever opened
    waiting_for_a_bloc: int
    staleness: float  # running mean, versions
    checkin_seconds: int


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, at one moment (Unix seconds)."""

    at: float
    campaigns: tuple[CampaignStanding, ...]
    blocs: tuple[BlocStanding, ...]
    devices: tuple[DeviceStanding, ...]


def standing(hub: Hub, now: float) -> Standing:
    """How all campaigns, blocs and devices stand; the worst breakers first."""
    devices = [_device(hub, now, contact) for contact in hub.contacts.values()]
    blocs = [_bloc(hub, now, bloc) for campaign in hub.campaigns.values() for bloc in campaign.blocs.values()]
    return Standing(
        at=now,
        campaigns=tuple(_campaign(hub, campaign) for campaign in hub.campaigns.values()),
        blocs=tuple(sorted(blocs, key=lambda one: (-one.blocked_hours, one.opened, one.campaign, one.id))),
        devices=tuple(sorted(devices, key=lambda one: (-one.blocked_seconds, -one.failed, one.id))),
    )


def why_not(hub: Hub, now: float, device: str) -> str:
    """`why` of one device alone; empty for one that was never heard of."""
    contact = hub.contacts.get(device)
    if contact is None:
        return ""
    campaign = contact.campaign or next((bloc.campaign for bloc in contact.blocs[::-1]), None)
    return _why(hub, now, contact, campaign, contact.bloc_in(campaign) if campaign is not None else None)


# ---------------------------------------------------------------- devices
def _device(hub: Hub, now: float, contact: Contact) -> DeviceStanding:
    campaign = contact.campaign or next((bloc.campaign for bloc in contact.blocs[::-1]), None)
    bloc = contact.bloc_in(campaign) if campaign is not None else None
    known = hub.device(contact.device)
    return DeviceStanding(
        id=contact.device,
        campaign=campaign.row.id if campaign is not None else "",
        bloc=bloc.row.id if bloc is not None else "",
        why=_why(hub, now, contact, campaign, bloc),
        board=contact.board,
        blocked_seconds=known.blocked_seconds + _blocking_now(hub, now, contact, bloc),
        failed=known.failed,
    )


def _blocking_now(hub: Hub, now: float, contact: Contact, bloc: BlocState | None) -> float:
    blocks = bloc is not None and bloc.blocked_by == contact.device
    return hub.waited(now, bloc) if bloc is not None and blocks else 0.0


def _why(
    hub: Hub, now: float, contact: Contact, campaign: CampaignState | None, bloc: BlocState | None
) -> str:
    """The first reason that holds; the ones that its owner or operator can do something about come first."""
    if contact.row is not None and contact.row.quarantined:
        return "quarantined"
    if campaign is None:
        return "no campaign" if contact.here else "absent"
    if campaign.row.closed:
        return "campaign closed"
    if bloc is not None and bloc.running:
        return _in_round(contact, bloc)
    if not contact.here:
        return "absent"
    if contact.why:
        return contact.why
    if not contact.envelope:
        return "not ready"  # it fetches the bundle, or has not heard how its round ended
    if bloc is None:
        return "unassigned"
    return _bloc_state(hub, now, bloc)


def _in_round(contact: Contact, bloc: BlocState) -> str:
    missing = bloc.current.missing if bloc.current is not None else ()
    if contact.device in missing:
        return WORKING if contact.here else "absent"
    return _waiting_for(len(missing), missing)


def _waiting_for(count: int, members: Iterable[str]) -> str:
    return f"waiting for {next(iter(members))}" if count == 1 else f"waiting for {count} members"


# ---------------------------------------------------------------- blocs
def _bloc(hub: Hub, now: float, bloc: BlocState) -> BlocStanding:
    row, campaign = bloc.row, bloc.campaign
    breaker, seconds = _breaker(hub, now, bloc)
    missing = bloc.current.missing if bloc.current is not None and bloc.running else row.members
    return BlocStanding(
        campaign=row.campaign,
        id=row.id,
        state=_bloc_state(hub, now, bloc),
        ready=bloc.ready,
        reported=len(row.members) - len(missing),
        devices=len(row.members),
        opened=row.opened,
        tried=row.round,
        opened_at=row.opened_at,
        breaker=breaker,
        blocked_hours=seconds / 3_600,
        share=row.opened / campaign.opened if campaign.opened else 0.0,
    )


def _breaker(hub: Hub, now: float, bloc: BlocState) -> tuple[str, float]:
    if bloc.blocked_by:
        return bloc.blocked_by, hub.device(bloc.blocked_by).blocked_seconds + hub.waited(now, bloc)
    seconds, device = max((hub.device(member).blocked_seconds, member) for member in bloc.row.members)
    return (device, seconds) if seconds else ("", 0.0)


def _bloc_state(hub: Hub, now: float, bloc: BlocState) -> str:
    campaign, row = bloc.campaign, bloc.row
    if campaign.row.closed:
        return "campaign closed"
    if bloc.running:
        return WORKING
    if bloc.done:
        return "rounds done"
    if not bloc.whole:
        members = (one for one in row.members if not hub.counts(one, campaign))
        return _waiting_for(len(row.members) - bloc.ready, members)
    if campaign.row.starving:
        return "starving"
    if now < bloc.rested_at:
        return "resting"
    if not scheduler.within_quota(row.opened, campaign.mean_opened, campaign.row.quota):
        return "quota"
    return "time is up" if campaign.over(now) else "cap"


# ---------------------------------------------------------------- campaigns
def _campaign(hub: Hub, campaign: CampaignState) -> CampaignStanding:
    row = campaign.row
    accepted = row.reports_opened + row.reports_spoiled
    return CampaignStanding(
        id=row.id,
        closed=row.closed,
        starving=row.starving,
        blocs=len(campaign.blocs),
        live=campaign.live,
        done=campaign.done,
        training=campaign.training,
        versions=row.adapter_version,
        yielded=row.reports_opened / accepted if accepted else 0.0,
        never_served=_never_served(hub, campaign),
        waiting_for_a_bloc=len(campaign.newcomers),
        staleness=row.staleness,
        checkin_seconds=row.checkin_seconds,
    )


def _never_served(hub: Hub, campaign: CampaignState) -> dict[str, float]:
    counts: dict[str, list[int]] = {}
    for bloc in campaign.blocs.values():
        for member in bloc.row.members:
            contact = hub.contacts.get(member)
            board = (contact.board if contact is not None else "") or "not heard yet"
            count = counts.setdefault(board, [0, 0])
            count[0] += not bloc.row.opened
            count[1] += 1
    return {board: never / devices for board, (never, devices) in sorted(counts.items())}
