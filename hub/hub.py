"""The server's state machine: campaigns, blocs and rounds. Events in, effects out; decides everything, does nothing.

A campaign waits until enough devices are READY, forms blocs once, and from then on opens each bloc whenever all of its
members are READY. Reports arrive in chunks; a whole report is verified, added to the bloc's running sum and committed
before it is acknowledged. The last report completes the sum, which is opened, applied to the adapter at once, and
announced. A bloc that misses its window, or a member of which declines, sits the round out: nothing of it is opened.

    READY* -> form blocs -> [READY of all -> OPEN -> REPORT* -> opened | sat out]* -> closed

What must survive a kill is in the rows (`hub.effects`); the rest (who is present, half-received reports) devices say
again when they see a new epoch. Every Save of one event is one transaction, before anything of it is published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import msgspec

from fedge import topics
from fedge.errors import FedgeError, ProtocolError
from fedge.messages import (
    BlocCard,
    Decline,
    HubState,
    Message,
    Open,
    Presence,
    Ready,
    Report,
    decode,
    decode_envelope,
    encode,
    kind_in,
)
from hub import aggregation, effects, scheduler
from hub.effects import BlocRow, CampaignRow, Effect, Event, LedgerEntry, RoundRow, Save
from hub.rounds import REFUSED_SECONDS, RoundKeeper

TICK_SECONDS: Final = 5.0
REPEAT_SECONDS: Final = 30.0  # an OPEN that a member has not answered is said again


class Hub(RoundKeeper):
    """One hub: campaigns, who is READY, which bloc opens when. The rounds themselves are the RoundKeeper's."""

    # ------------------------------------------------------------ entry
    def handle(self, now: float, event: Event) -> list[Effect]:
        """The effects of `event` at Unix time `now`, in the order in which they must be carried out."""
        done: list[Effect] = []  # what was decided before a refusal stands, in memory as in the rows
        try:
            for effect in self._dispatch(now, event):
                done.append(effect)
        except ProtocolError as error:
            device = topics.device_of(event.topic) if isinstance(event, effects.Received) else ""
            done += self._refused(now, device, error.name, str(error))
        except FedgeError as error:
            done.append(effects.Tell(str(error), type(error).__name__.removesuffix("Error").lower()))
        return done

    def _dispatch(self, now: float, event: Event) -> Iterator[Effect]:
        match event:
            case effects.Started():
                yield from self._started(event)
            case effects.CampaignAsked():
                yield from self._campaign(now, event.campaign)
            case effects.TimerFired():
                yield from self._tick(now)
            case effects.Received():
                yield from self._received(now, event)

    def _received(self, now: float, event: effects.Received) -> Iterator[Effect]:
        device = topics.device_of(event.topic)
        if event.topic == topics.chunks(device):
            yield from self._chunk(now, device, event.payload)
        elif event.topic == topics.state(device):
            if event.payload:
                yield from self._presence(device, decode(event.payload, Presence))
        elif event.topic == topics.control(device):
            yield from self._control(now, device, event.payload)
        else:
            raise ProtocolError(
                "unexpected", "nothing is read from this topic", field="topic", value=event.topic
            )

    def _control(self, now: float, device: str, payload: bytes) -> Iterator[Effect]:
        kind = kind_in(decode_envelope(payload).body, _CONTROLS)
        opened = self.verifier.open(payload, kind, role="device", now=now)
        message = opened.message
        assert isinstance(message, (Ready, Report, Decline))
        if not opened.subject == message.device == device:
            raise ProtocolError(
                "wrong-topic", "sent in another device's name", field="device", value=message.device
            )
        if self._device(device).quarantined:
            raise ProtocolError("quarantined", self._device(device).quarantined, field="device", value=device)
        match message:
            case Ready():
                yield from self._ready(now, message, payload)
            case Report():
                yield from self._report(now, message)
            case Decline():
                yield from self._decline(now, message)

    # ------------------------------------------------------------ start, tick, presence
    def _started(self, event: effects.Started) -> Iterator[Effect]:
        self.epoch = event.epoch
        state = HubState(hub=self.name, up=True, epoch=self.epoch)
        yield effects.Publish(topics.HUB_STATE, encode(state), retain=True)
        for campaign in self.campaigns.values():
            yield self._announce(campaign)
        for row in self._open_rounds():
            yield from self._say_open(row)
        yield effects.SetTimer("tick", TICK_SECONDS)

    def _tick(self, now: float) -> Iterator[Effect]:
        self.refused = {key: at for key, at in self.refused.items() if now < at + REFUSED_SECONDS}
        for row in self._open_rounds():
            if now > row.opened_at + self.campaigns[row.campaign].window_seconds:
                yield from self._sit_out(now, row, "window-over")
            elif now > self.repeated.get(row.transcript, row.opened_at) + REPEAT_SECONDS:
                self.repeated[row.transcript] = now
                yield from self._say_open(row)
        yield effects.SetTimer("tick", TICK_SECONDS)

    def _open_rounds(self) -> list[RoundRow]:
        return [row for row in self.rounds.values() if row.state == "open"]

    def _presence(self, device: str, presence: Presence) -> Iterator[Effect]:
        """A device that comes back hears again what its bloc waits for. The topic's owner is who it speaks for."""
        if presence.device != device or not presence.up:
            return
        for row in self._open_rounds():
            if device in aggregation.missing(row):
                yield from self._say_open(row, only=device)

    # ------------------------------------------------------------ campaigns
    def _campaign(self, now: float, row: CampaignRow) -> Iterator[Effect]:
        if row.id in self.campaigns:
            raise ProtocolError(
                "campaign-exists", "a campaign's name is used once", field="campaign", value=row.id
            )
        row = msgspec.structs.replace(row, sequence=self._next_sequence())
        yield self._save(row)
        yield Save(LedgerEntry(at=now, kind="campaign", campaign=row.id, detail={"rounds": row.rounds}))
        yield self._announce(row)

    # ------------------------------------------------------------ ready, form, open
    def _ready(self, now: float, ready: Ready, envelope: bytes) -> Iterator[Effect]:
        campaign = self.campaigns.get(ready.campaign)
        if campaign is None:
            raise ProtocolError("no-campaign", "no such campaign", field="campaign", value=ready.campaign)
        if campaign.closed:
            yield from self._announce_again(now, campaign)
            return
        if ready.facts.samples_bucket == 0:
            raise ProtocolError("empty-member", "a device without data has no place", field="device")
        known = self.ready.get((campaign.id, ready.device))
        if known is not None and known[1] == envelope:
            return
        newest = known[0].counter if known is not None else self._device(ready.device).counter
        if ready.counter <= newest:
            yield from self._spent_ready(ready, envelope)
            return
        self.ready[campaign.id, ready.device] = ready, envelope
        if known is None:
            yield Save(LedgerEntry(at=now, kind="ready", campaign=campaign.id, device=ready.device))
        if not any(key[0] == campaign.id for key in self.blocs):
            yield from self._form(now, campaign)
        for bloc in list(self.blocs.values()):
            if bloc.campaign == campaign.id and ready.device in bloc.members:
                yield from self._open_if_ready(now, campaign, bloc)

    def _announce_again(self, now: float, campaign: CampaignRow) -> Iterator[Effect]:
        """Tells whoever has not heard that the campaign is closed; one announcement serves many askers."""
        if now >= self.announced.get(campaign.id, 0.0) + REPEAT_SECONDS:
            self.announced[campaign.id] = now
            yield self._announce(campaign)

    def _spent_ready(self, ready: Ready, envelope: bytes) -> Iterator[Effect]:
        """A READY that a round was opened with: its sender missed the OPEN, or all of the round."""
        for row in self.rounds.values():
            members = self.blocs[row.campaign, row.bloc].members
            if row.campaign != ready.campaign or ready.device not in members:
                continue
            if envelope in decode(decode_envelope(row.envelope).body, Open).roster:
                if row.state == "open":
                    yield from self._say_open(row, only=ready.device)
                else:
                    yield effects.Publish(topics.commands(ready.device), row.result)
                return
        raise ProtocolError(
            "replayed-ready", "READY counters must grow", field="counter", value=ready.counter
        )

    def _form(self, now: float, campaign: CampaignRow) -> Iterator[Effect]:
        present = {device: ready for (name, device), (ready, _) in self.ready.items() if name == campaign.id}
        if len(present) < campaign.form_at_devices:
            return
        beacon = self.entropy(32)
        blocs = scheduler.form_blocs(present, campaign.bloc_devices, beacon)
        for number, members in enumerate(blocs):
            card = BlocCard(campaign=campaign.id, bloc=f"bloc-{number}", members=members, beacon=beacon)
            bloc = BlocRow(campaign=campaign.id, id=card.bloc, members=members, card=self.signer.seal(card))
            yield self._save(bloc)
            yield Save(
                LedgerEntry(
                    at=now,
                    kind="formed",
                    campaign=campaign.id,
                    bloc=bloc.id,
                    detail={"members": ",".join(members)},
                )
            )
        for bloc in [bloc for bloc in self.blocs.values() if bloc.campaign == campaign.id]:
            yield from self._open_if_ready(now, campaign, bloc)

    def _open_if_ready(self, now: float, campaign: CampaignRow, bloc: BlocRow) -> Iterator[Effect]:
        keys = [(campaign.id, member) for member in bloc.members]
        running = any((row.campaign, row.bloc) == (bloc.campaign, bloc.id) for row in self._open_rounds())
        if running or bloc.opened >= campaign.rounds or not all(key in self.ready for key in keys):
            return
        readys = [self.ready.pop(key) for key in keys]
        opening = self._opening(campaign, bloc, readys)
        body = encode(opening)
        row = RoundRow(
            transcript=hashlib.sha256(body).digest(),
            campaign=campaign.id,
            bloc=bloc.id,
            round=opening.round,
            envelope=self.signer.seal(opening),
            base_version=campaign.adapter_version,
            state="open",
            sum=aggregation.empty_sum(body, bloc.members, campaign.numbers, opening.codec),
            opened_at=now,
        )
        for ready, _ in readys:
            yield self._save(msgspec.structs.replace(self._device(ready.device), counter=ready.counter))
        yield self._save(row)
        yield self._save(msgspec.structs.replace(bloc, round=opening.round))
        yield Save(LedgerEntry(at=now, kind="open", campaign=campaign.id, bloc=bloc.id, round=opening.round))
        yield from self._say_open(row)

    def _opening(self, campaign: CampaignRow, bloc: BlocRow, readys: list[tuple[Ready, bytes]]) -> Open:
        steps = scheduler.balance(tuple(scheduler.plan_steps(ready, campaign.steps) for ready, _ in readys))
        return Open(
            campaign=campaign.id,
            bloc=bloc.id,
            card=hashlib.sha256(decode_envelope(bloc.card).body).digest(),
            round=bloc.round + 1,
            manifest=campaign.manifest.sha256,
            adapter=campaign.adapter,
            codec=aggregation.next_codec(campaign, max(steps), self.entropy(16)),
            steps=steps,
            roster=tuple(envelope for _, envelope in readys),
            window_seconds=campaign.window_seconds,
        )

    def _say_open(self, row: RoundRow, only: str = "") -> Iterator[Effect]:
        card = self.blocs[row.campaign, row.bloc].card
        for member in aggregation.missing(row):
            if only in ("", member):
                yield effects.Publish(topics.commands(member), card)
                yield effects.Publish(topics.commands(member), row.envelope)


_CONTROLS: Final[dict[str, type[Message]]] = {"ready": Ready, "report": Report, "decline": Decline}
