"""What a trace may hold: limits and order, checked before a number is believed."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError
from firmware_sim.parts.hours import DAY
from firmware_sim.parts.link import Series, series_of
from firmware_sim.parts.presence import Sessions
from firmware_sim.traces import flash

POINTS_MAX: Final = 20_000_000  # intervals, or samples, of one file
SECONDS_MAX: Final = 10 * 366 * DAY
MBPS_MAX: Final = 1_000_000.0
KBPS_MAX: Final = 1_000 * MBPS_MAX
MS_MAX: Final = 1e6
CELSIUS_MAX: Final = 200.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Capacity:
    """FedScale's two numbers about a device."""

    ms_per_sample: float
    kbit: float


@dataclass(frozen=True, slots=True, eq=False)
class HeatRun:
    """One board under changing load: `load[i]`, 0 … 1, was measured over the time before `seconds[i]`."""

    board: str
    name: str
    seconds: Floats
    load: Floats
    celsius: Floats


def bad(path: Path, what: str, *, field: str = "", value: object = None, hint: str = "") -> DataError:
    """The error of a trace file."""
    return DataError(
        f"{path.name}: {what}", field=field or "file", value=str(path) if value is None else value, hint=hint
    )


def number(path: Path, field: str, value: float, most: float, least: float = 0.0) -> float:
    """`value`, finite and within its bounds."""
    if not least <= value <= most:
        raise bad(path, f"a number must be from {least:g} to {most:g}", field=field, value=value)
    return value


def sessions(path: Path, field: str, period: float, pairs: Sequence[tuple[float, float]]) -> Sessions:
    """Ordered intervals inside the period. Empty ones are left out, touching ones joined; overlap is refused."""
    number(path, f"{field}: period", period, SECONDS_MAX, 1.0)
    starts, ends = array("d"), array("d")
    for index, (start, end) in enumerate(pairs):
        where = f"{field}[{index}]"
        if not 0.0 <= start <= end <= period:
            raise bad(
                path,
                f"an interval must lie within 0 and {period:g}, its end not first",
                field=where,
                value=(start, end),
            )
        if ends and start < ends[-1]:
            hint = "sort the intervals of a device and join those that overlap"
            raise bad(
                path,
                f"an interval begins before {ends[-1]:g}, where the last one ends",
                field=where,
                value=(start, end),
                hint=hint,
            )
        if start == end:
            continue
        if ends and start == ends[-1]:
            ends[-1] = end
        else:
            starts.append(start)
            ends.append(end)
    if not starts:
        raise bad(
            path, "a device that is never on is no device of a fleet", field=field, value=list(pairs)[:3]
        )
    return Sessions(period, starts, ends)


def phone(path: Path, name: str, messages: str | Sequence[str]) -> Sessions | None:
    """The times at which a phone of FLASH may train; None when there are none, as with many of them."""
    lines = (messages if isinstance(messages, str) else "\n".join(messages)).splitlines()
    events = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            events.append(flash.parse(line))
        except ValueError as error:
            raise bad(
                path,
                f"a line reads `date time<TAB>event`: {error}",
                field=f"{name}.messages[{index}]",
                value=line[:80],
            ) from error
    if not events:
        return None
    events.sort(key=lambda event: event[0])
    first = events[0][0] // DAY * DAY  # midnight: hours of the day stay what they are
    period = max(DAY, math.ceil((events[-1][0] - first) / DAY) * DAY)
    pairs = [(a - first, b - first) for a, b in flash.trainable(events) if b > a]
    return sessions(path, f"{name}.messages", period, pairs) if pairs else None


def capacity(path: Path, name: str, ms_per_sample: float, kbit: float) -> Capacity:
    return Capacity(
        number(path, f"{name}: ms per sample", ms_per_sample, MS_MAX, 1e-6),
        number(path, f"{name}: kbit/s", kbit, KBPS_MAX, 1e-3),
    )


