"""One round of one bloc on the hub: reports in, one opened sum out, or nothing at all.

A report arrives in chunks, is verified whole, added to the running sum and committed before it is acknowledged. The
last one completes the sum, which is opened and applied. A bloc that misses its window, a member of which declines, or
whose sum does not match its check-sums sits the round out: nothing of it is opened.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Final

import msgspec

from fedge import limits, topics
from fedge.errors import ProtocolError
from fedge.frames import Incoming, decode_frame
from fedge.messages import (
    UNKNOWN_ROUND,
    BlobRef,
    Decline,
    Open,
    Receipt,
    Report,
    Result,
    decode,
    decode_envelope,
)
from hub import aggregation, effects, parts, scheduler
from hub.aggregation import OpenedSum
from hub.book import BlocState, Book, Contact, RoundState
from hub.effects import CampaignRow, Effect, LedgerEntry, Save

RECEIPT_EVERY: Final = 4  # chunks between bitmaps
_STALENESS_MEMORY: Final = 64  # opened sums that the running mean looks back on, about


class RoundKeeper(Book, ABC):
    """Everything a hub does with a round that is open. `hub.admission` decides which rounds open."""

    @abstractmethod
    def _round_ended(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        """A bloc has no open round any more; called last, when every row of it is saved."""

    @abstractmethod
    def _recount(self, now: float, contact: Contact) -> Iterator[Effect]:
        """Whether this device counts for its bloc may have changed."""

    # ------------------------------------------------------------ reports
    def _member_round(self, message: Report | Decline) -> RoundState | None:
        """The round a member speaks of; None for one that was dropped from memory, or never was."""
        campaign = self.campaigns.get(message.campaign)
        bloc = campaign.blocs.get(message.bloc) if campaign is not None else None
        if bloc is None or message.device not in bloc.row.members:
            raise ProtocolError(
                "not-a-member", "not a member of that bloc", field="device", value=message.device
            )
        known = self.rounds.get(message.transcript)
        return known if known is not None and known.bloc is bloc else None

    def _forgotten(self, now: float, message: Report | Decline) -> Iterator[Effect]:
        """A signed end for a round that this hub has not got, or the device would ask for ever."""
        result = Result(
            campaign=message.campaign,
            bloc=message.bloc,
            round=0,
            transcript=message.transcript,
            opened=False,
            reason=UNKNOWN_ROUND,
        )
        yield effects.Publish(topics.commands(message.device), self.signer.seal(result))
        yield from self._refused(now, message.device, UNKNOWN_ROUND, "speaks of a round that is not known")

    def _report(self, now: float, report: Report) -> Iterator[Effect]:
        state = self._member_round(report)
        if state is None:
            yield from self._forgotten(now, report)
            return
        if state.total is None:
            yield effects.Publish(topics.commands(report.device), state.row.result)
            return
        known = state.total.digest_of(report.device)
        started = state.incoming.get(report.device)
        if (known or (started.digest if started else report.digest)) != report.digest:
            yield from self._quarantine(now, report)
            return
        if known is None and started is None:
            if report.size != state.total.layout.size:
                raise ProtocolError("oversize", "report has the wrong size", field="size", value=report.size)
            started = state.incoming[report.device] = Incoming(report.size, report.digest)
        bitmap = started.bitmap if started is not None else b""
        accepted = known is not None
        yield self._receipt(
            report.device, report.transcript, report.digest, bitmap, accepted=accepted, offer=report.offer
        )

    def _quarantine(self, now: float, report: Report) -> Iterator[Effect]:
        """Two different reports under one transcript: a two-time pad or an attack. Nothing more from this device."""
        yield self._save(
            msgspec.structs.replace(self.device(report.device), quarantined="changed its report")
        )
        yield Save(
            LedgerEntry(
                at=now, kind="quarantined", campaign=report.campaign, bloc=report.bloc, device=report.device
            )
        )
        yield from self._refused(now, report.device, "changed-report", "offered a second, different report")
        yield self._receipt(report.device, report.transcript, report.digest, b"", refused="changed-report")
        yield from self._recount(now, self._contact(report.device))

    def _chunk(self, now: float, device: str, payload: bytes) -> Iterator[Effect]:
        header, body = decode_frame(payload)
        state = self.rounds.get(header.transcript)
        incoming = state.incoming.get(device) if state is not None else None
        if state is None or incoming is None or header.digest != incoming.digest:
            return  # late, or from before a restart: the offer that follows sorts it out
        incoming.add(header.index, body)
        if incoming.whole:
            yield from self._whole_report(now, device, state, incoming)
        elif len(incoming.have) % RECEIPT_EVERY == 0:
            yield self._receipt(device, header.transcript, incoming.digest, incoming.bitmap)

    def _whole_report(
        self, now: float, device: str, state: RoundState, incoming: Incoming
    ) -> Iterator[Effect]:
        del state.incoming[device]
        row, total = state.row, state.total
        assert total is not None, "an ended round has no incoming reports"
        total.add(device, incoming.body())
        yield Save(msgspec.structs.replace(row, sum=total.to_bytes()))
        yield Save(
            LedgerEntry(
                at=now, kind="report", campaign=row.campaign, bloc=row.bloc, device=device, round=row.round
            )
        )
        yield self._receipt(device, row.transcript, incoming.digest, incoming.bitmap, accepted=True)
        self._set_training(self._contact(device), state, training=False)
        if total.whole:
            yield from self._open_sum(now, state)
        else:
            yield from self._room(now, state.bloc)

    @abstractmethod
    def _room(self, now: float, bloc: BlocState) -> Iterator[Effect]:
        """A device of this bloc trains no more, so another bloc may."""

    def _set_training(self, contact: Contact, state: RoundState, *, training: bool) -> None:
        if contact.training != training:
            contact.training = training
            state.bloc.campaign.training += 1 if training else -1

    def _receipt(
        self,
        device: str,
        transcript: bytes,
        digest: bytes,
        have: bytes,
        *,
        accepted: bool = False,
        refused: str = "",
        offer: int = 0,
    ) -> effects.Publish:
        receipt = Receipt(
            transcript=transcript,
            digest=digest,
            have=have,
            accepted=accepted,
            refused=refused,
            offer=offer,
        )
        return effects.Publish(topics.receipts(device), self.signer.seal(receipt))

    # ------------------------------------------------------------ the end of a round
    def _open_sum(self, now: float, state: RoundState) -> Iterator[Effect]:
        assert state.total is not None, "only an open round has a sum"
        campaign, bloc = state.bloc.campaign.row, state.bloc
        codec = decode(decode_envelope(state.row.envelope).body, Open).codec
        part = parts.round_part(campaign, state.row)
        try:
            opened = aggregation.open_sum(state.total, codec, part.numbers)
        except ProtocolError as error:
            # The same step would wrap again: the next OPEN starts from public bounds, at 16 bits.
            yield self._save(parts.doubted(campaign, part))
            yield from self._sit_out(now, state, error.name)
            return
        beside = self._beside(bloc)
        times = self._factor(campaign, state, opened, beside)
        data = parts.apply(campaign, state.row, self.read_adapter(campaign.adapter), opened, times)
        ref = BlobRef(hashlib.sha256(data).digest(), len(data))
        yield effects.StoreBlob(ref, data)
        yield self._save(
            msgspec.structs.replace(
                bloc.row, opened=bloc.row.opened + 1, opened_at=now, ended_at=now, sat_out=0
            )
        )
        late = aggregation.staleness(campaign.adapter_version - state.row.base_version, beside)
        yield self._save(_moved_on(parts.tuned(campaign, part, opened), ref, opened, late))
        yield from self._close_round(now, state, opened.summary())

    def _beside(self, bloc: BlocState) -> int:
        campaign = bloc.campaign
        return scheduler.side_by_side(
            len(campaign.blocs), campaign.row.training_devices_max, len(bloc.row.members)
        )

    def _factor(self, campaign: CampaignRow, state: RoundState, opened: OpenedSum, beside: int) -> float:
        times = aggregation.factor(
            opened.devices,
            beside=beside,
            server_rate=campaign.server_rate,
            behind=campaign.adapter_version - state.row.base_version,
        )
        if campaign.normalise_steps:
            times *= aggregation.step_correction(campaign.mean_steps, opened)
        return times

    def _decline(self, now: float, decline: Decline) -> Iterator[Effect]:
        state = self._member_round(decline)
        if state is None:
            yield from self._forgotten(now, decline)
        elif state.open:
            reason = f"{decline.device}: {decline.reason}"[: limits.NAME_CHARS_MAX]
            yield from self._sit_out(now, state, reason, missed=(decline.device,))
        else:
            yield effects.Publish(topics.commands(decline.device), state.row.result)

    def _sit_out(
        self, now: float, state: RoundState, reason: str, missed: Collection[str] = ()
    ) -> Iterator[Effect]:
        """Nothing of the round is opened; `missed` are the members whose fault that was, as far as one can see."""
        for device in missed:
            known = self.device(device)
            yield self._save(msgspec.structs.replace(known, failed=known.failed + 1))
        campaign, bloc = state.bloc.campaign.row, state.bloc.row
        spoiled = campaign.reports_spoiled + len(bloc.members) - len(state.missing)
        yield self._save(msgspec.structs.replace(campaign, reports_spoiled=spoiled))
        yield self._save(msgspec.structs.replace(bloc, ended_at=now, sat_out=bloc.sat_out + 1))
        yield from self._close_round(now, state, {"reason": reason}, reason)

    def _close_round(
        self, now: float, state: RoundState, detail: dict[str, float | int | str], reason: str = ""
    ) -> Iterator[Effect]:
        row, bloc = state.row, state.bloc
        result = Result(
            campaign=row.campaign,
            bloc=row.bloc,
            round=row.round,
            transcript=row.transcript,
            opened=not reason,
            reason=reason,
        )
        for member in state.missing:
            self._set_training(self._contact(member), state, training=False)
        kind = "sat-out" if reason else "opened"
        yield self._save(msgspec.structs.replace(row, state=kind, sum=b"", result=self.signer.seal(result)))
        yield Save(
            LedgerEntry(
                at=now, kind=kind, campaign=row.campaign, bloc=row.bloc, round=row.round, detail=detail
            )
        )
        yield from self._round_ended(now, bloc)

    def _say_result(self, state: RoundState) -> Iterator[Effect]:
        for member in state.bloc.row.members:
            yield effects.Publish(topics.commands(member), state.row.result)


def _moved_on(row: CampaignRow, adapter: BlobRef, opened: OpenedSum, late: int) -> CampaignRow:
    """The campaign after one more opened sum."""
    return msgspec.structs.replace(
        row,
        adapter=adapter,
        adapter_version=row.adapter_version + 1,
        mean_steps=aggregation.mean_steps(row.mean_steps, opened),
        reports_opened=row.reports_opened + opened.devices,
        staleness=row.staleness + (late - row.staleness) / min(row.adapter_version + 1, _STALENESS_MEMORY),
    )
