"""Faults of a fleet of real processes: which strikes when follows from a seed, and moments are counted, not timed.

A strike comes after so many reports of the whole fleet and a short delay, so the same seed strikes the same devices at
the same point of the campaign on a slow machine and on a fast one. Nothing here looks into a process: signals, file
limits and lines are all it has, and all that the world has.
"""

from __future__ import annotations

import difflib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from fedge.errors import UsageError
from firmware_sim.processes.fleet import HUB, LocalFleet
from firmware_sim.world.streams import Stream
from hub.effects import LedgerEntry

_DELAY_SECONDS: Final = 3.0  # a strike comes up to so long after its report
_COUNT_MAX: Final = 10_000
_THROTTLED: Final = 2_000.0  # bytes a second


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: after `after` reports and `delay` seconds, for `seconds`. `device` is empty where none is meant."""

    after: int
    delay: float
    fault: str
    device: str
    seconds: float


class ProcessFaults:
    """Carries strikes out on a running fleet. Call `look` with every new part of the ledger, `end` before it stops."""

    def __init__(self, fleet: LocalFleet, strikes: Iterable[Strike]) -> None:
        self.fleet = fleet
        self.counts: Counter[str] = Counter()  # faults that struck
        self._waiting = sorted(strikes, key=lambda strike: strike.after)
        self._due: list[tuple[float, Strike]] = []
        self._lasting: list[tuple[float, Strike]] = []
        self._reports = 0

    @property
    def left(self) -> int:
        """How many have not struck yet."""
        return len(self._waiting) + len(self._due)

    def look(self, entries: Iterable[LedgerEntry]) -> list[Strike]:
        """Strikes what is due and ends what is over; what struck now."""
        now = time.monotonic()
        self._reports += sum(entry.kind == "report" for entry in entries)
        while self._waiting and self._waiting[0].after <= self._reports:
            strike = self._waiting.pop(0)
            self._due.append((now + strike.delay, strike))
        for until, strike in [pair for pair in self._lasting if pair[0] <= now]:
            self._lasting.remove((until, strike))
            self._over(strike)
        struck = [strike for at, strike in self._due if at <= now and self.strike(strike)]
        self._due = [pair for pair in self._due if pair[1] not in struck]
        return struck

    def strike(self, strike: Strike) -> bool:
        """Strikes now. False when there is nothing to strike at the moment: no worker runs, no line is open."""
        fault = FAULTS[strike.fault]
        if fault.end is not None and any(other.device == strike.device for _, other in self._lasting):
            return False  # one lasting trouble of a device at a time: the end of one would end the other
        if not fault.begin(self.fleet, strike.device):
            return False
        self.counts[strike.fault] += 1
        if fault.end is not None:
            self._lasting.append((time.monotonic() + strike.seconds, strike))
        return True

    def end(self) -> None:
        """Ends what still lasts."""
        for _, strike in self._lasting:
            self._over(strike)
        self._lasting.clear()

    def _over(self, strike: Strike) -> None:
        end = FAULTS[strike.fault].end
        assert end is not None
        end(self.fleet, strike.device)


def draw_strikes(
    wanted: Mapping[str, int],
    devices: Sequence[str],
    reports: int,
    seed: int,
    delay_seconds: float = _DELAY_SECONDS,
) -> list[Strike]:
    """So many strikes of each fault, on drawn devices, over a campaign of `reports` reports.

    A strike is drawn from its name and number alone: asking for one more moves none of the others.
    """
    strikes = []
    for name, count in wanted.items():
        fault = FAULTS[name]
        for number in range(count):
            stream = Stream(seed, name, number, "strike")
            strikes.append(
                Strike(
                    after=1 + stream.integer(max(1, reports - 1)),
                    delay=stream.uniform(0.0, delay_seconds),
                    fault=name,
                    device=stream.pick(devices) if fault.of_device else "",
                    seconds=stream.uniform(*fault.seconds),
                )
            )
    return strikes


def parse_faults(text: str) -> dict[str, int]:
    """`kill-agent=2,link-cut=1` as a table; a name alone means once. Raises UsageError with the nearest name."""
    wanted: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        if name not in FAULTS:
            near = difflib.get_close_matches(name, FAULTS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(
                "no such fault", field="faults", value=name, hint=f"{hint}There are {', '.join(FAULTS)}"
            )
        if not (number or "1").isdecimal() or not 1 <= int(number or 1) <= _COUNT_MAX:
            raise UsageError(
                "how often must be a number", field=name, value=number, hint=f"1 to {_COUNT_MAX}: {name}=2"
            )
        wanted[name] = wanted.get(name, 0) + int(number or 1)
    return wanted


def needs_lines(wanted: Iterable[str]) -> bool:
    """Whether a fault among these is one of the line."""
    return any(name.startswith("link-") for name in wanted)


# ---------------------------------------------------------------- what each does
def _kill(name: str) -> Callable[[LocalFleet, str], bool]:
    def begin(fleet: LocalFleet, device: str) -> bool:
        child = fleet.supervisor.children[name or device]
        if alive := child.running:
            fleet.supervisor.kill(child.name)
        return alive

    return begin


def _kill_worker(fleet: LocalFleet, device: str) -> bool:
    workers = fleet.supervisor.children[device].family()[1:]
    for worker in workers:
        worker.kill()
    return bool(workers)


def _signal_broker(number: signal.Signals) -> Callable[[LocalFleet, str], bool]:
    def begin(fleet: LocalFleet, _device: str) -> bool:
        brokers = _brokers(fleet)
        for broker in brokers:
            os.kill(broker.pid, number)
        return bool(brokers)

    return begin


def _brokers(fleet: LocalFleet) -> list[psutil.Process]:
    """The hub's mosquitto; none where the broker is part of the hub, and none while it starts again."""
    family = fleet.supervisor.children[HUB].family()
    return [process for process in family[1:] if process.name() == "mosquitto"]


