"""What each device of a fleet is made of: a function of (scenario, seed, number) alone.

Device n is the same in a fleet of any size. Which group and board it belongs to comes from a golden-ratio sequence
instead of independent draws: every prefix of the fleet then holds nearly the shares that the scenario asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, overload

from edge_agent.policy import Policy
from fedge.errors import ConfigError
from firmware_sim.parts.battery import Battery
from firmware_sim.parts.board import BoardClass, board
from firmware_sim.parts.fitted import ENCLOSURES
from firmware_sim.parts.hours import local_hour
from firmware_sim.parts.link import Link, Series
from firmware_sim.parts.owner import policy_of
from firmware_sim.parts.presence import Presence, Sessions, presence
from firmware_sim.parts.thermal import Thermal, ambient_celsius
from firmware_sim.scenario import Group, Scenario
from firmware_sim.world.streams import Stream

SPEED_SPREAD: Final = 0.15  # sigma of the logarithm between boards of one class
CHARGE_MIN: Final = 0.4  # at the world's start, up to 1
SAMPLES_MAX: Final = 100_000
_GOLDEN: Final = 0.6180339887498949


class TraceSource(Protocol):
    """What firmware_sim.traces.recorded.Traces offers. Any `index` is a device: they are counted round and round."""

    @property
    def name(self) -> str: ...

    def sessions(self, index: int) -> Sessions | None:
        """Period and on-intervals of one device; None when the traces have none."""

    def bandwidth(self, index: int) -> Series | None:
        """A measured rate; None when the traces have none."""


@dataclass(slots=True, eq=False)
class DeviceParts:
    """One device. `speed` is a factor: 1.1 works a tenth faster than its board class says."""

    number: int
    group: Group
    board: BoardClass
    speed: float
    thermal: Thermal
    battery: Battery
    link: Link
    presence: Presence
    policy: Policy
    time_zone: int  # hours east of UTC
    samples: int

    @property
    def tokens_per_second(self) -> float:
        return self.board.tokens_per_second * self.speed

    def local_hour(self, now: float) -> float:
        return local_hour(now, self.time_zone)

    def ambient(self, now: float) -> float:
        """Air around the board, in degrees Celsius."""
        return ambient_celsius(*self.group.ambient_celsius, self.local_hour(now))


class Draw(Sequence[DeviceParts]):
    """The fleet, drawn when asked for. The parts have a state: each access makes them anew, so keep what you take."""

    def __init__(self, scenario: Scenario, devices: int, seed: int, traces: TraceSource | None) -> None:
        self._devices, self._seed, self._traces = devices, seed, traces
        self._kinds = [_kind(group, traces) for group in scenario.groups]
        self._shares = [group.share for group in scenario.groups]
        self._shift = Stream(seed, "groups").uniform()

    def __len__(self) -> int:
        return self._devices

    @overload
    def __getitem__(self, number: int) -> DeviceParts: ...
    @overload
    def __getitem__(self, number: slice) -> list[DeviceParts]: ...
    def __getitem__(self, number: int | slice) -> DeviceParts | list[DeviceParts]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(self._devices))]
        if not 0 <= number < self._devices:
            raise IndexError(number)
        at = (self._shift + number * _GOLDEN) % 1.0
        index, at = _part(self._shares, at)
        kind = self._kinds[index]
        return self._device(number, kind, kind.boards[_part(kind.weights, at)[0]])

    def _device(self, number: int, kind: _Kind, made: BoardClass) -> DeviceParts:
        group, power, stream = kind.group, kind.group.power, Stream(self._seed, number, "draw")
        zone = stream.integer(group.presence.time_zones)
        speed = stream.lognormal(1.0, SPEED_SPREAD)
        samples = stream.lognormal(math.exp(group.samples[0]), group.samples[1])
        charge = stream.uniform(CHARGE_MIN, 1.0)
        wh, panel_watts = stream.uniform(*power.battery_wh), stream.uniform(*power.panel_watts)
        sessions, series = self._replayed(group, stream)
        return DeviceParts(
            number=number,
            group=group,
            board=made,
            speed=speed,
            thermal=thermal(made, group.enclosure, ambient_celsius(*group.ambient_celsius, zone)),
            battery=kind.mains or Battery(power, wh, panel_watts, charge),
            link=Link(group.link.kind, Stream(self._seed, number, "link"), group.link.loss, series),
            presence=presence(group.presence, Stream(self._seed, number, "presence"), zone, sessions),
            policy=kind.policy,
            time_zone=zone,
            samples=max(1, min(SAMPLES_MAX, round(samples))),
        )

    def _replayed(self, group: Group, stream: Stream) -> tuple[Sessions | None, Series | None]:
        """What a device of this group replays, one draw for each kind."""
        traces = self._traces
        one, other = stream.word(), stream.word()
        sessions = series = None
        if traces is not None and group.presence.kind == "trace":
            sessions = traces.sessions(one)
        if traces is not None and group.link.kind == "trace":
            series = traces.bandwidth(other)
        return sessions, series


def draw(scenario: Scenario, devices: int, seed: int, traces: TraceSource | None = None) -> Draw:
    """The parts of a fleet. ConfigError names a board, trace or owner's setting that cannot be."""
    return Draw(scenario, devices, seed, traces)


def thermal(made: BoardClass, enclosure: str, ambient: float) -> Thermal:
    """The heat of one board in an enclosure, at rest in `ambient`."""
    idle, rise = _heat(made, enclosure)
    return Thermal(made.heat_seconds, rise, made.throttle_celsius, idle, ambient)


@cache
def _heat(made: BoardClass, enclosure: str) -> tuple[float, float]:
    """Kelvin above the air, idle and by full load: the same two objects for all devices of a kind."""
    return made.idle_kelvin * ENCLOSURES[enclosure], made.load_kelvin * ENCLOSURES[enclosure]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the devices of one group share."""

    group: Group
    boards: tuple[BoardClass, ...]
    weights: tuple[float, ...]
    policy: Policy
    mains: Battery | None  # one for all: on mains it is always full, and so has no state


def _kind(group: Group, traces: TraceSource | None) -> _Kind:
    for field, kind, there in (
        ("presence.kind", group.presence.kind, traces is not None and traces.sessions(0) is not None),
        ("link.kind", group.link.kind, traces is not None and traces.bandwidth(0) is not None),
    ):
        if kind == "trace" and not there:
            raise ConfigError(
                f"group {group.name!r} replays traces, and there are none of this sort",
                field=field,
                value=kind,
                hint="add --traces PATH, or choose another kind",
            )
    boards = tuple(board(name) for name in group.boards)
    mains = Battery(group.power, 1.0, 0.0, 1.0) if group.power.kind == "mains" else None
    return _Kind(group, boards, tuple(group.boards.values()), policy_of(group.owner), mains)


def _part(weights: Sequence[float], at: float) -> tuple[int, float]:
    """Which weight `at` (0 … 1) falls into, and where in it, 0 … 1 again."""
    at *= sum(weights)
    for index, weight in enumerate(weights):
        if at < weight:
            return index, at / weight
        at -= weight
    return len(weights) - 1, 0.0
