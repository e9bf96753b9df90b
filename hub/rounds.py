"""One round of one bloc on the hub: reports in, one opened sum out, or nothing at all.

A report arrives in chunks, is verified whole, added to the running sum and committed before it is acknowledged. The
last one completes the sum, which is opened, applied and announced. A bloc that misses its window, a member of which
declines, or whose sum does not match its check-sums sits the round out: nothing of it is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from fedge import limits, topics
from fedge.errors import ProtocolError
from fedge.frames import Incoming, decode_frame
from fedge.identity import Signer, Verifier
from fedge.messages import UNKNOWN_ROUND, Announcement, BlobRef, Decline, Ready, Receipt, Report, Result
from hub import aggregation, effects
from hub.effects import BlocRow, CampaignRow, DeviceRow, Effect, LedgerEntry, RoundRow, Save

RECEIPT_EVERY: Final = 4  # chunks between bitmaps
REFUSED_SECONDS: Final = 60.0


class RoundKeeper:
    """What a hub knows, and everything it does with a round that is open. `hub.hub.Hub` decides which rounds open."""

    def __init__(
        self,
        name: str,
        signer: Signer,
        verifier: Verifier,
        rows: Iterable[effects.Row],
        adapter: Callable[[BlobRef], bytes],
        entropy: Callable[[int], bytes],
    ) -> None:
        self.name, self.signer, self.verifier = name, signer, verifier
        self.read_adapter, self.entropy = adapter, entropy
        self.epoch = 0
        self.campaigns: dict[str, CampaignRow] = {}
        self.blocs: dict[tuple[str, str], BlocRow] = {}
        self.rounds: dict[bytes, RoundRow] = {}
        self.devices: dict[str, DeviceRow] = {}
        self.ready: dict[tuple[str, str], tuple[Ready, bytes]] = {}  # (campaign, device) -> READY, envelope
        self.incoming: dict[tuple[bytes, str], Incoming] = {}
        self.repeated: dict[bytes, float] = {}
        self.announced: dict[str, float] = {}  # when a closed campaign was last announced again
        self.refused: dict[tuple[str, str], float] = {}  # (device, name) of refusals -> when it was told
        for row in rows:
            self._keep(row)

    def _keep(self, row: effects.Row) -> None:
        match row:
            case CampaignRow():
                self.campaigns[row.id] = row
            case BlocRow():
                self.blocs[row.campaign, row.id] = row
            case RoundRow():
                self._keep_round(row)
            case DeviceRow():
                self.devices[row.id] = row
            case LedgerEntry():
                pass  # the ledger is for people; no decision reads it

    def _keep_round(self, row: RoundRow) -> None:
        """Only a bloc's newest round: until a member has heard its end it says no READY, so no later one opens."""
        for other in [other for other in self.rounds.values() if _bloc_of(other) == _bloc_of(row)]:
            if other.round > row.round:
                return
            del self.rounds[other.transcript]
        self.rounds[row.transcript] = row

    def _save(self, row: effects.Row) -> Save:
        self._keep(row)
        return Save(row)

    def _device(self, device: str) -> DeviceRow:
        return self.devices.get(device, DeviceRow(id=device))

    def _announce(self, row: CampaignRow) -> effects.Publish:
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
        )
        return effects.Publish(topics.announcement(row.id), self.signer.seal(announcement), retain=True)

    def _refused(self, now: float, device: str, name: str, what: str) -> Iterator[Effect]:
        """At most one line per device and name in REFUSED_SECONDS: a flood must not fill the disk."""
        if now < self.refused.get((device, name), 0.0) + REFUSED_SECONDS:
            return
        self.refused[device, name] = now
        yield Save(LedgerEntry(at=now, kind="refused", device=device, detail={"name": name, "what": what}))
        yield effects.Tell(f"{device}: {what}", name)

    # ------------------------------------------------------------ reports
    def _member_round(self, message: Report | Decline) -> RoundRow | None:
        """The round a member speaks of; None for one that was dropped from memory, or never was."""
        bloc = self.blocs.get((message.campaign, message.bloc))
        if bloc is None or message.device not in bloc.members:
            raise ProtocolError(
                "not-a-member", "not a member of that bloc", field="device", value=message.device
            )
        row = self.rounds.get(message.transcript)
        return row if row is not None and _bloc_of(row) == (message.campaign, message.bloc) else None

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
        row = self._member_round(report)
        if row is None:
            yield from self._forgotten(now, report)
            return
        if row.state != "open":
            yield effects.Publish(topics.commands(report.device), row.result)
            return
        known = aggregation.digest_in(row, report.device)
        key = (row.transcript, report.device)
        started = self.incoming.get(key)
        if (known or (started.digest if started else report.digest)) != report.digest:
            yield from self._quarantine(now, report)
            return
        if known is None and started is None:
            if report.size != aggregation.body_size(row):
                raise ProtocolError("oversize", "report has the wrong size", field="size", value=report.size)
            started = self.incoming[key] = Incoming(report.size, report.digest)
        bitmap = started.bitmap if started is not None else b""
        yield self._receipt(report.device, row.transcript, report.digest, bitmap, accepted=known is not None)

    def _quarantine(self, now: float, report: Report) -> Iterator[Effect]:
        """Two different reports under one transcript: a two-time pad or an attack. Nothing more from this device."""
        yield self._save(
            msgspec.structs.replace(self._device(report.device), quarantined="changed its report")
        )
        yield from self._refused(now, report.device, "changed-report", "offered a second, different report")
        yield self._receipt(report.device, report.transcript, report.digest, b"", refused="changed-report")

    def _chunk(self, now: float, device: str, payload: bytes) -> Iterator[Effect]:
        header, body = decode_frame(payload)
        incoming = self.incoming.get((header.transcript, device))
        row = self.rounds.get(header.transcript)
        if incoming is None or row is None or header.digest != incoming.digest:
            return  # late, or from before a restart: the offer that follows sorts it out
        incoming.add(header.index, body)
        if incoming.whole:
            yield from self._whole_report(now, device, row, incoming)
        elif len(incoming.have) % RECEIPT_EVERY == 0:
            yield self._receipt(device, row.transcript, incoming.digest, incoming.bitmap)

    def _whole_report(self, now: float, device: str, row: RoundRow, incoming: Incoming) -> Iterator[Effect]:
        del self.incoming[row.transcript, device]
        row = aggregation.add_report(row, device, incoming.body())
        yield self._save(row)
        yield Save(
            LedgerEntry(
                at=now, kind="report", campaign=row.campaign, bloc=row.bloc, device=device, round=row.round
            )
        )
        yield self._receipt(device, row.transcript, incoming.digest, incoming.bitmap, accepted=True)
        if not aggregation.missing(row):
            yield from self._open_sum(now, row)

    def _receipt(
        self,
        device: str,
        transcript: bytes,
        digest: bytes,
        have: bytes,
        *,
        accepted: bool = False,
        refused: str = "",
    ) -> effects.Publish:
        receipt = Receipt(transcript=transcript, digest=digest, have=have, accepted=accepted, refused=refused)
        return effects.Publish(topics.receipts(device), self.signer.seal(receipt))

    # ------------------------------------------------------------ the end of a round
    def _open_sum(self, now: float, row: RoundRow) -> Iterator[Effect]:
        campaign, bloc = self.campaigns[row.campaign], self.blocs[row.campaign, row.bloc]
        try:
            opened = aggregation.open_sum(row, campaign.numbers)
        except ProtocolError as error:
            # The same step would wrap again: the next OPEN starts from public bounds, at 16 bits.
            yield self._save(msgspec.structs.replace(campaign, spread=0.0))
            yield from self._sit_out(now, row, error.name)
            return
        share = aggregation.share(self._devices_in_blocs(campaign.id), self._staleness(campaign, row))
        data = aggregation.apply(self.read_adapter(campaign.adapter), opened, share)
        ref = BlobRef(hashlib.sha256(data).digest(), len(data))
        yield effects.StoreBlob(ref, data)
        bloc = msgspec.structs.replace(bloc, opened=bloc.opened + 1)
        yield self._save(bloc)
        done = all(other.opened >= campaign.rounds for other in self._blocs_of(campaign.id))
        campaign = msgspec.structs.replace(
            campaign,
            adapter=ref,
            adapter_version=campaign.adapter_version + 1,
            sequence=self._next_sequence(),
            spread=opened.spread or campaign.spread,
            mean_norm=opened.mean_norm or campaign.mean_norm,
            closed=done,
        )
        yield self._save(campaign)
        yield from self._close_round(now, row, opened.summary())
        yield self._announce(campaign)
        yield from self._say_result(row)
        if done:
            yield Save(LedgerEntry(at=now, kind="closed", campaign=campaign.id))
            self.ready = {key: said for key, said in self.ready.items() if key[0] != campaign.id}
            yield from self._announce_others()

    def _announce_others(self) -> Iterator[Effect]:
        """Running campaigns, under newer numbers: devices that were bound to the closed one may join them now."""
        for campaign in [campaign for campaign in self.campaigns.values() if not campaign.closed]:
            renewed = msgspec.structs.replace(campaign, sequence=self._next_sequence())
            yield self._save(renewed)
            yield self._announce(renewed)

    def _next_sequence(self) -> int:
        return 1 + max((known.sequence for known in self.campaigns.values()), default=0)

    def _blocs_of(self, campaign: str) -> list[BlocRow]:
        return [bloc for bloc in self.blocs.values() if bloc.campaign == campaign]

    def _devices_in_blocs(self, campaign: str) -> int:
        return sum(len(bloc.members) for bloc in self._blocs_of(campaign))

    def _staleness(self, campaign: CampaignRow, row: RoundRow) -> int:
        """Versions since the bloc's model beyond one of every other bloc, which is what running side by side means."""
        return max(0, campaign.adapter_version - row.base_version - (len(self._blocs_of(campaign.id)) - 1))

    def _decline(self, now: float, decline: Decline) -> Iterator[Effect]:
        row = self._member_round(decline)
        if row is None:
            yield from self._forgotten(now, decline)
        elif row.state == "open":
            yield from self._sit_out(now, row, f"{decline.device}: {decline.reason}"[: limits.NAME_CHARS_MAX])
        else:
            yield effects.Publish(topics.commands(decline.device), row.result)

    def _sit_out(self, now: float, row: RoundRow, reason: str) -> Iterator[Effect]:
        yield from self._close_round(now, row, {"reason": reason}, reason)
        yield from self._say_result(row)

    def _close_round(
        self, now: float, row: RoundRow, detail: dict[str, float | int | str], reason: str = ""
    ) -> Iterator[Effect]:
        result = Result(
            campaign=row.campaign,
            bloc=row.bloc,
            round=row.round,
            transcript=row.transcript,
            opened=not reason,
            reason=reason,
        )
        state = "sat-out" if reason else "opened"
        yield self._save(msgspec.structs.replace(row, state=state, sum=b"", result=self.signer.seal(result)))
        yield Save(
            LedgerEntry(
                at=now, kind=state, campaign=row.campaign, bloc=row.bloc, round=row.round, detail=detail
            )
        )
        self.repeated.pop(row.transcript, None)
        for key in [key for key in self.incoming if key[0] == row.transcript]:
            del self.incoming[key]

    def _say_result(self, row: RoundRow) -> Iterator[Effect]:
        for member in self.blocs[row.campaign, row.bloc].members:
            yield effects.Publish(topics.commands(member), self.rounds[row.transcript].result)


def _bloc_of(row: RoundRow) -> tuple[str, str]:
    return row.campaign, row.bloc