def _freeze(fleet: LocalFleet, device: str) -> bool:
    fleet.supervisor.freeze(device)
    return fleet.supervisor.children[device].running


def _fill_disk(fleet: LocalFleet, device: str) -> bool:
    fleet.supervisor.fill_disk(device)
    return fleet.supervisor.children[device].running


def _cut(fleet: LocalFleet, device: str) -> bool:
    return fleet.shaper is not None and fleet.shaper.cut(device) > 0


def _change_line(**changes: object) -> Callable[[LocalFleet, str], bool]:
    def begin(fleet: LocalFleet, device: str) -> bool:
        if fleet.shaper is not None:
            fleet.shaper.change(device, **changes)
        return fleet.shaper is not None

    return begin


def _mend_line(fleet: LocalFleet, device: str) -> None:
    if fleet.shaper is not None and fleet.line is not None:
        fleet.shaper.set(device, fleet.line)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a fault does (`begin` says whether it could) and how it ends, if it lasts: `seconds`, from and to."""

    about: str
    begin: Callable[[LocalFleet, str], bool]
    end: Callable[[LocalFleet, str], None] | None = None
    seconds: tuple[float, float] = (0.0, 0.0)
    of_device: bool = True


FAULTS: Final[dict[str, Fault]] = {
    "kill-agent": Fault("an agent is killed (SIGKILL) and started again", _kill("")),
    "kill-worker": Fault("a device's training process is killed, as when memory is short", _kill_worker),
    "kill-hub": Fault("the hub is killed, its broker with it", _kill(HUB), of_device=False),
    "kill-broker": Fault(
        "the broker is killed: what it did not save is forgotten",
        _signal_broker(signal.SIGKILL),
        of_device=False,
    ),
    "restart-broker": Fault(
        "the broker ends cleanly and starts again", _signal_broker(signal.SIGTERM), of_device=False
    ),
    "freeze-agent": Fault(
        "an agent stands still (SIGSTOP), its connection open",
        _freeze,
        lambda fleet, device: fleet.supervisor.thaw(device),
        (5.0, 20.0),
    ),
    "full-disk": Fault(
        "no file of a device may grow",
        _fill_disk,
        lambda fleet, device: fleet.supervisor.free_disk(device),
        (5.0, 20.0),
    ),
    "link-cut": Fault("a device's connections are reset", _cut),
    "link-down": Fault(
        "a device's line is gone, and it knows", _change_line(carries="refused"), _mend_line, (5.0, 30.0)
    ),
    "link-hole": Fault(
        "a device's line swallows everything and nobody is told",
        _change_line(carries="nothing"),
        _mend_line,
        (5.0, 60.0),
    ),
    "link-throttle": Fault(
        "a device's line carries 2 kB a second",
        _change_line(up=_THROTTLED, down=_THROTTLED, latency=0.5),
        _mend_line,
        (10.0, 40.0),
    ),
}
