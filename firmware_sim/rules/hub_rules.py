"""What must hold of a hub: by the rows it made durable and by what it said, never by what it believes.

Only whole blocs of one partition are opened, from the very reports that their members hold; every update is in one
opened sum at most; the adapter is the exact fold of the opened sums; a report that was acknowledged is in the rows.
The sums are worked out a second time from what the devices were about to mask, without masks and without the hub.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np

from fedge.limits import BLOC_DEVICES_MIN
from fedge.messages import Open, Receipt, decode, decode_envelope
from fedge.secagg.bloc import BlocSum
from fedge.secagg.ring import Words, add_words
from fedge.topics import device_of
from fedge.update import codec as coding
from fedge.update.metadata import unpack
from fedge.update.rotation import Vector
from firmware_sim.faults.tampering import tag
from firmware_sim.rules.device_rules import DeviceRules, Fail
from hub import effects
from hub.effects import BlocRow, CampaignRow, DeviceRow, RoundRow

# A round may last this much longer than its window: ticks, and a hub that restarts.
LEASE_SECONDS: Final = 600.0
_FOLD_TOLERANCE: Final = 1e-6  # of the largest number: the order of float operations is free, nothing else is

Sent = Callable[[str, bytes], Vector | None]  # what a device was about to mask under a transcript


@dataclass(slots=True)
class CampaignMemory:
    """What was seen of one campaign."""

    row: CampaignRow
    adapter: Vector  # the exact fold so far
    blocs: dict[str, BlocRow] = field(default_factory=dict)
    partition: dict[str, str] = field(default_factory=dict)  # device -> its bloc
    opened: list[RoundRow] = field(
        default_factory=list
    )  # opened in this transaction, no new adapter seen yet
    versions: list[tuple[CampaignRow, CampaignRow]] = field(default_factory=list)  # and the other way round


class HubRules:
    """The rules over all campaigns. `sent` and `blob` look into the world."""

    def __init__(
        self,
        fail: Fail,
        devices: Callable[[], DeviceRules],
        *,
        sent: Sent,
        blob: Callable[[bytes], bytes],
        exact_every: int,
    ) -> None:
        self._fail, self._devices = fail, devices
        self._sent, self._blob, self._exact_every = sent, blob, exact_every
        self.campaigns: dict[str, CampaignMemory] = {}
        self.rounds: dict[bytes, RoundRow] = {}  # as last saved while open
        self.ended: dict[bytes, tuple[str, str]] = {}  # transcript -> campaign, "opened" or "sat-out"
        self.counters: dict[str, int] = {}
        self.counted: dict[str, set[bytes]] = {}  # device -> updates that are in an opened sum
        self.looked = Counter[str]()  # how often each rule had something to judge
        self._judges: dict[type, Callable[[Any], None]] = {
            CampaignRow: self._campaign,
            BlocRow: self._bloc,
            RoundRow: self._round,
            DeviceRow: self._device,
        }

    def fate(self, transcript: bytes) -> str:
        """What is durably known of a round; empty for none, and when its campaign is over."""
        campaign, fate = self.ended.get(transcript, ("", "open" if transcript in self.rounds else ""))
        return "" if campaign and self.campaigns[campaign].row.closed and fate == "sat-out" else fate

    def carried_out(self, effect: object) -> None:
        """Judges one effect of the hub, after it was carried out."""
        if isinstance(effect, effects.Save):
            judge = self._judges.get(type(effect.row))
            if judge is not None:
                judge(effect.row)
        elif isinstance(effect, effects.Publish):
            self._between()
            if effect.topic.endswith("/dn/ack") and tag(effect.payload) == "receipt":
                receipt = decode(decode_envelope(effect.payload).body, Receipt)
                self._receipt(device_of(effect.topic), receipt)

    def _device(self, row: DeviceRow) -> None:
        if row.counter < self.counters.get(row.id, -1):
            self._fail("goes-back", f"the hub's READY counter of {row.id} went back to {row.counter}")
        self.counters[row.id] = row.counter

    # ------------------------------------------------------------ campaigns and blocs
    def _campaign(self, row: CampaignRow) -> None:
        known = self.campaigns.get(row.id)
        if known is None:
            first = np.frombuffer(self._blob(row.adapter.sha256), "<f4").copy()
            self.campaigns[row.id] = CampaignMemory(row, first)
            return
        old, known.row = known.row, row
        if (
            row.sequence < old.sequence
            or row.adapter_version < old.adapter_version
            or row.closed < old.closed
        ):
            self._fail("goes-back", f"campaign {row.id}: sequence, version or end")
        if row.adapter_version != old.adapter_version:
            known.versions.append((old, row))
            self._fold(known)
        elif row.adapter != old.adapter:
            self._fail("fold", f"campaign {row.id} changed its adapter without a sum")

    def _bloc(self, row: BlocRow) -> None:
        known = self.campaigns[row.campaign]
        old = known.blocs.get(row.id)
        known.blocs[row.id] = row
        if old is not None:
            if row.members != old.members:
                self._fail("partition", f"{row.id} changed its members")
            if row.round < old.round or row.opened < old.opened:
                self._fail("goes-back", f"{row.id}: round or opened count")
            return
        for member in row.members:
            if known.partition.setdefault(member, row.id) != row.id:
                self._fail("partition", f"{member} is in {known.partition[member]} and in {row.id}")
        if len(row.members) < BLOC_DEVICES_MIN:
            self._fail("leverage", f"{row.id} has {len(row.members)} members")

    # ------------------------------------------------------------ rounds
    def _round(self, row: RoundRow) -> None:
        if row.transcript in self.ended:
            if self.ended[row.transcript][1] != row.state:
                self._fail("round-ends-once", f"round {row.round} of {row.bloc} was over and is {row.state}")
            return
        before = self.rounds.get(row.transcript)
        if row.state == "open":
            if before is not None and not _reports(before.sum).keys() <= _reports(row.sum).keys():
                self._fail("lost-report", f"a report left the running sum of {row.bloc}")
            self.rounds[row.transcript] = row
            return
        self.ended[row.transcript] = row.campaign, row.state
        self.rounds.pop(row.transcript, None)
        self.looked[row.state] += 1
        if row.state == "opened":
            if before is None:
                self._fail("whole-blocs", f"round {row.round} of {row.bloc} was opened and never open")
            self._opened(before)

    def _opened(self, row: RoundRow) -> None:
        """`row` is the round's last before it was opened: with the whole sum."""
        known = self.campaigns[row.campaign]
        total, members = BlocSum.from_bytes(row.sum), known.blocs[row.bloc].members
        if total.members != members or not total.whole:
            self._fail("whole-blocs", f"{row.bloc} was opened without {total.missing or members}")
        memories = self._devices()
        for member in members:
            memory = memories.memory(member)
            if (memory.transcript, memory.state.report) != (row.transcript, total.digest_of(member)):
                self._fail("whole-blocs", f"{row.bloc} was opened with a report that is not {member}'s")
            counted = self.counted.setdefault(member, set())
            parts = memory.parts.get(row.transcript, frozenset())
            if not counted.isdisjoint(parts):
                self._fail("counted-twice", f"an update of {member} is in two opened sums")
            counted |= parts
        if int.from_bytes(row.transcript[:4], "big") % self._exact_every == 0:
            self._exact(row, total)
        known.opened.append(row)
        self._fold(known)

    def _exact(self, row: RoundRow, total: BlocSum) -> None:
        """The opened words are the sum of the members' own words before any mask, mod 2^b, to the last bit."""
        self.looked["exact"] += 1
        expected: Words | None = None
        for member in total.members:
            sent, recipe = self._sent(member, row.transcript), self._devices().memory(member).recipes
            if sent is None or row.transcript not in recipe:
                self._fail("lost-work", f"{member} does not hold what it sent in an open round")
            words = coding.encode(sent, *recipe[row.transcript]).words
            if expected is None:
                expected = words
            else:
                add_words(expected, words)
        if expected is None or not np.array_equal(total.open()[0], expected):
            self._fail("exact-sum", f"the opened sum of {row.bloc} is not the sum of its members' words")

    # ------------------------------------------------------------ the adapter
    def _fold(self, known: CampaignMemory) -> None:
        """Pairs each opened sum with the version that it made, in whichever order the transaction has them."""
        while known.opened and known.versions:
            row, (before, campaign) = known.opened.pop(0), known.versions.pop(0)
            self.looked["fold"] += 1
            total, codec = BlocSum.from_bytes(row.sum), decode(decode_envelope(row.envelope).body, Open).codec
            words, metadata = total.open()
            figures = unpack(metadata, len(total.members))
            if figures.contributors:
                update = coding.decode(words, codec, campaign.numbers)
                factor = fold_factor(before, len(known.blocs), row, len(total.members), figures.steps)
                known.adapter = known.adapter + update * np.float32(factor)
            adapter = np.frombuffer(self._blob(campaign.adapter.sha256), "<f4")
            reach = _FOLD_TOLERANCE * float(np.abs(known.adapter).max(initial=1e-30))
            if not np.allclose(adapter, known.adapter, rtol=0, atol=reach):
                self._fail("fold", f"version {campaign.adapter_version} is not the fold of the opened sums")
            known.adapter = adapter.copy()

    def _between(self) -> None:
        """Between two transactions every opened sum has made its version."""
        for known in self.campaigns.values():
            if known.opened or known.versions:
                self._fail(
                    "fold", f"half a transaction: {known.row.id} has a sum without a version, or the reverse"
                )

    # ------------------------------------------------------------ what the hub has promised
    def _receipt(self, device: str, receipt: Receipt) -> None:
        if not receipt.accepted:
            return
        self.looked["accepted"] += 1
        row = self.rounds.get(receipt.transcript)
        if row is None:
            if receipt.transcript not in self.ended:
                self._fail("acknowledged", f"{device}'s report was accepted for a round that is not durable")
        elif _reports(row.sum).get(device) != receipt.digest:
            self._fail("acknowledged", f"{device}'s report was accepted and is not in the durable sum")

    def overdue(self, unix: float) -> RoundRow | None:
        """A round that is open long after its window."""
        for row in self.rounds.values():
            window = self.campaigns[row.campaign].row.window_seconds
            if unix > row.opened_at + window + LEASE_SECONDS:
                return row
        return None


def fold_factor(campaign: CampaignRow, blocs: int, row: RoundRow, members: int, steps: int) -> float:
    """What an opened sum is multiplied with (ADR 6), written a second time. `campaign` is as before the sum."""
    together = max(1, min(blocs, campaign.training_devices_max // members or blocs))
    late = max(0, campaign.adapter_version - row.base_version - (together - 1))
    factor = min(1.0, campaign.server_rate / together) / members / math.sqrt(1 + late)
    if campaign.normalise_steps and campaign.mean_steps and steps:
        factor *= min(2.0, max(0.5, campaign.mean_steps * members / steps))
    return factor


class _Reports(msgspec.Struct, array_like=True):
    h: bytes
    members: tuple[str, ...]
    layout: msgspec.Raw
    digests: dict[str, bytes]


_reports_decoder: Final = msgspec.msgpack.Decoder(_Reports)


@lru_cache(maxsize=256)
def _reports(row_sum: bytes) -> dict[str, bytes]:
    """The members whose reports are in a stored sum, and the SHA-256 of each; not to be changed."""
    return _reports_decoder.decode(row_sum).digests
