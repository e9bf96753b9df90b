"""`world.json`: what a run of the world found out, in one typed shape. Figures that were not measured are null.

A loss that left the finite numbers is null in the file, because JSON has no NaN, and NaN in memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from fedge.errors import DataError, NoInputError
from fedge.io import durable


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts."""


class ClassFigures(_Part, frozen=True):
    """The devices of one board class. Means are over its devices."""

    devices: int
    in_blocs: int
    served: int  # devices with at least one opened round
    rounds_mean: float  # opened rounds
    energy_kj_mean: float  # spent on training and sending, beyond idling
    upload_mb_mean: float
    download_mb_mean: float
    hottest_celsius: float
    throttled_hours: float  # all devices together
    on_hours_mean: float


class Rounds(_Part, frozen=True):
    """What became of the rounds of single blocs, and of the devices' finished updates."""

    tried: int
    opened: int
    sat_out: int
    updates_started: int
    updates_finished: int
    updates_opened: int
    yield_: float | None = msgspec.field(name="yield", default=None)  # opened / finished updates
    drop: float | None = None  # trainings that were begun and not finished / begun
    waste: float | None = None  # energy of work that was never opened / all energy of work
    jain: float | None = None  # of opened rounds over all devices (Jain 1984)
    never_served: float | None = None  # share of all devices
    seconds_median: float | None = None  # of an opened round, OPEN to RESULT


class Point(_Part, frozen=True):
    """One evaluation of the adapter: hours since the start, energy spent by then, and the task's own figures."""

    hour: float
    energy_kj: float
    version: int
    figures: dict[str, float]  # "loss" is always there


class Breaker(_Part, frozen=True):
    """A device that its bloc waited for, alone."""

    device: str
    board: str
    bloc: str
    hours: float


class Strip(_Part, frozen=True):
    """The time-lapse: for each of some devices one row of letters, one letter for each span of time.

    `.` off, `i` on without work, `w` READY and waiting, `l` loading, `t` training, `s` sealing or sending,
    `a` awaiting the result, `n` not allowed by its owner or board, `h` throttled while training, `x` gone for good.
    """

    seconds: float  # of a column
    devices: list[str]
    boards: list[str]
    rows: list[str]
    opened: list[int]  # sums opened in each column, whole fleet
    blocs: list[str] = []  # the bloc of each device at the end; "" = none


class Violation(_Part, frozen=True):
    """An invariant that did not hold."""

    invariant: str
    event: int
    at: float
    text: str


class WorldResult(_Part, frozen=True):
    """One run. `crc` is over all events: the same seed gives the same, on any machine."""

    fedge: str
    scenario: str
    about: str
    devices: int
    days: float
    seed: int
    crypto: str
    task: str
    traces: str  # what presence and links were drawn from
    crc: str
    events: int
    cpu_seconds: float
    wall_seconds: float
    bytes_per_device: float
    blocs: int
    devices_in_blocs: int
    formations: int
    adapter_version: int
    classes: dict[str, ClassFigures]
    rounds: Rounds
    loss: list[Point]
    funnel: dict[str, int]  # in order: devices, joined, ready once, in a bloc, trained once, served once
    why_not_hours: dict[str, float]  # device-hours, by reason
    breakers: list[Breaker]  # the worst, most first
    starving_hours: float
    faults: dict[str, int]
    refusals: dict[str, int]  # by name, devices and hub
    violations: list[Violation]
    judged: int = 0  # how often a rule was applied that must hold; 0 = none was watched
    notes: list[str] = []  # what a reader must know beside the figures
    strip: Strip | None = None


def encode_world(result: WorldResult) -> bytes:
    """Strict JSON, indented, ending with a newline."""
    return msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n"


def decode_world(data: bytes, where: str = "world.json") -> WorldResult:
    """The result in strict JSON `data`; `where` is its name in errors. Raises DataError."""
    try:
        values: Any = msgspec.json.decode(data)
        for point in values.get("loss", ()):
            point["figures"] = {
                name: math.nan if value is None else value for name, value in point["figures"].items()
            }
        return msgspec.convert(values, WorldResult)
    except (msgspec.MsgspecError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not the result of a world: {error}", field="result") from error


def write_world(result: WorldResult, path: Path) -> None:
    """Write `result` to `path`, whole or not at all. Raises StorageError."""
    durable.write_bytes(path, encode_world(result))


def read_world(path: Path) -> WorldResult:
    """The result in the file `path`, or in `world.json` of the folder `path`. Raises NoInputError, DataError."""
    file = path / "world.json" if path.is_dir() else path
    try:
        return decode_world(file.read_bytes(), str(file))
    except OSError as error:
        raise NoInputError(f"cannot read {file}: {error.strerror}", field="path", value=str(path)) from error
