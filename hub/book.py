"""What a hub knows: the rows that survive a kill, and the indexes beside them that make every message cheap.

Whatever a message asks is found by key or was counted when it changed; nothing walks over all devices, blocs or
rounds. A device costs one `Contact` and one place in an index beside its own READY and its bloc's card. What is not in
a row (who is here, half-received reports) devices say again to a new process.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, Final, TypeVar

import msgspec

from fedge import formation
from fedge.frames import Incoming
from fedge.identity import Signer, Verifier
from fedge.messages import BlobRef, Open, Ready, decode, decode_envelope
from fedge.secagg.bloc import BlocSum
from hub import effects, scheduler
from hub.effects import BlocRow, CampaignRow, DeviceRow, Effect, LedgerEntry, RoundRow, Save

REFUSED_SECONDS: Final = 60.0
_BOARDS_MAX: Final = 1_000
_SLOT_SECONDS: Final = 60.0  # how finely silence is noticed
T = TypeVar("T")


class Contact:
    """What was heard last from one device. A bloc counts it while `counted`; `why` says why not."""

    __slots__ = (
        "blocs",
        "board",
        "boot",
        "campaign",
        "counted",
        "counter",
        "device",
        "envelope",
        "heard_at",
        "here",
        "row",
        "spent",
        "training",
        "watched",
        "why",
    )

    def __init__(self, device: str) -> None:
        self.device = device
        self.boot = -1  # the newest that its presence named
        self.here = False  # its presence says up, and it was heard lately
        self.heard_at = 0.0
        self.watched = False  # in the book's list of whose silence is noticed
        self.campaign: CampaignState | None = None  # that of the newest READY
        self.envelope = b""  # the READY that waits for a round; empty when it has none
        self.counter = -1  # of that READY
        self.why = ""  # why that READY does not count (hub.scheduler.why_not)
        self.counted = False
        self.training = False  # in an open round, here, and its report is not in
        self.spent = b""  # the prekey of the last OPEN: a READY that has it is of the past
        self.board = ""
        self.blocs: tuple[BlocState, ...] = ()  # one of each campaign that it is a member in
        self.row: DeviceRow | None = None

    def bloc_in(self, campaign: CampaignState) -> BlocState | None:
        """Its bloc in a campaign."""
        for bloc in self.blocs:
            if bloc.campaign is campaign:
                return bloc
        return None


class RoundState:
    """The newest round of a bloc. `row` is kept without the bytes that `total` has decoded or nobody needs any more."""

    __slots__ = ("bloc", "incoming", "repeats", "row", "total")

    def __init__(self, row: RoundRow, bloc: BlocState) -> None:
        self.row, self.bloc = row, bloc
        self.incoming: dict[str, Incoming] = {}
        self.repeats = 0
        self.total = BlocSum.from_bytes(row.sum) if row.state == "open" else None
        self.keep(row)

    def keep(self, row: RoundRow) -> None:
        """Remembers a newer state of the round, lean."""
        ended = row.state != "open"
        self.row = msgspec.structs.replace(row, sum=b"", envelope=b"" if ended else row.envelope)
        if ended:
            self.total = None
            self.incoming = {}

    @property
    def open(self) -> bool:
        return self.total is not None

    @property
    def missing(self) -> tuple[str, ...]:
        """Members whose report is not in; none once the round has ended."""
        return self.total.missing if self.total is not None else ()


class BlocState:
    """One bloc: its row, its newest round, and how many of its members are READY and here."""

    __slots__ = (
        "blocked_by",
        "blocked_since",
        "campaign",
        "current",
        "fading",
        "live",
        "queued",
        "ready",
        "row",
        "tie",
    )

    def __init__(self, row: BlocRow, campaign: CampaignState) -> None:
        self.row, self.campaign = row, campaign
        self.tie = scheduler.place(campaign.beacon(row.formation), row.id)
        self.current: RoundState | None = None
        self.ready = 0
        self.live, self.fading = False, False  # `fading`: the agenda looks at it when its last sum is old
        self.queued = ""  # where it waits for its turn: "", "rest", "quota" or "room"
        self.blocked_by = ""  # the one member that it waits for
        self.blocked_since = 0.0

    @property
    def whole(self) -> bool:
        return self.ready == len(self.row.members)

    @property
    def running(self) -> bool:
        return self.current is not None and self.current.open

    @property
    def done(self) -> bool:
        return self.row.opened >= self.campaign.row.rounds

    @property
    def rested_at(self) -> float:
        """When it may be opened again, Unix seconds."""
        row = self.row
        return (
            row.ended_at + scheduler.rest(self.campaign.row.rest_seconds, row.sat_out)
            if row.ended_at
            else 0.0
        )


class CampaignState:
    """One campaign: its row and the sums over its blocs and devices."""

    __slots__ = (
        "announced_at",
        "announced_version",
        "beacons",
        "blocs",
        "commitment",
        "done",
        "forms_at",
        "held",
        "live",
        "newcomers",
        "opened",
        "row",
        "running",
        "training",
        "waiting",
    )

    def __init__(self, row: CampaignRow) -> None:
        self.row = row
        self.commitment = formation.beacon_commitment(row.beacon_secret)
        self.beacons: dict[int, bytes] = {}  # by formation
        self.blocs: dict[str, BlocState] = {}
        self.newcomers: dict[str, Contact] = {}  # READY, here, and in no bloc
        self.forms_at = 0.0  # when newcomers may be formed again
        self.opened = 0  # sums, over all blocs
        self.done = 0  # blocs with all their rounds
        self.live = 0  # unfinished blocs that are whole, running, or were opened lately
        self.running = 0  # open rounds
        self.training = 0
        self.waiting: list[tuple[tuple[float, bytes], str]] = []  # whole blocs in their order
        self.held: list[tuple[float, str]] = []  # blocs over their quota, by the mean that frees them
        self.announced_at = 0.0
        self.announced_version = row.adapter_version

    def beacon(self, number: int) -> bytes:
        """The beacon of a formation."""
        if number not in self.beacons:
            self.beacons[number] = formation.beacon_of(self.row.beacon_secret, number)
        return self.beacons[number]

    @property
    def mean_opened(self) -> float:
        return self.opened / len(self.blocs) if self.blocs else 0.0

    @property
    def places(self) -> dict[str, BlocState]:
        """The bloc of each device, worked out anew: for reports and checks."""
        return {member: bloc for bloc in self.blocs.values() for member in bloc.row.members}

    def over(self, now: float) -> bool:
        """Whether its time is up: nothing more is opened."""
        return 0 < self.row.seconds_max <= now - self.row.started_at


class Book:
    """Rows and indexes. The machine's other parts stand on it."""

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
        self.epoch, self.sequence, self.started_at = 0, 0, 0.0
        self.campaigns: dict[str, CampaignState] = {}
        self.rounds: dict[bytes, RoundState] = {}  # the newest of each bloc
        self.contacts: dict[str, Contact] = {}
        self.refused: dict[tuple[str, str], float] = {}  # (device, name) of refusals -> when it was told
        self._refused_order: deque[tuple[float, tuple[str, str]]] = deque()
        self.here = 0  # devices that are here
        self._agenda: list[tuple[float, int, Callable[[float, Any], Iterator[Effect]], Any]] = []
        self._serial = count()
        self._boards: dict[str, str] = {}
        self._slots: dict[int, list[Contact]] = {}  # whose silence is looked at when
        self._looked_until = -1.0  # slots before this have been looked at
        self._load(list(rows))

    # ------------------------------------------------------------ rows
    def _load(self, rows: list[effects.Row]) -> None:
        """Campaigns before blocs before rounds, whatever the order of the rows; of the rounds only the newest."""
        for kind in (CampaignRow, DeviceRow, BlocRow):
            for row in rows:
                if isinstance(row, kind):
                    self._keep(row)
        newest: dict[tuple[str, str], RoundRow] = {}
        for row in rows:
            if isinstance(row, RoundRow):
                known = newest.get((row.campaign, row.bloc))
                if known is None or known.round < row.round:
                    newest[row.campaign, row.bloc] = row
        for row in newest.values():
            self._keep_round(row)
            for ready in roster(row.envelope):
                self._contact(ready.device).spent = ready.prekey

    def _keep(self, row: effects.Row) -> None:
        match row:
            case CampaignRow():
                self._keep_campaign(row)
            case BlocRow():
                self._keep_bloc(row)
            case RoundRow():
                self._keep_round(row)
            case DeviceRow():
                self._contact(row.id).row = row
            case LedgerEntry():
                pass  # the ledger is for people; no decision reads it

    def _keep_campaign(self, row: CampaignRow) -> None:
        self.sequence = max(self.sequence, row.sequence)
        known = self.campaigns.get(row.id)
        if known is None:
            self.campaigns[row.id] = CampaignState(row)
        else:
            known.row = row

    def _keep_bloc(self, row: BlocRow) -> None:
        campaign = self.campaigns[row.campaign]
        known = campaign.blocs.get(row.id)
        if known is None:
            known = campaign.blocs[row.id] = BlocState(row, campaign)
            campaign.opened += row.opened
            campaign.done += known.done
            campaign.forms_at = max(campaign.forms_at, row.formed_at + campaign.row.form_seconds)
            alone = (known,)  # one tuple for all members that are in no other bloc
            for member in row.members:
                contact = self._contact(member)
                contact.blocs = (*contact.blocs, known) if contact.blocs else alone
            return
        was = known.done
        campaign.opened += row.opened - known.row.opened
        known.row = row
        campaign.done += known.done - was

    def _keep_round(self, row: RoundRow) -> None:
        """Only a bloc's newest round: until a member has heard its end it says no READY, so no later one opens."""
        bloc = self.campaigns[row.campaign].blocs[row.bloc]
        known = bloc.current
        if known is not None and known.row.transcript == row.transcript:
            was = known.open
            known.keep(row)
            bloc.campaign.running -= was and not known.open
            return
        if known is not None:
            del self.rounds[known.row.transcript]
        bloc.current = self.rounds[row.transcript] = RoundState(row, bloc)
        bloc.campaign.running += bloc.current.open

    def _save(self, row: effects.Row) -> Save:
        self._keep(row)
        return Save(row)

    def device(self, device: str) -> DeviceRow:
        """What is known of a device for good."""
        known = self.contacts.get(device)
        return known.row if known is not None and known.row is not None else DeviceRow(id=device)

    def _contact(self, device: str) -> Contact:
        found = self.contacts.get(device)
        if found is None:
            found = self.contacts[device] = Contact(device)
        return found

    def _next_sequence(self) -> int:
        return self.sequence + 1

    def board(self, name: str) -> str:
        """One string for all boards of a name; not of more names than there are boards."""
        return self._boards.setdefault(name, name) if len(self._boards) < _BOARDS_MAX else name

    # ------------------------------------------------------------ time
    def _at(self, when: float, act: Callable[[float, T], Iterator[Effect]], what: T) -> None:
        """Calls `act(now, what)` at the first tick after `when`."""
        heapq.heappush(self._agenda, (when, next(self._serial), act, what))

    def _due(self, now: float) -> Iterator[Effect]:
        while self._agenda and self._agenda[0][0] <= now:
            _, _, act, what = heapq.heappop(self._agenda)
            yield from act(now, what)

    def _watch(self, contact: Contact) -> None:
        """Its silence is noticed: a waiting device is here only while it says so now and then."""
        if not contact.watched:
            contact.watched = True
            self._slots.setdefault(int(self._silent_at(contact) // _SLOT_SECONDS), []).append(contact)

    def _silent_at(self, contact: Contact) -> float:
        every = contact.campaign.row.checkin_seconds if contact.campaign else scheduler.CHECKIN_SECONDS
        return contact.heard_at + scheduler.PRESENT_CHECKINS * every

    def _fallen_silent(self, now: float) -> list[Contact]:
        """The waiting devices that were not heard for too long, once each."""
        found: list[Contact] = []
        over = now // _SLOT_SECONDS  # the first slot that is not; of most ticks, that of the tick before
        if over == self._looked_until:
            return found
        self._looked_until = over
        for slot in sorted(slot for slot in self._slots if slot < over):
            for contact in self._slots.pop(slot):
                contact.watched = False
                if contact.envelope and contact.here:
                    if self._silent_at(contact) <= now:
                        found.append(contact)
                    else:
                        self._watch(contact)
        return found

    # ------------------------------------------------------------ refusals
    def _refused(self, now: float, device: str, name: str, what: str) -> Iterator[Effect]:
        """At most one line per device and name in `REFUSED_SECONDS`: a flood must not fill the disk."""
        key = device, name
        if now < self.refused.get(key, -REFUSED_SECONDS) + REFUSED_SECONDS:
            return
        self.refused[key] = now
        self._refused_order.append((now, key))
        yield Save(LedgerEntry(at=now, kind="refused", device=device, detail={"name": name, "what": what}))
        yield effects.Tell(f"{device}: {what}", name)

    def _forget_refusals(self, now: float) -> None:
        while self._refused_order and now >= self._refused_order[0][0] + REFUSED_SECONDS:
            at, key = self._refused_order.popleft()
            if self.refused.get(key) == at:
                del self.refused[key]


def roster(envelope: bytes) -> list[Ready]:
    """The READYs in an OPEN's envelope."""
    opening = decode(decode_envelope(envelope).body, Open)
    return [decode(decode_envelope(said).body, Ready) for said in opening.roster]
