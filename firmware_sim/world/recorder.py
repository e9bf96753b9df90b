"""What a world finds out: counted as it happens in one array for each figure, and told as a WorldResult at the end.

Work is a device's energy beyond idling for training and sending. It counts as well spent when the round that it was
for is opened, and as wasted when it was interrupted or the bloc sat out, carried or not (research/blocs.md, 2).
"""

from __future__ import annotations

import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from edge_agent.effects import AgentState
from edge_agent.round import Phase
from fedge import __version__
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.world import outcome
from firmware_sim.world.clock import SAMPLE
from firmware_sim.world.devices import EMPTY, FORCED, GONE
from firmware_sim.world.standins import HUB
from firmware_sim.world.timeline import COLUMNS, Timeline
from firmware_sim.world.work import RADIO_WATTS
from hub.effects import BlocRow, CampaignRow, DeviceRow, LedgerEntry

if TYPE_CHECKING:
    from firmware_sim.world.devices import Device
    from firmware_sim.world.world import World

EVALUATE_SECONDS: Final = 300.0  # at most so often, and only when the adapter is another one
SAMPLED_DEVICES_MAX: Final = 1_000
SAMPLES: Final = 96  # looks at why devices do not work, over the run
BREAKERS: Final = 50
_MEGA: Final = 1e6
_KILO: Final = 1e3