def series(path: Path, name: str, t: Floats, mbps: Floats) -> Series:
    """A rate over ascending times, not zero throughout."""
    for field, values, most in (("t", t, SECONDS_MAX * 1e3), ("mbps", mbps, MBPS_MAX)):
        wrong = np.flatnonzero(~((values >= 0.0) & (values <= most)))
        if wrong.size:
            at = int(wrong[0])
            raise bad(
                path,
                f"a number must be from 0 to {most:g}",
                field=f"{name}: {field}[{at}]",
                value=float(values[at]),
            )
    back = np.flatnonzero(np.diff(t) <= 0.0)
    if back.size:
        at = int(back[0]) + 1
        raise bad(path, "times must ascend", field=f"{name}: t[{at}]", value=float(t[at]))
    if not mbps.any():
        raise bad(path, "a link that is never up is no link", field=f"{name}: mbps", value=0.0)
    return series_of(t, mbps, f"{path.stem}/{name}")


def packed_series(
    path: Path, t: NDArray[np.generic], mbps: NDArray[np.generic], offsets: NDArray[np.generic]
) -> tuple[Series, ...]:
    """Many series in two arrays; series i lies from offsets[i] to offsets[i + 1]."""
    for field, values in (("t", t), ("mbps", mbps), ("offsets", offsets)):
        if values.ndim != 1 or values.dtype.kind not in "fiu":
            raise bad(
                path,
                "an array must be a row of plain numbers",
                field=field,
                value=f"{values.dtype}{values.shape}",
            )
    if t.size != mbps.size or not 0 < t.size <= POINTS_MAX:
        raise bad(
            path,
            f"`t` and `mbps` must be equally long, 1 to {POINTS_MAX:,}",
            field="mbps",
            value=f"{t.size} and {mbps.size}",
        )
    cuts = offsets.astype(np.int64)
    if cuts.size < 2 or cuts[0] != 0 or cuts[-1] != t.size or (np.diff(cuts) <= 0).any():
        raise bad(path, f"offsets must ascend from 0 to {t.size}", field="offsets", value=cuts[:5].tolist())
    times, rates = t.astype(np.float64), mbps.astype(np.float64)
    return tuple(series(path, str(n), times[a:b], rates[a:b]) for n, (a, b) in enumerate(pairwise(cuts)))


def heat_run(path: Path, board: str, name: str, samples: Floats) -> HeatRun:
    """Samples (seconds, load 0 … 1, degrees Celsius)."""
    seconds, load, celsius = samples.T
    for field, values, least, most in (
        ("t_s", seconds, 0.0, SECONDS_MAX),
        ("load_pct", load, 0.0, 1.0),
        ("temp_c", celsius, -60.0, CELSIUS_MAX),
    ):
        wrong = np.flatnonzero(~((values >= least) & (values <= most)))
        if wrong.size:
            at = int(wrong[0])
            raise bad(
                path,
                f"a number must be from {least:g} to {most:g}",
                field=f"{board}/{name}: {field}[{at}]",
                value=float(values[at]),
            )
    if (np.diff(seconds) < 0.0).any():
        raise bad(path, "times must ascend", field=f"{board}/{name}: t_s", value=float(seconds[0]))
    return HeatRun(board, name, seconds, load, celsius)


class Rows:
    """The rows of a CSV file, counted against the limit and each aware of its line."""

    def __init__(self, path: Path, rows: Iterable[Mapping[str, str | None]]) -> None:
        self._path, self._rows = path, rows

    def __iter__(self) -> Iterator[Row]:
        for count, row in enumerate(self._rows):
            if count >= POINTS_MAX:
                raise bad(self._path, "this has too many rows", field="rows", value=f"over {POINTS_MAX:,}")
            yield Row(self._path, count + 2, row)


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `line` is its line in the file where no value spans two."""

    path: Path
    line: int
    values: Mapping[str, str | None]

    def text(self, column: str) -> str:
        return (self.values.get(column) or "").strip()

    def number(self, column: str) -> float:
        try:
            value = float(self.text(column))
        except ValueError as error:
            raise self._wrong(column) from error
        if not math.isfinite(value):
            raise self._wrong(column)
        return value

    def _wrong(self, column: str) -> DataError:
        return bad(
            self.path,
            "this is no finite number",
            field=f"line {self.line}: {column}",
            value=self.text(column),
        )
