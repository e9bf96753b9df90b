"""`result.json`: everything a run of the fleet found out, in one typed shape.

The rule: what is written parses in a strict reader. JSON has no NaN and no Infinity, and one of them blanks a whole
page in a browser, so a figure that left the finite numbers is the word "diverged", and one that nobody measured is
null. The two are never confused: the first is a finding, the second a gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedge.errors import DataError, NoInputError
from fedge.io import durable

DIVERGED: Final = "diverged"
Figure = float | Literal["diverged"] | None


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts."""


class Model(_Part, frozen=True):
    """The frozen base: `sha256` of the source file, `bytes` of the bundle's weight file."""

    name: str
    sha256: str
    licence: str
    bytes: int


class Data(_Part, frozen=True):
    """Where the private messages come from."""

    name: str
    licence: str


class Losses(_Part, frozen=True):
    """Held-out loss in nats per token, pooled over a group; the pooled reference only if it was asked for."""

    zero_shot: Figure
    took_part: Figure
    zero_shot_never_seen: Figure
    never_seen: Figure
    pooled_reference: Figure = None
    pooled_reference_never_seen: Figure = None


class Person(_Part, frozen=True):
    """One person's held-out loss in nats per token, before and after, over `labels` tokens."""

    id: str
    took_part: bool
    bloc: str | None
    before: Figure
    after: Figure
    labels: int


class Round(_Part, frozen=True):
    """What the opened sum of one bloc said; figures are null where the bloc sat the round out.

    `seconds`: from the start of training to the end of this round.
    """

    bloc: str
    round: int
    seconds: float | None
    training_loss: Figure  # nats per token
    mean_norm: Figure  # of the members' updates, L2, before clipping
    sum_norm: Figure
    bits: int | None


class AgentMemory(_Part, frozen=True):
    """Of the largest agent with its worker, in units of 10^6 bytes."""

    peak_rss_mb: float | None
    peak_anon_mb: float | None
    idle_rss_mb: float | None


class Traffic(_Part, frozen=True):
    """Bytes of one device; `up_per_round` is the masked report, `bundle` what it downloads once."""

    up_per_round: int | None
    up_total_per_device: int | None
    down_total_per_device: int | None
    bundle: int | None


class Seconds(_Part, frozen=True):
    """Wall time of the parts of the run."""

    prepare: float | None
    quantize: float | None
    train: float | None
    evaluate: float | None
    total: float | None


class Result(_Part, frozen=True):
    """A whole run. `opened_blocs` and `sat_out` count rounds of single blocs."""

    fedge: str
    seed: int
    model: Model
    data: Data
    devices: int
    bloc_devices: int
    rounds: int
    steps: int
    opened_blocs: int
    sat_out: int
    loss: Losses
    people: tuple[Person, ...]
    round_log: tuple[Round, ...]
    agent: AgentMemory
    bytes: Traffic
    seconds: Seconds
    cpu_seconds: dict[str, float]
    broker: str
    notes: tuple[str, ...] = ()


def as_result(values: Mapping[str, object]) -> Result:
    """The result in plain `values`; a float that is not finite becomes "diverged". DataError names what is wrong."""
    try:
        return msgspec.convert(_finite(values), Result)
    except msgspec.ValidationError as error:
        raise DataError(f"result does not have its shape: {error}", field="result") from error


def encode_result(result: Result) -> bytes:
    """Strict JSON, indented, ending with a newline."""
    plain = as_result(msgspec.to_builtins(result))  # a float that is not finite would silently become null
    return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"


def decode_result(data: bytes) -> Result:
    """The result in strict JSON `data`. Raises DataError."""
    try:
        return msgspec.json.decode(data, type=Result)
    except msgspec.MsgspecError as error:
        raise DataError(f"result cannot be read: {error}", field="result") from error


def write_result(result: Result, path: Path) -> None:
    """Write `result` to `path`, whole or not at all. Raises StorageError."""
    durable.write_bytes(path, encode_result(result))


def read_result(path: Path) -> Result:
    """The result in the file `path`. Raises NoInputError, DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NoInputError(f"cannot read {path}: {error.strerror}", field="path", value=str(path)) from error
    return decode_result(data)


def finite(figure: Figure) -> float | None:
    """The figure if it is a number that can be added and drawn."""
    if figure is None or isinstance(figure, str):
        return None
    return float(figure) if math.isfinite(figure) else None


def figure_text(figure: Figure, digits: int = 3) -> str:
    """A figure for people; missing and diverged are told apart."""
    number = finite(figure)
    if number is not None:
        return f"{number:.{digits}f}"
    return "not measured" if figure is None else DIVERGED


def change_text(before: Figure, after: Figure, digits: int = 3) -> str:
    """after - before for people, with its sign and a real minus."""
    start, end = finite(before), finite(after)
    if start is not None and end is not None:
        return f"{end - start:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return "not measured" if None in (before, after) else DIVERGED


def _finite(value: object) -> object:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else DIVERGED
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
