"""The server's state machine: campaigns, blocs and rounds. Events in, effects out; decides everything, does nothing.

A campaign waits until enough devices are READY, forms blocs, and from then on opens each bloc whenever all of its
members are READY and its turn has come. Reports arrive in chunks; a whole report is verified, added to the bloc's
running sum and committed before it is acknowledged. The last report completes the sum, which is opened and applied at
once. A bloc that misses its window, or a member of which declines, sits the round out: nothing of it is opened.

    READY* -> form blocs -> [READY of all -> OPEN -> REPORT* -> opened | sat out]* -> closed

In layers, each on the one before: `hub.book` knows, `hub.rounds` keeps open rounds, `hub.admission` opens them,
`hub.forming` makes blocs, and here is what arrives. What must survive a kill is in the rows (`hub.effects`); the rest
devices say again when they see a new epoch. Every Save of one event is one transaction, before anything of it is
published. A READY that is said again costs a comparison: 100,000 waiting devices are a few milliseconds a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from fedge import topics
from fedge.errors import FedgeError, ProtocolError
from fedge.messages import (
    Announcement,
    Decline,
    HubState,
    Message,
    Presence,
    Ready,
    Report,
    decode,
    encode,
)
from hub import effects, scheduler
from hub.book import CampaignState, Contact
from hub.effects import CampaignRow, Effect, Event, LedgerEntry, Save
from hub.forming import Former

TICK_SECONDS: Final = 5.0
ANNOUNCE_SECONDS: Final = 3_600.0  # the newest adapter is announced at most so often: every device hears it
AGAIN_SECONDS: Final = 30.0  # between two announcements of one closed campaign


class Hub(Former):
    """One hub. `handle` is all that a driver needs; `hub.standing` reads the rest."""

    # ------------------------------------------------------------ entry
    def handle(self, now: float, event: Event) -> list[Effect]:
        """The effects of `event` at Unix time `now`, in the order in which they must be carried out."""
        done: list[Effect] = []  # what was decided before a refusal stands, in memory as in the rows
        if type(event) is effects.Received and self._only_heard_again(now, event):
            return done
        try:
            for effect in self._dispatch(now, event):
                done.append(effect)
        except ProtocolError as error:
            device = topics.device_of(event.topic) if isinstance(event, effects.Received) else ""
            done += self._refused(now, device, error.name, str(error))
        except FedgeError as error:
            done.append(effects.Tell(str(error), type(error).__name__.removesuffix("Error").lower()))
        return done

    def _only_heard_again(self, now: float, event: effects.Received) -> bool:
        """A READY whose very bytes were verified before, from a device that is here: it is here still."""
        contact = self.contacts.get(topics.device_of(event.topic))
        if contact is None or not contact.here or not contact.envelope or contact.envelope != event.payload:
            return False
        contact.heard_at = now
        return True

    def _dispatch(self, now: float, event: Event) -> Iterator[Effect]:
        match event:
            case effects.Received():
                yield from self._received(now, event)
            case effects.TimerFired():
                yield from self._tick(now)
            case effects.Started():
                yield from self._started(now, event)
            case effects.CampaignAsked():
                yield from self._campaign(now, event.campaign)

    def _received(self, now: float, event: effects.Received) -> Iterator[Effect]:
        device = topics.device_of(event.topic)
        if event.topic == topics.control(device):
            yield from self._control(now, device, event.payload)
        elif event.topic == topics.chunks(device):
            yield from self._chunk(now, device, event.payload)
        elif event.topic == topics.state(device):
            if event.payload:
                yield from self._presence(now, device, decode(event.payload, Presence))
        else:
            raise ProtocolError(
                "unexpected", "nothing is read from this topic", field="topic", value=event.topic
            )

    def _control(self, now: float, device: str, payload: bytes) -> Iterator[Effect]:
        opened = self.verifier.open_any(payload, _CONTROLS, role="device", now=now)
        message = opened.message
        assert isinstance(message, (Ready, Report, Decline))
        if not opened.subject == message.device == device:
            raise ProtocolError(
                "wrong-topic", "sent in another device's name", field="device", value=message.device
            )
        if self.device(device).quarantined:
            raise ProtocolError("quarantined", self.device(device).quarantined, field="device", value=device)
        match message:
            case Ready():
                yield from self._ready(now, message, payload)
            case Report():
                yield from self._report(now, message)
            case Decline():
                yield from self._decline(now, message)

    # ------------------------------------------------------------ start, tick, presence
    def _started(self, now: float, event: effects.Started) -> Iterator[Effect]:
        self.epoch, self.started_at = event.epoch, now
        state = HubState(hub=self.name, up=True, epoch=self.epoch)
        yield effects.Publish(topics.HUB_STATE, encode(state), retain=True)
        for campaign in self.campaigns.values():
            yield self._announce(campaign, now)
            if not campaign.row.closed:
                self._schedule(campaign)
                for bloc in campaign.blocs.values():
                    self._count_live(now, bloc)
        for round_state in list(self.rounds.values()):
            if round_state.open:
                yield from self._say_open(round_state)
                self._look_later(now, round_state)
        yield effects.SetTimer("tick", TICK_SECONDS)

    def _schedule(self, campaign: CampaignState) -> None:
        row = campaign.row
        self._at(campaign.announced_at + ANNOUNCE_SECONDS, self._announce_newest, campaign)
        if row.formations:
            self._at(campaign.forms_at, self._form_again, campaign)
        if row.seconds_max:
            self._at(row.started_at + row.seconds_max, self._end_if_done, campaign)

    def _tick(self, now: float) -> Iterator[Effect]:
        yield effects.SetTimer("tick", TICK_SECONDS)  # first, so that no refusal can stop the clock
        self._forget_refusals(now)
        for contact in self._fallen_silent(now):
            yield from self._set_here(now, contact, False)
        yield from self._due(now)
        for campaign in self.campaigns.values():
            if not campaign.row.closed:
                yield from self._watch_hunger(now, campaign)
                yield from self._steer_pace(now, campaign)

    def _presence(self, now: float, device: str, presence: Presence) -> Iterator[Effect]:
        """A device that comes back hears again what its bloc waits for. The topic's owner is who it speaks for."""
        contact = self._contact(device)
        if presence.device != device or presence.boot < contact.boot:
            return  # in another's name, or the last will of a process before this one
        contact.boot = presence.boot
        yield from self._set_here(now, contact, presence.up)
        if presence.up:
            yield from self._catches_up(contact)

    def _catches_up(self, contact: Contact) -> Iterator[Effect]:
        """Its round if it is open, else how that ended: a device that says no READY may not have heard it.

        Without that it would train to the end for a round that is long over.
        """
        for state in self._awaited_from(contact.device):
            yield from self._say_open(state, only=contact.device)
        for bloc in contact.blocs if not contact.envelope else ():
            if bloc.current is not None and not bloc.current.open:
                yield effects.Publish(topics.commands(contact.device), bloc.current.row.result)

    # ------------------------------------------------------------ campaigns and their announcements
    def _campaign(self, now: float, row: CampaignRow) -> Iterator[Effect]:
        if row.id in self.campaigns:
            raise ProtocolError(
                "campaign-exists", "a campaign's name is used once", field="campaign", value=row.id
            )
        row = msgspec.structs.replace(
            row,
            sequence=self._next_sequence(),
            started_at=now,
            beacon_secret=row.beacon_secret if any(row.beacon_secret) else self.entropy(32),
            checkin_seconds=scheduler.checkin_seconds(self.here, row.checkin_seconds),
        )
        yield self._save(row)
        yield Save(LedgerEntry(at=now, kind="campaign", campaign=row.id, detail={"rounds": row.rounds}))
        campaign = self.campaigns[row.id]
        yield self._announce(campaign, now)
        self._schedule(campaign)

    def _announce(self, campaign: CampaignState, now: float) -> effects.Publish:
        row = campaign.row
        campaign.announced_at, campaign.announced_version = now, row.adapter_version
        announcement = Announcement(
            campaign=row.id,
            hub=self.name,
            sequence=row.sequence,
            closed=row.closed,
            url=row.url,
            manifest=row.manifest,
            manifest_signature=row.manifest_signature,
            publisher=row.publisher,
            lora=row.lora,
            training=row.training,
            adapter=row.adapter,
            adapter_version=row.adapter_version,
            beacon=campaign.commitment,
            checkin_seconds=row.checkin_seconds,
        )
        return effects.Publish(topics.announcement(row.id), self.signer.seal(announcement), retain=True)

    def _announce_anew(self, now: float, campaign: CampaignState, **changes: object) -> Iterator[Effect]:
        """Under a newer number, so that every device takes it."""
        yield self._save(msgspec.structs.replace(campaign.row, sequence=self._next_sequence(), **changes))
        yield self._announce(campaign, now)

    def _announce_newest(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        if campaign.row.closed:
            return
        if campaign.row.adapter_version != campaign.announced_version:
            yield from self._announce_anew(now, campaign)
        self._at(now + ANNOUNCE_SECONDS, self._announce_newest, campaign)

    def _steer_pace(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Waiting devices are told to say READY less often when there are many of them."""
        wanted = scheduler.checkin_seconds(self.here, campaign.row.checkin_seconds)
        if wanted != campaign.row.checkin_seconds:
            yield from self._announce_anew(now, campaign, checkin_seconds=wanted)

    def _end_if_done(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Closes when every bloc has had its rounds, or when the time is up and no round is open."""
        done = campaign.blocs and campaign.done == len(campaign.blocs)
        if campaign.row.closed or campaign.running or not (done or campaign.over(now)):
            return
        yield from self._announce_anew(now, campaign, closed=True)
        yield Save(LedgerEntry(at=now, kind="closed", campaign=campaign.row.id))
        for contact in [one for one in self.contacts.values() if one.campaign is campaign]:
            contact.envelope = b""
            yield from self._recount(now, contact)
        campaign.newcomers, campaign.waiting, campaign.held = {}, [], []
        for other in [other for other in self.campaigns.values() if not other.row.closed]:
            yield from self._announce_anew(now, other)  # devices that were bound to the closed one may join

    # ------------------------------------------------------------ READY
    def _ready(self, now: float, ready: Ready, envelope: bytes) -> Iterator[Effect]:
        campaign = self.campaigns.get(ready.campaign)
        if campaign is None:
            raise ProtocolError("no-campaign", "no such campaign", field="campaign", value=ready.campaign)
        if campaign.row.closed:
            yield from self._announce_again(now, campaign)
            return
        contact = self._contact(ready.device)
        if ready.prekey == contact.spent:
            yield from self._spent_ready(now, campaign, contact)
            return
        if ready.counter > max(contact.counter, self.device(ready.device).counter):
            yield from self._follow(now, contact, campaign)
            yield from self._take(now, contact, ready, envelope)
        elif envelope == contact.envelope:
            yield from self._set_here(now, contact, True)
        elif ready.facts.samples_bucket:
            raise ProtocolError(
                "replayed-ready", "READY counters must grow", field="counter", value=ready.counter
            )
        if ready.facts.samples_bucket == 0:
            raise ProtocolError("empty-member", "a device without data has no place", field="device")

    def _follow(self, now: float, contact: Contact, campaign: CampaignState) -> Iterator[Effect]:
        """A device follows one campaign: with its first READY for another it leaves the one before."""
        if contact.campaign is campaign:
            return
        contact.envelope = b""
        yield from self._recount(now, contact)
        contact.campaign = campaign
        if contact.bloc_in(campaign) is None:
            entry = LedgerEntry(at=now, kind="ready", campaign=campaign.row.id, device=contact.device)
            yield Save(entry)

    def _take(self, now: float, contact: Contact, ready: Ready, envelope: bytes) -> Iterator[Effect]:
        assert contact.campaign is not None, "it was made to follow one"
        row = contact.campaign.row
        contact.board, contact.counter = self.board(ready.facts.board), ready.counter
        work = self._work(contact.campaign, ready)
        seconds = scheduler.planned_seconds(ready, work, layers=row.layers, adapter_bytes=row.adapter.size)
        contact.why, contact.envelope = scheduler.why_not(ready, seconds), envelope
        yield from self._set_here(now, contact, True)

    def _announce_again(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        """Tells whoever has not heard that the campaign is closed; one announcement serves many askers."""
        if now >= campaign.announced_at + AGAIN_SECONDS:
            yield self._announce(campaign, now)

    def _spent_ready(self, now: float, campaign: CampaignState, contact: Contact) -> Iterator[Effect]:
        """A READY of a prekey that a round was opened with: its sender missed the OPEN, or all of the round."""
        bloc = contact.bloc_in(campaign)
        if bloc is None or bloc.current is None:
            raise ProtocolError(
                "replayed-ready", "a prekey is for one round", field="device", value=contact.device
            )
        yield from self._set_here(now, contact, True)
        if bloc.current.open:
            yield from self._say_open(bloc.current, only=contact.device)
        else:
            yield effects.Publish(topics.commands(contact.device), bloc.current.row.result)


_CONTROLS: Final[dict[str, type[Message]]] = {"ready": Ready, "report": Report, "decline": Decline}
