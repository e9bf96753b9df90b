"""Where the input of each block waits for the way back: in memory, in half precision, or in a file.

The file is for boards whose memory does not hold them: its pages leave our memory as soon as they are written, and
come back one block at a time. It has no name, so that nothing of the owner's data is left when the process dies. In
half precision a number is within 1/2048 of itself; each tensor is scaled into the range, because single features of
a hidden state may be thousands of times larger than the rest.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedge.io import durable

Floats = NDArray[np.float32]
_HALF_MAX: Final = 32_768.0  # a power of two, below the largest half of 65,504


class Checkpoints(Protocol):
    """Takes a tensor for each block, and gives each back once."""

    def put(self, layer: int, x: Floats) -> None: ...
    def take(self, layer: int) -> Floats: ...


class Plain:
    """As they are."""

    def __init__(self) -> None:
        self._kept: dict[int, Floats] = {}

    def put(self, layer: int, x: Floats) -> None:
        """Keep `x`."""
        self._kept[layer] = x

    def take(self, layer: int) -> Floats:
        """Give it back, and let go of it."""
        return self._kept.pop(layer)


class Half:
    """In 16 bits."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[NDArray[np.float16], float]] = {}

    def put(self, layer: int, x: Floats) -> None:
        """Keep `x`, scaled by a power of two where it would not fit."""
        largest = float(np.abs(x).max(initial=0.0))
        scale = 1.0
        while largest * scale > _HALF_MAX and np.isfinite(largest):
            scale *= 0.5
        self._kept[layer] = (x * np.float32(scale)).astype(np.float16), scale

    def take(self, layer: int) -> Floats:
        """Give it back, and let go of it."""
        half, scale = self._kept.pop(layer)
        return half.astype(np.float32) / np.float32(scale)


class Filed:
    """In a file without a name in `folder`, mapped. One for each trainer; it grows to the largest batch."""

    def __init__(self, folder: Path, layers: int) -> None:
        self._folder, self._layers = folder, layers
        self._map: mmap.mmap | None = None
        self._slot = 0
        self._shapes: dict[int, tuple[int, ...]] = {}

    def put(self, layer: int, x: Floats) -> None:
        """Write `x` and drop its pages. Raises StorageError when the disk has no room."""
        if self._map is None or x.nbytes > self._slot:
            self._map = self._grown(x.nbytes)
        self._shapes[layer] = x.shape
        start = layer * self._slot
        self._map[start : start + x.nbytes] = x.reshape(-1).view(np.uint8).data
        self._map.madvise(mmap.MADV_DONTNEED, start, self._slot)

    def take(self, layer: int) -> Floats:
        """A copy, so that the pages may go again."""
        assert self._map is not None, "nothing was put"
        shape, start = self._shapes.pop(layer), layer * self._slot
        count = int(np.prod(shape))
        x = np.frombuffer(self._map, np.float32, count, start).reshape(shape).copy()
        self._map.madvise(mmap.MADV_DONTNEED, start, self._slot)
        return x

    def _grown(self, size: int) -> mmap.mmap:
        """A larger file. Only an empty one grows: the first block of a batch is as large as all others."""
        assert not self._shapes, "batches do not change their size on the way"
        self._slot = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = self._slot * self._layers
        durable.ensure_space(self._folder, whole)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                os.posix_fallocate(stream.fileno(), 0, whole)  # a hole would be found by a bus error
                return mmap.mmap(stream.fileno(), whole)
        except OSError as error:
            raise durable.storage_error(error, self._folder, bytes_needed=whole) from error
