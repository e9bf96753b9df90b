"""A run of training that was cut off and goes on with the same bits: the file that makes it possible.

It holds the trained vector, the optimiser's moments, how many steps and batches are done, and the sums so far. It is
written whole and durably (law 4) and carries its own SHA-256, so that a damaged one is found and not believed: the
run then starts again from its beginning, which costs time and no correctness. `run` names the run that it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.io import durable

Floats = NDArray[np.float32]
_MAGIC: Final = b"fedge training state 1\n"
_DIGEST: Final = 32


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a run is. `cursor` = batches taken from the order, with those that were skipped."""

    cursor: int = 0
    steps: int = 0
    optimizer_steps: int = 0
    loss_sum: float = 0.0
    labels: int = 0
    rows: int = 0
    skipped: int = 0  # batches without a label
    not_finite: int = 0  # steps left out because loss or gradient was no number
    in_a_row: int = 0  # of those, since the last good one


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: bytes
    progress: Progress
    sizes: list[int]  # numbers of the vector, then of each moment


class TrainState(msgspec.Struct, frozen=True):
    """Everything that a run goes on from; the vector and the moments are float32."""

    run: bytes
    progress: Progress
    vector: Floats
    moments: tuple[Floats, ...]

    def write(self, path: Path) -> None:
        """Durably, in place of what was there. Raises StorageError."""
        arrays = [self.vector, *self.moments]
        header = msgspec.json.encode(_Header(self.run, self.progress, [array.size for array in arrays]))
        body = b"".join([_MAGIC, header, b"\n", *(array.astype("<f4").tobytes() for array in arrays)])
        durable.write_bytes(path, body + hashlib.sha256(body).digest(), secret=True)


def read_state(path: Path, run: bytes) -> TrainState | None:
    """The state of `run` in the file `path`; None when there is none, or it is another run's or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(body).digest() != digest or not body.startswith(_MAGIC):
        return None
    line, newline, numbers = body[len(_MAGIC) :].partition(b"\n")
    try:
        header = msgspec.json.decode(line, type=_Header)
    except msgspec.MsgspecError:
        return None
    if not newline or header.run != run or len(numbers) != 4 * sum(header.sizes) or not header.sizes:
        return None
    flat = np.frombuffer(numbers, "<f4").astype(np.float32)
    vector, *moments = np.split(flat, np.cumsum(header.sizes)[:-1])
    return TrainState(run, header.progress, vector, tuple(moments))


class Keeper:
    """Keeps the state of one run in one file, not more often than every `seconds` of `clock`."""

    def __init__(self, path: Path, run: bytes, seconds: float, clock: Callable[[], float]) -> None:
        self._path, self._run, self._seconds, self._clock = path, run, seconds, clock
        self._last = clock()

    def found(self) -> TrainState | None:
        """What the run goes on from, if anything."""
        return read_state(self._path, self._run)

    def keep(self, state: TrainState) -> None:
        """Write `state` when it is time. Raises StorageError."""
        if self._clock() - self._last >= self._seconds:
            msgspec.structs.replace(state, run=self._run).write(self._path)
            self._last = self._clock()
