"""Recorded fleets: when devices were on, how fast their links were, how warm boards became (`--traces PATH`).

PATH is a file, or a folder whose trace files are all read. A value outside the limits, or one that is not what its
file says, ends the reading with the file, the field and the value: a fleet is never made of half a trace. Nothing is
unpickled. Shapes: `firmware_sim.traces.formats`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedge.errors import DataError, NoInputError
from firmware_sim.parts.link import Series, constant
from firmware_sim.parts.presence import Sessions
from firmware_sim.traces.checks import Capacity, HeatRun
from firmware_sim.traces.formats import Read, read

FILES_MAX: Final = 2_000  # of one folder
DEVICES_MAX: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Traces:
    """What was recorded. `presences` and `series` need not be of the same devices."""

    name: str
    presences: tuple[Sessions, ...] = ()
    series: tuple[Series, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    heat: tuple[HeatRun, ...] = ()
    _constant: tuple[Series, ...] = field(default=(), repr=False)

    def sessions(self, index: int) -> Sessions | None:
        """Device `index`, counted round and round; None when no presence was recorded."""
        return self.presences[index % len(self.presences)] if self.presences else None

    def bandwidth(self, index: int) -> Series | None:
        """Series `index`, round and round; without series the constant rates of the capacities; else None."""
        chosen = self.series or self._constant
        return chosen[index % len(chosen)] if chosen else None


def load(path: Path) -> Traces:
    """Everything in `path`. NoInputError, or DataError with file, field and value."""
    if not path.exists():
        raise NoInputError(
            "there are no traces", field="--traces", value=str(path), hint="name a file or a folder"
        )
    parts = [(each, found) for each in _files(path) if (found := read(each)) is not None]
    if not parts:
        raise DataError(
            f"{path} holds no trace",
            field="--traces",
            value=str(path),
            hint="intervals: JSON, or CSV with device,start,end; rates: npz, or CSV with t,mbps",
        )
    return _joined(path, parts)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith("."))
    if len(found) > FILES_MAX:
        raise DataError(f"{path} holds more than {FILES_MAX} files", field="--traces", value=len(found))
    return found


def _joined(path: Path, parts: Iterable[tuple[Path, Read]]) -> Traces:
    presences: list[Sessions] = []
    series: list[Series] = []
    capacities: list[Capacity] = []
    heat: list[HeatRun] = []
    names = []
    for each, found in parts:
        names.append(each.name)
        presences += found.presences
        series += found.series
        capacities += found.capacities
        heat += found.heat
    for what, count in (
        ("devices", len(presences)),
        ("series", len(series)),
        ("capacities", len(capacities)),
    ):
        if count > DEVICES_MAX:
            raise DataError(f"{path} holds more than {DEVICES_MAX} {what}", field=what, value=count)
    return Traces(
        ", ".join(names),
        tuple(presences),
        tuple(series),
        tuple(capacities),
        tuple(heat),
        tuple(constant(each.kbit) for each in capacities),
    )
