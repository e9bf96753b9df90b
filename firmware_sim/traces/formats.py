"""The shapes of trace files, each read into plain numbers or refused by name.

| file | shape | whose |
|---|---|---|
| .json, .json.gz | `[{"period_s": s, "sessions": [[from, to], …]}, …]` | ours |
| | `{"client": {"finish_time": s, "active": [from, …], "inactive": [to, …]}, …}` | FedScale, as JSON |
| | `{"client": {"messages": "2020-01-31 21:05:12\\tbattery_charged_on\\n…"}, …}` | FLASH |
| | `{"client": {"computation": ms, "communication": kbit/s}, …}` | FedScale, as JSON |
| .csv | `device,start,end` in seconds | ours |
| | `id,inference_ms_per_sample,kbps` | FedScale's capacities |
| | `t,mbps` or `series,t,mbps`: the rate from t on | ours |
| | `device,result,t_s,load_pct,temp_c` | sbc-bench samples |
| .npz | arrays `t`, `mbps` and, for many series, `offsets` | ours |
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Final, TypeVar

import msgspec
import numpy as np

from fedge.errors import StorageError
from firmware_sim.parts.hours import DAY
from firmware_sim.parts.link import Series
from firmware_sim.parts.presence import Sessions
from firmware_sim.traces import checks
from firmware_sim.traces.checks import Capacity, HeatRun, bad

FILE_BYTES_MAX: Final = 512_000_000  # on disk, and unpacked
_PICKLE: Final = b"\x80"  # first byte of every pickle since protocol 2


@dataclass(frozen=True, slots=True)
class Read:
    """What one file holds."""

    presences: tuple[Sessions, ...] = ()
    series: tuple[Series, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    heat: tuple[HeatRun, ...] = ()


def read(path: Path) -> Read | None:
    """The file's traces; None when it is of no shape of ours. DataError names file, field and value."""
    name = path.name.lower()
    if name.endswith((".json", ".json.gz")):
        return _json(path, _bytes(path))
    if name.endswith((".csv", ".csv.gz")):
        return _csv(path, _bytes(path))
    if name.endswith(".npz"):
        return _npz(path)
    if name.endswith((".pkl", ".pickle")) or _bytes(path, 1) == _PICKLE:
        raise bad(
            path,
            "this is a pickle, which can run code when it is read",
            hint="write it as JSON where it is from",
        )
    return None


def _bytes(path: Path, most: int = FILE_BYTES_MAX + 1) -> bytes:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            data: bytes = stream.read(most)
    except (gzip.BadGzipFile, EOFError) as error:
        raise bad(path, f"this is no whole gzip file: {error}", hint="copy it again") from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error}", hint="check the path and its permissions"
        ) from error
    if len(data) > FILE_BYTES_MAX:
        raise bad(
            path,
            "this is too large",
            field="bytes",
            value=f"over {FILE_BYTES_MAX:,}",
            hint="cut it into parts",
        )
    return data


# ---------------------------------------------------------------- JSON
class _Device(msgspec.Struct):
    period_s: float
    sessions: list[tuple[float, float]]
    id: int | str = ""


class _FedScale(msgspec.Struct):
    finish_time: float
    active: list[float]
    inactive: list[float]


class _Computation(msgspec.Struct):
    computation: float
    communication: float


class _Flash(msgspec.Struct):
    messages: str | list[str]


_Table = TypeVar("_Table")


def _json(path: Path, data: bytes) -> Read | None:
    top = _decoded(path, data, list[msgspec.Raw] | dict[str, msgspec.Raw])
    if not top:
        return None
    if isinstance(top, list):
        if not _keys(top[0]) >= {"period_s", "sessions"}:
            return None
        devices = _decoded(path, data, list[_Device])
        return Read(presences=tuple(_intervals(path, n, each) for n, each in enumerate(devices)))
    keys = _keys(next(iter(top.values())))
    if keys >= {"finish_time", "active", "inactive"}:
        shaped = _decoded(path, data, dict[str, _FedScale])
        return Read(presences=tuple(_fedscale(path, name, each) for name, each in shaped.items()))
    if keys >= {"computation", "communication"}:
        rows = _decoded(path, data, dict[str, _Computation])
        return Read(capacities=tuple(_capacity(path, name, each) for name, each in rows.items()))
    if "messages" in keys:
        logs = _decoded(path, data, dict[str, _Flash])
        phones = (checks.phone(path, name, each.messages) for name, each in logs.items())
        return Read(presences=tuple(each for each in phones if each is not None))
    return None


