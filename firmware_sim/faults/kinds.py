"""The ways in which a world goes wrong: one literal table, and what those that strike at once do to the world.

Of the faults named in the plan one is missing: bad updates of the device's software, because there are none yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from fedge.identity import Signer
from firmware_sim.world.streams import Stream

HUB: Final = -1
DAY: Final = 86_400.0

Unit = Literal["device", "fleet"]


class Surface(Protocol):
    """What faults may do to a world (firmware_sim.world)."""

    now: float

    @property
    def hub_signer(self) -> Signer: ...
    def at(self, seconds: float, action: Callable[[Surface], None]) -> None: ...
    def power_cut(self, number: int) -> None: ...
    def power_on(self, number: int) -> None: ...
    def power_off(self, number: int, seconds: float) -> None: ...
    def partition(self, numbers: Sequence[int], seconds: float) -> None: ...
    def crash_hub(self, seconds: float) -> None: ...
    def restart_broker(self, seconds: float, with_memory: bool) -> None: ...
    def set_clock_offset(self, number: int, seconds: float) -> None: ...
    def fill_disk(self, number: int, seconds: float) -> None: ...
    def set_metered(self, number: int, metered: bool) -> None: ...
    def heat(self, number: int, celsius: float, seconds: float) -> None: ...
    def slow(self, number: int, factor: float) -> None: ...


Strike = Callable[[Surface, int, Stream, int], None]  # world, whom, draws, devices


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One way of going wrong. `strike` acts at once; a fault without one waits for what it can hit next."""

    name: str
    what: str
    unit: Unit = "device"
    strike: Strike | None = None


# ---------------------------------------------------------------- what strikes at once
def _for_a_while(world: Surface, seconds: float, action: Callable[[Surface], None]) -> None:
    world.at(world.now + seconds, action)


def _power_cut(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.power_cut(number)
    _for_a_while(world, draw.lognormal(60.0, 1.0), lambda world: world.power_on(number))


def _clock_jump(world: Surface, number: int, draw: Stream, devices: int) -> None:
    """Back to the first hours of 1970, as a board without a clock chip after a cut, or days ahead; NTP heals it."""
    ahead = draw.uniform(1.0, 400.0) * DAY
    world.set_clock_offset(number, ahead if draw.chance(0.5) else -1_800_000_000.0)
    _for_a_while(world, draw.lognormal(600.0, 1.0), lambda world: world.set_clock_offset(number, 0.0))


def _partition(world: Surface, number: int, draw: Stream, devices: int) -> None:
    share = draw.uniform(0.05, 0.5)
    cut = [number for number in range(devices) if draw.chance(share)]
    world.partition(cut, draw.lognormal(300.0, 1.0))


def _metered(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.set_metered(number, True)
    _for_a_while(world, draw.lognormal(1_800.0, 1.0), lambda world: world.set_metered(number, False))


def _slow(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.slow(number, draw.lognormal(10.0, 1.0))
    _for_a_while(world, draw.lognormal(1_800.0, 1.0), lambda world: world.slow(number, 1.0))


def _disk_full(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.fill_disk(number, draw.lognormal(1_800.0, 1.0))


def _thermal_trip(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.heat(number, draw.uniform(40.0, 70.0), draw.lognormal(1_200.0, 0.5))


def _battery_empty(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.power_off(number, draw.lognormal(3_600.0, 0.5))


def _hub_crash(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.crash_hub(draw.lognormal(20.0, 1.0))


def _broker_restart(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.restart_broker(draw.lognormal(10.0, 1.0), with_memory=True)


def _broker_amnesia(world: Surface, number: int, draw: Stream, devices: int) -> None:
    world.restart_broker(draw.lognormal(10.0, 1.0), with_memory=False)


_KINDS: Final = (
    FaultKind("loss", "a few messages within half a minute are lost after the broker took them"),
    FaultKind("duplicate", "a message arrives a second time, seconds to minutes later"),
    FaultKind("reorder", "a message arrives after later ones"),
    FaultKind("stale-metadata", "an old announcement or an earlier OPEN is delivered again"),
    FaultKind("forged-metadata", "an OPEN, RESULT or announcement with a broken or a foreign signature"),
    FaultKind("forged-report", "a chunk or a device's message is altered on its way to the hub"),
    FaultKind("second-open", "the hub signs a second, different OPEN while a round is open"),
    FaultKind("bit-flip", "one bit of a download is wrong"),
    FaultKind("power-cut", "off in the middle of anything, back after about a minute", strike=_power_cut),
    FaultKind("power-cut-at-save", "power fails before, during (torn) or after the next write of the state"),
    FaultKind("disk-full", "no write succeeds for about half an hour", strike=_disk_full),
    FaultKind(
        "clock-jump", "the clock says 1970, or up to a year ahead, until NTP comes", strike=_clock_jump
    ),
    FaultKind("thermal-trip", "40 to 70 degrees hotter for about 20 minutes", strike=_thermal_trip),
    FaultKind("battery-empty", "off without warning for about an hour", strike=_battery_empty),
    FaultKind("metered-flip", "the link says metered for about half an hour", strike=_metered),
    FaultKind("slow-device", "works and sends about ten times slower for half an hour", strike=_slow),
    FaultKind("partition", "5 to 50 % of the devices lose the broker for minutes", "fleet", _partition),
    FaultKind("broker-restart", "the broker restarts and still knows its sessions", "fleet", _broker_restart),
    FaultKind("broker-amnesia", "the broker restarts and has forgotten everything", "fleet", _broker_amnesia),
    FaultKind("hub-crash", "the hub dies in the middle of anything and starts again", "fleet", _hub_crash),
    FaultKind("hub-crash-at-save", "the hub dies before, during or after its next transaction", "fleet"),
)
FAULTS: Final[dict[str, FaultKind]] = {kind.name: kind for kind in _KINDS}