class Recorder:
    """Everything that is counted. Arrays are by device number."""

    def __init__(self, world: World) -> None:
        self.world = world
        devices = len(world.devices)

        def zeros(kind: str) -> array[Any]:
            return array(kind, bytes(array(kind).itemsize * devices))

        self.up_bytes, self.down_bytes, self._bytes_before = zeros("Q"), zeros("Q"), zeros("Q")
        self._work, self._open_work, self._on = zeros("f"), zeros("f"), zeros("d")  # joules, joules, seconds
        self._throttled, self._hottest = zeros("f"), zeros("f")
        self.joined, self._ready, self._in_bloc = zeros("b"), zeros("b"), zeros("b")
        self._trained, self._served = zeros("I"), zeros("I")
        self.started = self.finished = self.opened_updates = 0
        self.work = self.good_work = 0.0
        self.refusals: Counter[str] = Counter()
        self.ledger: Counter[str] = Counter()
        self._bloc_of = [""] * devices
        self._begun_rounds: dict[tuple[str, str, int], float] = {}
        self._round_seconds: list[float] = []
        self._formations: set[str] = set()
        self._loss: list[outcome.Point] = []
        self._evaluated = -EVALUATE_SECONDS
        self._version = -1
        self._starving_since: float | None = None
        self._starving = 0.0
        self._why_not: dict[str, float] = defaultdict(float)
        self._day = 0
        self._timeline = Timeline(world.devices, self._bloc_of)
        self._rows: dict[type, Callable[[Any], None]] = {
            CampaignRow: self._campaign,
            BlocRow: self._bloc,
            LedgerEntry: self._entry,
        }

    # ------------------------------------------------------------ devices
    def goes_off(self, device: Device) -> None:
        """It has had power until now."""
        self._on[device.number] += self.world.now - device.up_since

    def saved(self, device: Device, state: AgentState) -> None:
        """A state became durable."""
        if state.ready and not self._ready[device.number]:
            self._ready[device.number] = 1

    def sent(self, number: int, seconds: float) -> None:
        """A transfer took so long."""
        self._spend(number, RADIO_WATTS * seconds)

    def begun(self, device: Device) -> None:
        """A training begins."""
        self.started += 1

    def trained(self, device: Device, seconds: float, throttled: float, *, whole: bool) -> None:
        """A training is over, finished or not."""
        number, board = device.number, device.parts.board
        self._throttled[number] += throttled
        self._hottest[number] = max(self._hottest[number], device.parts.thermal.celsius)
        self._spend(number, (board.load_watts - board.idle_watts) * seconds)
        if whole:
            self.finished += 1
            self._trained[number] += 1
        else:
            self._open_work[number] = 0.0  # lost with the interruption

    def _spend(self, number: int, joules: float) -> None:
        self._work[number] += joules
        self._open_work[number] += joules
        self.work += joules

    def round_ended(self, device: Device, *, opened: bool) -> None:
        """A device has heard how its round ended."""
        if opened:
            self.good_work += self._open_work[device.number]
        self._open_work[device.number] = 0.0

    def bytes_today(self, number: int) -> int:
        """Up and down since midnight UTC."""
        day = int(self.world.now // DAY)
        if day != self._day:
            self._day = day
            for n in range(len(self._bytes_before)):
                self._bytes_before[n] = self.up_bytes[n] + self.down_bytes[n]
        return int(self.up_bytes[number] + self.down_bytes[number] - self._bytes_before[number])

    # ------------------------------------------------------------ the hub's rows
    def row(self, row: object) -> None:
        """A row of the hub became durable."""
        handler = self._rows.get(type(row))
        if handler is not None:
            handler(row)

    def _campaign(self, row: CampaignRow) -> None:
        now = self.world.now
        if row.starving and self._starving_since is None:
            self._starving_since = now
        elif not row.starving and self._starving_since is not None:
            self._starving += now - self._starving_since
            self._starving_since = None
        if row.adapter_version != self._version and now >= self._evaluated + EVALUATE_SECONDS:
            self.evaluate(row)

    def evaluate(self, row: CampaignRow) -> None:
        """The public figures of the newest adapter."""
        self._evaluated, self._version = self.world.now, row.adapter_version
        figures = self.world.task.evaluate(self.world.hub.blobs[row.adapter.sha256])
        hour, energy = self.world.now / HOUR, self.work / _KILO
        self._loss.append(
            outcome.Point(hour=hour, energy_kj=energy, version=row.adapter_version, figures=figures)
        )

    def _bloc(self, row: BlocRow) -> None:
        for member in row.members:
            number = int(member[1:])
            self._bloc_of[number] = row.id
            self._in_bloc[number] = 1

    def _entry(self, row: LedgerEntry) -> None:
        self.ledger[row.kind] += 1
        key = (row.campaign, row.bloc, row.round)
        if row.kind == "open":
            self._begun_rounds[key] = row.at
        elif row.kind == "sat-out":
            self._begun_rounds.pop(key, None)
        elif row.kind == "opened":
            self._opened(row, key)
        elif row.kind == "formed":
            self._formations.add(str(row.detail.get("formation", self.ledger["formed"])))
        elif row.kind == "refused":
            self.refusals[str(row.detail.get("name", ""))] += 0

    def _opened(self, row: LedgerEntry, key: tuple[str, str, int]) -> None:
        if key in self._begun_rounds:
            self._round_seconds.append(row.at - self._begun_rounds.pop(key))
        members = self.world.hub.store.blocs[row.campaign, row.bloc].members
        self.opened_updates += len(members)
        for member in members:
            self._served[int(member[1:])] += 1
        self._timeline.count_opened(self.world.now / (self.world.days * DAY))

    # ------------------------------------------------------------ samples
    def begin(self) -> None:
        """Asks for the looks at the fleet."""
        for kind, count in (("why", SAMPLES), ("strip", COLUMNS)):
            self.world.ask(self._span(count) / 2, HUB, SAMPLE, kind, 0)

    def _span(self, count: int) -> float:
        return self.world.days * DAY / count

    def sample(self, _number: int, kind: str, _generation: int, _sequence: int) -> None:
        """One look at the fleet."""
        if kind == "strip":
            self._timeline.look(bool(self.world.hub.store.blocs))
        else:
            self._ask_why()
        count = COLUMNS if kind == "strip" else SAMPLES
        self.world.ask(self.world.now + self._span(count), HUB, SAMPLE, kind, 0)

    def _every(self, most: int) -> list[Device]:
        devices = self.world.devices
        step = max(1, -(-len(devices) // most))
        return devices[::step]

    def _ask_why(self) -> None:
        chosen = self._every(SAMPLED_DEVICES_MAX)
        hours = self._span(SAMPLES) / HOUR * len(self.world.devices) / len(chosen)
        for device in chosen:
            self._why_not[self._why(device)] += hours

    def _why(self, device: Device) -> str:
        """Why a device does not train now; `training` when it does."""
        if device.off:
            gone, empty, forced = device.off & GONE, device.off & EMPTY, device.off & FORCED
            return "left" if gone else "battery empty" if empty else "cut off" if forced else "off"
        agent = device.agent
        if agent is None:
            return "starting"
        if agent.phase is Phase.OFFERED and device.told is not None and not device.told.allowed:
            return "owner or board"
        if not device.connected:
            return "no link"
        if agent.phase is Phase.OFFERED:
            return _plain(self.world.hub.why_not(device.number))
        return _WHY[agent.phase]

    # ------------------------------------------------------------ the result
    def result(self, cpu_seconds: float, wall_seconds: float, bytes_per_device: float) -> outcome.WorldResult:
        """Everything, at the end of the run."""
        world = self.world
        rows = world.hub.store.campaigns.values()
        for device in world.devices:
            if device.on:
                self._on[device.number] += world.now - device.up_since
                device.up_since = world.now
        for row in rows:
            if row.adapter_version != self._version:
                self.evaluate(row)
        starving = self._starving
        if self._starving_since is not None:
            starving += world.now - self._starving_since
        return outcome.WorldResult(
            fedge=__version__,
            scenario=world.scenario.name,
            about=world.scenario.about,
            devices=len(world.devices),
            days=world.days,
            seed=world.seed,
            crypto=world.identities.kind,
            task=world.task.name,
            traces=world.traces_name,
            crc=world.crc,
            events=world.events,
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            bytes_per_device=bytes_per_device,
            blocs=len(world.hub.store.blocs),
            devices_in_blocs=sum(self._in_bloc),
            formations=len(self._formations),
            adapter_version=max((row.adapter_version for row in rows), default=0),
            classes=self._classes(),
            rounds=self._rounds(),
            loss=self._loss,
            funnel=self._funnel(),
            why_not_hours=dict(sorted(self._why_not.items(), key=lambda item: -item[1])),
            breakers=self._breakers(),
            starving_hours=starving / HOUR,
            faults=dict(world.faults.counts) if world.faults is not None else {},
            refusals=dict(sorted(self.refusals.items())),
            violations=[],
            strip=self._timeline.strip(self._span(COLUMNS)),
        )

    def _classes(self) -> dict[str, outcome.ClassFigures]:
        members: dict[str, list[int]] = defaultdict(list)
        for device in self.world.devices:
            members[device.parts.board.name].append(device.number)
        return {name: self._figures(numbers) for name, numbers in sorted(members.items())}

    def _figures(self, numbers: list[int]) -> outcome.ClassFigures:
        def mean(values: array[Any], unit: float = 1.0) -> float:
            return float(sum(values[number] for number in numbers)) / unit / len(numbers)

        return outcome.ClassFigures(
            devices=len(numbers),
            in_blocs=sum(self._in_bloc[number] for number in numbers),
            served=sum(self._served[number] > 0 for number in numbers),
            rounds_mean=mean(self._served),
            energy_kj_mean=mean(self._work, _KILO),
            upload_mb_mean=mean(self.up_bytes, _MEGA),
            download_mb_mean=mean(self.down_bytes, _MEGA),
            hottest_celsius=max(self._hottest[number] for number in numbers),
            throttled_hours=sum(self._throttled[number] for number in numbers) / HOUR,
            on_hours_mean=mean(self._on, HOUR),
        )

    def _rounds(self) -> outcome.Rounds:
        served = self._served
        squares = sum(count * count for count in served)
        total = sum(served)
        return outcome.Rounds(
            tried=self.ledger["open"],
            opened=self.ledger["opened"],
            sat_out=self.ledger["sat-out"],
            updates_started=self.started,
            updates_finished=self.finished,
            updates_opened=self.opened_updates,
            yield_=min(1.0, self.opened_updates / self.finished) if self.finished else None,
            drop=(self.started - self.finished) / self.started if self.started else None,
            waste=1.0 - self.good_work / self.work if self.work else None,
            jain=total * total / (len(served) * squares) if squares else None,
            never_served=sum(count == 0 for count in served) / len(served),
            seconds_median=statistics.median(self._round_seconds) if self._round_seconds else None,
        )

    def _funnel(self) -> dict[str, int]:
        return {
            "devices": len(self.world.devices),
            "joined": sum(self.joined),
            "ready once": sum(self._ready),
            "in a bloc": sum(self._in_bloc),
            "trained once": sum(count > 0 for count in self._trained),
            "served once": sum(count > 0 for count in self._served),
        }

    def _breakers(self) -> list[outcome.Breaker]:
        rows = [row for row in self.world.hub.store.devices.values() if row.blocked_seconds]
        rows.sort(key=_blocked)
        return [
            outcome.Breaker(
                device=row.id,
                board=self.world.devices[int(row.id[1:])].parts.board.name,
                bloc=self._bloc_of[int(row.id[1:])],
                hours=row.blocked_seconds / HOUR,
            )
            for row in rows[:BREAKERS]
        ]


def _plain(why: str) -> str:
    """The hub's reason without names, so that hours add up."""
    if not why.startswith("waiting for "):
        return why or "not heard of"
    return "waits for members" if why.endswith(" members") else "waits for one member"


def _blocked(row: DeviceRow) -> tuple[float, str]:
    return -row.blocked_seconds, row.id


_WHY: Final[dict[Phase, str]] = {
    Phase.IDLE: "no campaign",
    Phase.FETCHING: "fetches the bundle",
    Phase.LOADING: "loads the adapter",
    Phase.TRAINING: "training",
    Phase.INTERRUPTED: "owner or board",
    Phase.SEALING: "seals or sends",
    Phase.SENDING: "seals or sends",
    Phase.AWAITING: "awaits its bloc",
    Phase.CLOSED: "campaign over",
}