def _decoded(path: Path, data: bytes, kind: type[_Table] | UnionType) -> _Table:
    try:
        table: _Table = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        raise bad(path, f"a value is not what this trace holds: {what}", field=where.strip("`")) from error
    except msgspec.DecodeError as error:
        raise bad(path, f"this is no JSON: {error}") from error
    return table


def _keys(raw: msgspec.Raw) -> set[str]:
    try:
        return set(msgspec.json.decode(raw, type=dict[str, msgspec.Raw]))
    except msgspec.DecodeError:
        return set()


def _intervals(path: Path, number: int, device: _Device) -> Sessions:
    return checks.sessions(path, f"[{number}].sessions", device.period_s, device.sessions)


def _fedscale(path: Path, name: str, client: _FedScale) -> Sessions:
    if len(client.active) != len(client.inactive):
        counts = f"{len(client.active)} and {len(client.inactive)}"
        raise bad(path, "`active` and `inactive` must be equally long", field=name, value=counts)
    pairs = list(zip(client.active, client.inactive, strict=True))
    return checks.sessions(path, f"{name}.active", client.finish_time, pairs)


def _capacity(path: Path, name: str, client: _Computation) -> Capacity:
    return checks.capacity(path, name, client.computation, client.communication)


# ---------------------------------------------------------------- CSV
def _csv(path: Path, data: bytes) -> Read | None:
    try:
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        columns = [name.strip().lower() for name in rows.fieldnames or ()]
        rows.fieldnames = columns
        for needed, make in _CSV_SHAPES:
            if needed <= set(columns):
                return make(path, checks.Rows(path, rows))
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad(path, f"this is no CSV: {error}") from error
    return None


def _csv_intervals(path: Path, rows: checks.Rows) -> Read:
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        pairs.setdefault(row.text("device"), []).append((row.number("start"), row.number("end")))
    last = max((end for each in pairs.values() for _, end in each), default=0.0)
    period = max(1.0, math.ceil(last / DAY)) * DAY
    return Read(
        presences=tuple(checks.sessions(path, name, period, sorted(each)) for name, each in pairs.items())
    )


def _csv_capacities(path: Path, rows: checks.Rows) -> Read:
    found = (
        checks.capacity(path, row.text("id"), row.number("inference_ms_per_sample"), row.number("kbps"))
        for row in rows
    )
    return Read(capacities=tuple(found))


def _csv_rates(path: Path, rows: checks.Rows) -> Read:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.text("series"), []).append((row.number("t"), row.number("mbps")))
    arrays = ((name, np.array(each)) for name, each in points.items())
    return Read(series=tuple(checks.series(path, name, a[:, 0], a[:, 1]) for name, a in arrays))


def _csv_heat(path: Path, rows: checks.Rows) -> Read:
    runs: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        sample = row.number("t_s"), row.number("load_pct") / 100.0, row.number("temp_c")
        runs.setdefault((row.text("device"), row.text("result")), []).append(sample)
    return Read(heat=tuple(checks.heat_run(path, *key, np.array(each)) for key, each in runs.items()))


_CSV_SHAPES: Final[tuple[tuple[set[str], Callable[[Path, checks.Rows], Read]], ...]] = (
    ({"device", "start", "end"}, _csv_intervals),
    ({"inference_ms_per_sample", "kbps"}, _csv_capacities),
    ({"t_s", "load_pct", "temp_c", "device"}, _csv_heat),
    ({"t", "mbps"}, _csv_rates),
)


# ---------------------------------------------------------------- npz
def _npz(path: Path) -> Read | None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > FILE_BYTES_MAX:
            raise bad(path, "this unpacks to too much", field="bytes", value=size, hint="cut it into parts")
        with np.load(path, allow_pickle=False) as arrays:
            if not {"t", "mbps"} <= set(arrays.files):
                return None
            t, mbps = arrays["t"], arrays["mbps"]
            offsets = arrays["offsets"] if "offsets" in arrays.files else np.array([0, t.size])
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise bad(path, f"this is no npz of plain numbers: {error}", hint="nothing is unpickled") from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error}", hint="check the path and its permissions"
        ) from error
    return Read(series=checks.packed_series(path, t, mbps, offsets))
