"""Weight formats: what the numbers of a frozen matrix look like in the weight file.

A matrix of shape (N, K) is cut along K into blocks of 32. Every block has one scale and, in some formats, one
offset; every weight is an unsigned code. The value of a weight is `(code - zero) * scale + offset`. The bytes are
those of ONNX Runtime's `MatMulNBits`, so one file serves training (`GatherBlockQuantized`) and decoding.

`int4d` keeps the offset as a float instead of a 4-bit zero point. That makes the import of GGUF's Q4_0 and Q4_1
exact, whereas every refit to an integer zero point costs 0.06 to 0.2 nats on a 135 M model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

BLOCK: Final = 32

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Parts = Mapping[str, npt.NDArray]  # "q" codes, "s" scales, "d" offsets


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One row of the table. `refit_kl_max` bounds KL(source || quantised) in nats a token when weights are refitted."""

    name: str
    bits: int
    zero: int
    has_offset: bool
    refit_kl_max: float

    @property
    def parts(self) -> tuple[str, ...]:
        """Suffixes of the tensors that hold one matrix."""
        return ("q", "s", "d") if self.has_offset else ("q", "s")

    def part_shape(self, part: str, rows: int | str, columns: int) -> tuple[int | str, int]:
        """Shape of a part of a (rows, columns) matrix in the weight file."""
        return (rows, columns * self.bits // 8) if part == "q" else (rows, columns // BLOCK)


FORMATS: Final[dict[str, WeightFormat]] = {
    "int4d": WeightFormat("int4d", bits=4, zero=8, has_offset=True, refit_kl_max=0.5),
    "int8g": WeightFormat("int8g", bits=8, zero=128, has_offset=False, refit_kl_max=0.02),
}
EMBEDDING_FORMAT: Final = "int8g"  # a 4-bit embedding costs up to 0.15 nats on top of 4-bit blocks


def encode(weight: Floats, fmt: WeightFormat) -> dict[str, npt.NDArray]:
    """Fit a (N, K) float matrix, K a multiple of 32, to a format. A matrix already on such a grid stays exact."""
    blocks = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1, BLOCK)
    if not fmt.has_offset:
        scale = _nonzero(np.abs(blocks).max(-1) / np.float32(fmt.zero - 1))
        codes = np.rint(blocks / scale[..., None]) + fmt.zero
        return assemble(codes.astype(np.uint8), scale, None, fmt)
    low = blocks.min(-1)
    span = blocks.max(-1) - low
    scale = _nonzero(span / _steps(blocks, low, span))
    first = np.where(span == 0, fmt.zero, 0).astype(np.float32)  # a constant block is all offset
    codes = np.clip(np.rint((blocks - low[..., None]) / scale[..., None]) + first[..., None], 0, 15)
    return assemble(codes.astype(np.uint8), scale, low + (fmt.zero - first) * scale, fmt)


def assemble(codes: Codes, scale: Floats, offset: Floats | None, fmt: WeightFormat) -> dict[str, npt.NDArray]:
    """The parts as they are stored, from codes (N, blocks, 32), scale and offset (N, blocks)."""
    flat = codes.reshape(codes.shape[0], -1)
    parts = {
        "q": flat if fmt.bits == 8 else flat[:, 0::2] | (flat[:, 1::2] << 4),
        "s": scale.astype(np.float32),
    }
    if fmt.has_offset:
        parts["d"] = np.zeros_like(parts["s"]) if offset is None else offset.astype(np.float32)
    return {name: np.ascontiguousarray(array) for name, array in parts.items()}


def decode(parts: Parts, fmt: WeightFormat) -> Floats:
    """The float32 matrix (N, K) that the graphs compute with."""
    stored, scale = parts["q"], parts["s"]
    if fmt.bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1)
    blocks = stored.reshape(*scale.shape, BLOCK).astype(np.float32)
    blocks -= np.float32(fmt.zero)
    blocks *= scale[..., None]
    if fmt.has_offset:
        blocks += parts["d"][..., None]
    return blocks.reshape(scale.shape[0], -1)


def _nonzero(scale: Floats) -> Floats:
    """A constant block has no scale of its own; 1 keeps its codes at zero."""
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _steps(blocks: Floats, low: Floats, span: Floats) -> Floats:
    """How many grid steps lie between the smallest and the largest weight of each block, 1 to 15.

    15 for ordinary floats. A block that was dequantised from a 4-bit grid may not use all levels; its step is the
    one on which all its values lie. Only blocks whose values repeat can be of that kind (32 distinct values have
    a gap below span/15), so the search touches few blocks of a float matrix.
    """
    steps = np.full(span.shape, 15, np.float32)
    gaps = np.diff(np.sort(blocks, axis=-1), axis=-1)
    tiny = 1e-4 * span[..., None]
    smallest = np.where(gaps > tiny, gaps, np.inf).min(-1)
    open_rows, open_columns = np.nonzero((smallest >= span / 15.5) & (span > 0))
    unit = (blocks[open_rows, open_columns] - low[open_rows, open_columns, None]) / span[
        open_rows, open_columns, None
    ]
    best = np.full(len(open_rows), np.inf, np.float32)
    for count in range(15, 0, -1):
        miss = np.abs(unit * count - np.rint(unit * count)).max(-1, initial=0.0)
        better = miss < np.minimum(best, 1e-2) * 0.5
        best[better] = miss[better]
        steps[open_rows[better], open_columns[better]] = count
    return steps
