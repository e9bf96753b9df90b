"""When a bloc opens: who counts, which bloc is whole, whose turn it is. The rules are `hub.scheduler`'s.

Each change touches one device and its bloc. A whole bloc passes rest and quota, then waits in one heap for room; a
bloc that cannot open yet is looked at again when what holds it back ends, never before:

    not whole -> [rest: the agenda] -> [quota: a heap by the mean that frees it] -> [room: a heap, longest unserved
    first] -> OPEN

While too few blocs are live the campaign starves: nothing is opened, and the operator is told. The bloc size is never
lowered.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import abstractmethod
from collections.abc import Iterator
from typing import Final

import msgspec

from fedge import topics
from fedge.messages import Open, Ready, decode, decode_envelope, encode
from hub import aggregation, effects, parts, scheduler
from hub.book import BlocState, CampaignState, Contact, RoundState
from hub.effects import Effect, LedgerEntry, RoundRow, Save
from hub.rounds import RoundKeeper
from hub.scheduler import STARVE_AFTER_SECONDS, Work

REPEAT_SECONDS: Final = 60.0  # an unanswered OPEN is said again after 1, 3, 7, … times this
AWAY_SECONDS: Final = 300.0  # a member that is back by then never gave up its place: links flap
_BLOCKED_SAVED_SECONDS: Final = 60.0  # a shorter wait for one member is written with its next round


class Admission(RoundKeeper):
    """Counts who is READY, and opens the blocs whose turn it is."""

    @abstractmethod
    def _newcomer(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """A device that is in no bloc has become READY."""

    @abstractmethod
    def _end_if_done(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Closes the campaign when nothing is left to do in it."""

    # ------------------------------------------------------------ who counts
    def _set_here(self, now: float, contact: Contact, here: bool) -> Iterator[Effect]:
        """The device is here, or away."""
        if here:
            contact.heard_at = now
        if contact.here != here:
            contact.here = here
            self.here += 1 if here else -1
            if here:
                for state in self._awaited_from(contact.device):
                    self._set_training(contact, state, training=True)
            elif contact.training:
                self._at(now + AWAY_SECONDS, self._left, contact)
        if here and contact.envelope and not contact.watched:
            self._watch(contact)
        yield from self._recount(now, contact)

    def _left(self, now: float, contact: Contact) -> Iterator[Effect]:
        """A member of an open round stays away: its place is free."""
        if contact.here:
            return
        for state in self._awaited_from(contact.device):
            self._set_training(contact, state, training=False)
            yield from self._room(now, state.bloc)

    def _awaited_from(self, device: str) -> Iterator[RoundState]:
        """The open rounds that wait for this device's report: one, unless it is in several campaigns."""
        for bloc in self._contact(device).blocs:
            if bloc.current is not None and device in bloc.current.missing:
                yield bloc.current

    def _recount(self, now: float, contact: Contact) -> Iterator[Effect]:
        """Whether this device counts for its bloc, or as a newcomer, may have changed."""
        if contact.row is not None and contact.row.quarantined:
            contact.why = "quarantined"
        counts = bool(contact.envelope) and contact.here and not contact.why
        if counts == contact.counted:
            return
        contact.counted = counts
        campaign = contact.campaign
        assert campaign is not None, "a READY is of a campaign"
        bloc = contact.bloc_in(campaign)
        if bloc is not None:
            bloc.ready += 1 if counts else -1
            yield from self._bloc_changed(now, bloc)
        elif counts:
            campaign.newcomers[contact.device] = contact
            yield from self._newcomer(now, campaign)
        else:
            del campaign.newcomers[contact.device]

    def _bloc_changed(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        yield from self._account_wait(now, bloc)
        self._count_live(now, bloc)
        yield from self._consider(now, bloc)

    # ------------------------------------------------------------ whose turn it is
    def _may_open(self, bloc: BlocState) -> bool:
        return bloc.whole and not bloc.running and not bloc.done and not bloc.campaign.row.closed

    def _consider(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        if self._queue(now, bloc):
            yield from self._admit(now, bloc.campaign)

    def _queue(self, now: float, bloc: BlocState) -> bool:
        """Lets a whole bloc wait for whatever holds it back; True when that is room."""
        if bloc.queued or not self._may_open(bloc):
            return False
        campaign, row = bloc.campaign, bloc.row
        if now < bloc.rested_at:
            bloc.queued = "rest"
            self._at(bloc.rested_at, self._rested, bloc)
        elif not scheduler.within_quota(row.opened, campaign.mean_opened, campaign.row.quota):
            self._hold(bloc)
        else:
            bloc.queued = "room"
            heapq.heappush(campaign.waiting, (scheduler.order(row.ended_at, bloc.tie), row.id))
        return bloc.queued == "room"

    def _hold(self, bloc: BlocState) -> None:
        bloc.queued = "quota"
        frees = scheduler.quota_mean(bloc.row.opened, bloc.campaign.row.quota)
        heapq.heappush(bloc.campaign.held, (frees, bloc.row.id))

    def _rested(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        bloc.queued = ""
        yield from self._consider(now, bloc)

    def _release(self, now: float, campaign: CampaignState) -> None:
        """The mean has grown: blocs that had their quota may go on."""
        while campaign.held and campaign.held[0][0] <= campaign.mean_opened:
            _, name = heapq.heappop(campaign.held)
            campaign.blocs[name].queued = ""
            self._queue(now, campaign.blocs[name])

    def _room(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        yield from self._admit(now, bloc.campaign)

    def _admit(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Opens blocs in their order while there is room."""
        row = campaign.row
        if row.starving or row.closed or campaign.over(now):
            return
        while campaign.waiting and scheduler.has_room(campaign.training, row.training_devices_max):
            _, name = heapq.heappop(campaign.waiting)
            bloc = campaign.blocs[name]
            bloc.queued = ""
            if not self._may_open(bloc):
                continue
            if scheduler.within_quota(bloc.row.opened, campaign.mean_opened, row.quota):
                yield from self._open(now, bloc)
            else:
                self._hold(bloc)

    # ------------------------------------------------------------ OPEN
    def _open(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        campaign = bloc.campaign.row
        contacts = [self._contact(member) for member in bloc.row.members]
        readys = [decode(decode_envelope(contact.envelope).body, Ready) for contact in contacts]
        opening = self._opening(bloc, contacts, readys)
        body = encode(opening)
        transcript = hashlib.sha256(body).digest()
        row = RoundRow(
            transcript=transcript,
            campaign=campaign.id,
            bloc=bloc.row.id,
            round=opening.round,
            envelope=self.signer.seal(opening),
            base_version=campaign.adapter_version,
            state="open",
            sum=aggregation.empty_sum(
                transcript,
                bloc.row.members,
                parts.part_of(campaign, opening.round, campaign.adapter_version).numbers,
                opening.codec,
            ).to_bytes(),
            opened_at=now,
        )
        for contact, ready in zip(contacts, readys, strict=True):
            yield self._save(msgspec.structs.replace(self.device(ready.device), counter=ready.counter))
            self._spend(contact, ready)
        yield self._save(row)
        yield self._save(msgspec.structs.replace(bloc.row, round=opening.round))
        yield Save(
            LedgerEntry(at=now, kind="open", campaign=campaign.id, bloc=bloc.row.id, round=opening.round)
        )
        state = self.rounds[transcript]
        for contact in contacts:
            self._set_training(contact, state, training=True)
        bloc.ready = 0
        yield from self._account_wait(now, bloc)
        self._count_live(now, bloc)
        # Once a sum of the bloc was opened, every member is known to have pinned the card.
        yield from self._say_open(state, with_card=not bloc.row.opened)
        self._look_later(now, state)

    def _spend(self, contact: Contact, ready: Ready) -> None:
        """The READY is in an OPEN: it counts no more, and is known when it is said again."""
        contact.envelope, contact.counted, contact.spent = b"", False, ready.prekey

    def _opening(self, bloc: BlocState, contacts: list[Contact], readys: list[Ready]) -> Open:
        campaign = bloc.campaign.row
        works = scheduler.balance([self._work(bloc.campaign, ready) for ready in readys], campaign.layers)
        steps, depths = tuple(work.steps for work in works), tuple(work.depth for work in works)
        number = parts.next_round(campaign, bloc.row)
        part = parts.part_of(campaign, number, campaign.adapter_version)
        return Open(
            campaign=campaign.id,
            bloc=bloc.row.id,
            card=hashlib.sha256(decode_envelope(bloc.row.card).body).digest(),
            round=number,
            manifest=campaign.manifest.sha256,
            adapter=campaign.adapter,
            codec=aggregation.next_codec(campaign, max(steps), self.entropy(16), part),
            steps=steps,
            roster=tuple(contact.envelope for contact in contacts),
            window_seconds=campaign.window_seconds,
            depths=tuple(depth or campaign.layers for depth in depths) if any(depths) else (),
        )

    def _work(self, campaign: CampaignState, ready: Ready) -> Work:
        row = campaign.row
        return scheduler.plan_work(
            ready,
            steps=row.steps,
            work_seconds=row.work_seconds,
            layers=row.layers,
            adapter_bytes=row.adapter.size,
        )

    def _say_open(
        self, state: RoundState, *, only: str = "", with_card: bool = True, here: bool = False
    ) -> Iterator[Effect]:
        """To every member whose report is missing; with `here`, only to those that are not known to be away."""
        for member in state.missing:
            contact = self._contact(member)
            away = here and contact.heard_at and not contact.here
            if only not in ("", member) or away or member in state.incoming:
                continue
            if with_card:
                yield effects.Publish(topics.commands(member), state.bloc.row.card)
            yield effects.Publish(topics.commands(member), state.row.envelope)

    # ------------------------------------------------------------ while a round is open
    def _look_later(self, now: float, state: RoundState) -> None:
        """Sets when to say the OPEN again, ever more seldom; or when the window is over."""
        opened_at = state.row.opened_at
        over = opened_at + state.bloc.campaign.row.window_seconds
        while (again := opened_at + REPEAT_SECONDS * (2 ** (state.repeats + 1) - 1)) <= now < over:
            state.repeats += 1
        self._at(min(again, over), self._look_after, state)

    def _look_after(self, now: float, state: RoundState) -> Iterator[Effect]:
        if not state.open:
            return
        if now >= state.row.opened_at + state.bloc.campaign.row.window_seconds:
            yield from self._sit_out(now, state, "window-over", missed=state.missing)
        else:
            yield from self._say_open(state, here=True)
            self._look_later(now, state)

    def _round_ended(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        campaign = bloc.campaign
        yield from self._end_if_done(now, campaign)
        assert bloc.current is not None, "a round has just ended"
        yield from self._say_result(bloc.current)
        yield from self._bloc_changed(now, bloc)
        self._release(now, campaign)
        yield from self._admit(now, campaign)

    # ------------------------------------------------------------ who holds a bloc up
    def _account_wait(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        """Keeps the time for which a bloc that could open waits for one member alone."""
        blocker = self._blocker(bloc)
        if blocker == bloc.blocked_by:
            return
        waited = self.waited(now, bloc)
        if waited > 0:
            known = self.device(bloc.blocked_by)
            row = msgspec.structs.replace(known, blocked_seconds=known.blocked_seconds + waited)
            self._keep(row)
            if waited >= _BLOCKED_SAVED_SECONDS:
                yield Save(row)
        bloc.blocked_by, bloc.blocked_since = blocker, max(now, bloc.rested_at)

    def waited(self, now: float, bloc: BlocState) -> float:
        """For how many seconds the bloc has now waited for `bloc.blocked_by` alone."""
        return max(0.0, now - bloc.blocked_since) if bloc.blocked_by else 0.0

    def _blocker(self, bloc: BlocState) -> str:
        row, campaign = bloc.row, bloc.campaign
        if bloc.ready != len(row.members) - 1 or bloc.running or bloc.done or campaign.row.closed:
            return ""
        if not scheduler.within_quota(row.opened, campaign.mean_opened, campaign.row.quota):
            return ""
        return next(member for member in row.members if not self.counts(member, campaign))

    def counts(self, device: str, campaign: CampaignState) -> bool:
        """Whether the device is READY for this campaign, and here."""
        contact = self.contacts.get(device)
        return contact is not None and contact.counted and contact.campaign is campaign

    # ------------------------------------------------------------ starvation
    def _count_live(self, now: float, bloc: BlocState) -> None:
        opened_at = bloc.row.opened_at
        lately = bool(opened_at) and now < opened_at + scheduler.LIVE_SECONDS
        live = not bloc.done and (bloc.whole or bloc.running or lately)
        if live != bloc.live:
            bloc.live = live
            bloc.campaign.live += 1 if live else -1
        if lately and not bloc.fading:
            bloc.fading = True
            self._at(opened_at + scheduler.LIVE_SECONDS, self._fade, bloc)

    def _fade(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        bloc.fading = False
        self._count_live(now, bloc)
        yield from ()

    def _watch_hunger(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Stops a campaign in which too few blocs are live, and lets it go on when there are enough."""
        row, unfinished = campaign.row, len(campaign.blocs) - campaign.done
        heard = (
            self.started_at + scheduler.PRESENT_CHECKINS * row.checkin_seconds
        )  # all had time to say READY
        if row.closed or not row.formed_at or now < max(heard, row.formed_at + STARVE_AFTER_SECONDS):
            return
        starving = scheduler.is_starving(campaign.live, unfinished)
        if starving == row.starving:
            return
        yield self._save(msgspec.structs.replace(row, starving=starving))
        counts: dict[str, float | int | str] = {"live": campaign.live, "unfinished": unfinished}
        kind = "starving" if starving else "fed"
        yield Save(LedgerEntry(at=now, kind=kind, campaign=row.id, detail=counts))
        share = f"{campaign.live} of {unfinished} blocs are live"
        if starving:
            yield effects.Tell(
                f"{row.id} starves: {share}; nothing is opened until a quarter is. `fedge hub blocs` shows "
                "whom they wait for"
            )
        else:
            yield effects.Tell(f"{row.id} goes on: {share}")
            yield from self._admit(now, campaign)
