"""Weight formats: what the numbers of a frozen matrix look like in the weight file.

A matrix (N, K) is stored as a few tensors, its *parts*. Most formats cut every row into blocks of 32 weights: a
weight is an unsigned code, a block has a scale and perhaps an offset (the value of code 0) or a zero (the code of
value 0). Codes lie as ONNX Runtime's `MatMulNBits` wants them, so one file serves training and decoding.

`FORMATS` says everything about a format; `quantize.products` writes its arithmetic, `quantize.fit` fits weights to it
with more care than `encode` does. Scales and offsets are half precision, as in GGUF: Q4_0, Q4_1, Q5_0, Q5_1 and
Q8_0 come over without any change of value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError

BLOCK: Final = 32

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Parts = Mapping[str, npt.NDArray]  # suffix -> tensor
Size = int | str

Arithmetic = Literal["nibbles", "bytes", "table", "integers"]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a matrix (N, K): `suffix` of its name, numpy dtype, and how many columns an element covers.

    Its shape is (N, ceil(K / per)); "transposed" is (K, N), "vector" is (N,).
    """

    suffix: str
    dtype: str
    per: int = 1
    layout: Literal["rows", "transposed", "vector"] = "rows"

    def shape(self, rows: Size, columns: int) -> tuple[Size, ...]:
        """Shape of this part for a (rows, columns) matrix; `rows` may be symbolic."""
        if self.layout == "vector":
            return (rows,)
        return (columns, rows) if self.layout == "transposed" else (rows, -(-columns // self.per))

    def bits(self, columns: int) -> float:
        """Bits that this part spends on each weight of a row."""
        return 8 * np.dtype(self.dtype).itemsize / (columns if self.layout == "vector" else self.per)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One row of the table.

    `bits` of a code; weights per `block`, 0 for a whole row; the code `zero` about which the graphs centre.
    `training` names the arithmetic of the training graphs, `decoding` the operator with constant weights.
    `refit_kl_max` bounds KL(source || quantised) in nats a token when weights are refitted. Where `gradient_gate` is
    off the graphs are meant to round more than torch does, so their loss is judged, by `loss_error_max` in nats.
    """

    name: str
    bits: int
    block: int
    zero: int
    parts: tuple[Part, ...]
    training: Arithmetic
    decoding: str
    refit_kl_max: float
    gradient_gate: bool = True
    loss_error_max: float = 1e-4

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the tensors that hold one matrix."""
        return tuple(part.suffix for part in self.parts)

    @property
    def has_offset(self) -> bool:
        """Whether a block has a value of its own for code 0."""
        return "m" in self.suffixes

    def part(self, suffix: str) -> Part:
        """The part with this suffix."""
        return next(part for part in self.parts if part.suffix == suffix)

    def bits_per_weight(self, columns: int = 4096) -> float:
        """Stored bits a weight; `columns` matters only where a whole row shares a scale."""
        return sum(part.bits(columns) for part in self.parts)


_NIBBLES: Final = Part("q", "uint8", per=2)  # low nibble first
_BYTES: Final = Part("q", "uint8")
_SCALES: Final = Part("s", "float16", per=BLOCK)
_OFFSETS: Final = Part("m", "float16", per=BLOCK)
_ZEROS: Final = Part("z", "uint8", per=2 * BLOCK)  # packed like codes; a last half byte is padding

# fmt: off
FORMATS: Final[dict[str, WeightFormat]] = {
    # code x scale + offset: holds Q4_0 and Q4_1
    "int4d": WeightFormat("int4d", 4, BLOCK, 8, (_NIBBLES, _SCALES, _OFFSETS), "nibbles", "MatMulNBits", 0.5),
    # (code - zero) x scale: the smallest on the grid of MatMulNBits
    "int4gz": WeightFormat("int4gz", 4, BLOCK, 8, (_NIBBLES, _SCALES, _ZEROS), "nibbles", "MatMulNBits", 0.5),
    # (code - 128) x scale: holds Q8_0, Q5_0 and Q4_0
    "int8g": WeightFormat("int8g", 8, BLOCK, 128, (_BYTES, _SCALES), "bytes", "MatMulNBits", 0.02),
    # code x scale + offset: holds Q5_1, Q4_1 and all that int8g holds
    "int8d": WeightFormat("int8d", 8, BLOCK, 128, (_BYTES, _SCALES, _OFFSETS), "bytes", "MatMulNBits", 0.02),
    # table[code] x scale, bitsandbytes' own bytes: high nibble first, absmax of 64 weights
    "nf4": WeightFormat("nf4", 4, 64, 0, (_NIBBLES, Part("s", "float32", per=64)), "table", "MatMulBnb4", 0.5),
    # code x scale of the row, and activations rounded to 8 bits: integer products
    "int8c": WeightFormat("int8c", 8, 0, 0,
                          (Part("q", "int8", layout="transposed"), Part("s", "float32", layout="vector")),
                          "integers", "MatMulIntegerToFloat", 0.2, gradient_gate=False, loss_error_max=0.2),
}
# fmt: on
EMBEDDING_FORMAT: Final = "int8g"  # a 4-bit embedding costs up to 0.15 nats on top of 4-bit blocks

# The 16 levels of NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E), as bitsandbytes has them.
NF4_LEVELS: Final = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip

_SEARCHED: Final = 1 << 14  # blocks whose grid is searched for at a time


def encode(weight: Floats, fmt: WeightFormat) -> dict[str, npt.NDArray]:
    """Fit a (N, K) float matrix, K a multiple of the block, to a format by rounding to the nearest.

    A matrix already on the format's grid stays exact (`int8d`: on one of up to 32 levels). Raises DataError when a
    scale leaves half precision.
    """
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    if fmt.name == "nf4":
        return _encode_nf4(weight)
    if fmt.name == "int8c":
        scale = _nonzero(np.abs(weight).max(1) / np.float32(127))
        codes = np.rint(weight / scale[:, None]).astype(np.int8)
        return {"q": np.ascontiguousarray(codes.T), "s": scale}
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    if fmt.has_offset:
        scale, low = _grid_with_offset(blocks, 2**fmt.bits - 1)
    elif "z" in fmt.suffixes:
        low = np.minimum(blocks.min(-1), 0)
        scale = _nonzero(half((np.maximum(blocks.max(-1), 0) - low) / np.float32(15)))
        low = -np.clip(np.rint(-low / scale), 0, 15) * scale
    else:
        scale = _nonzero(half(np.abs(blocks).max(-1) / np.float32(fmt.zero - 1)))
        low = -fmt.zero * scale
    return assemble(nearest(blocks, scale, low, fmt), scale, low, fmt)


def nearest(blocks: Floats, scale: Floats, low: Floats, fmt: WeightFormat) -> Codes:
    """Codes (N, blocks, 32) of the grid points low + code x scale that are nearest to the weights."""
    codes = np.rint((blocks - low[..., None]) / scale[..., None])
    lowest = 0 if fmt.has_offset or fmt.bits == 4 else 1  # -128 has no counterpart
    return np.clip(codes, lowest, 2**fmt.bits - 1).astype(np.uint8)


def assemble(codes: Codes, scale: Floats, low: Floats | None, fmt: WeightFormat) -> dict[str, npt.NDArray]:
    """The parts of a blocked format as they are stored: codes (N, blocks, 32), scale and the value of code 0, `low`.

    `low` None stands for -zero x scale, a grid about 0.
    """
    flat = codes.reshape(codes.shape[0], -1)
    low = -fmt.zero * scale if low is None else low
    parts = {"q": flat if fmt.bits == 8 else _packed(flat), "s": half(scale).astype(np.float16)}
    if fmt.has_offset:
        parts["m"] = half(low).astype(np.float16)
    if "z" in fmt.suffixes:
        zeros = np.clip(np.rint(-low / scale), 0, 15).astype(np.uint8)
        parts["z"] = _packed(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    return {name: np.ascontiguousarray(array) for name, array in parts.items()}


def decode(parts: Parts, fmt: WeightFormat) -> Floats:
    """The float32 matrix (N, K) that the graphs compute with."""
    stored, scale = parts["q"], parts["s"].astype(np.float32)
    if fmt.name == "int8c":
        dense: Floats = stored.T.astype(np.float32) * scale[:, None]
        return dense
    if fmt.name == "nf4":
        pairs = np.stack([stored >> 4, stored & 15], axis=-1)
        return (NF4_LEVELS[pairs].reshape(*scale.shape, 64) * scale[..., None]).reshape(len(scale), -1)
    codes = stored if fmt.bits == 8 else _unpacked(stored)
    blocks = codes.reshape(*scale.shape, BLOCK).astype(np.float32)
    if "z" in fmt.suffixes:
        blocks -= _unpacked(parts["z"])[:, : scale.shape[1], None]
    elif not fmt.has_offset:
        blocks -= np.float32(fmt.zero)
    blocks *= scale[..., None]
    if fmt.has_offset:
        blocks += parts["m"].astype(np.float32)[..., None]
    return blocks.reshape(scale.shape[0], -1)


def converted(name: str, parts: Parts, fmt: WeightFormat) -> Parts | None:
    """The parts of another format with the same values, or None where the format does not hold them exactly."""
    held = FORMATS[name]
    if held.name == fmt.name:
        return parts
    if fmt.bits != 8 or fmt.block != BLOCK or held.block != BLOCK or "z" in held.suffixes:
        return None
    codes = parts["q"] if held.bits == 8 else _unpacked(parts["q"])
    scale = parts["s"].astype(np.float32)
    low = parts["m"].astype(np.float32) if held.has_offset else -held.zero * scale
    if not fmt.has_offset:
        shift = low + fmt.zero * scale  # how far code 0 lies from where this format has it
        steps = np.rint(shift / scale)
        if held.bits == 8 or (steps * scale != shift).any() or (np.abs(steps - 120) > 8).any():
            return None
        codes = codes + np.repeat(steps.astype(np.uint8), BLOCK, axis=1)
        return {"q": codes, "s": parts["s"]}
    offset = _halved(low).astype(np.float16)
    if (offset != low).any():
        return None
    return {"q": codes, "s": parts["s"], "m": offset}


def half(values: Floats) -> Floats:
    """The values rounded to half precision, still float32. Raises DataError when one is out of its range."""
    rounded = _halved(values)
    if not np.isfinite(rounded).all():
        raise DataError(
            "weights are too large for scales in half precision",
            field="weight",
            value=float(np.abs(values).max()),
        )
    return rounded


def _halved(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _packed(codes: Codes) -> Codes:
    packed: Codes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def _unpacked(packed: Codes) -> Codes:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def _encode_nf4(weight: Floats) -> dict[str, npt.NDArray]:
    """bitsandbytes' own codes and scales. Its output for one dimension is right for every width (0.50 on CPU)."""
    import torch

    # It would tell of a faster product, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    flat = torch.from_numpy(weight.reshape(-1))
    packed, state = functional.quantize_4bit(flat, blocksize=64, quant_type="nf4")
    rows = weight.shape[0]
    return {"q": packed.numpy().reshape(rows, -1), "s": state.absmax.float().numpy().reshape(rows, -1)}


def _nonzero(scale: Floats) -> Floats:
    """A block of zeros has no scale of its own; 1 keeps its codes at zero."""
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _grid_with_offset(blocks: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and value of code 0 of each block, both in half precision, for codes 0 to `levels`.

    Smallest and largest weight are the ends of the grid, the smallest rounded down so that none lies outside. A block
    that was dequantised from such a grid may not use all levels; then the grid is searched for. Only blocks whose
    values repeat can be of that kind (32 distinct values have a gap below span / 15), so the search touches few
    blocks of a float matrix.
    """
    low = half(blocks.min(-1))
    low = half(np.where(low > blocks.min(-1), np.nextafter(low.astype(np.float16), np.float16(-np.inf)), low))
    span = blocks.max(-1) - blocks.min(-1)
    scale = _nonzero(half((blocks.max(-1) - low) / np.float32(levels)))
    rest = blocks[..., 0] - low  # a constant block: what half precision of its value leaves is its scale
    scale = np.where((span == 0) & (rest != 0), _nonzero(half(rest)), scale)
    gaps = np.diff(np.sort(blocks, axis=-1), axis=-1)
    smallest = np.where(gaps > 1e-4 * span[..., None], gaps, np.inf).min(-1)
    open_rows, open_columns = np.nonzero((smallest >= span / (levels + 0.5)) & (span > 0))
    for start in range(0, len(open_rows), _SEARCHED):
        at = (open_rows[start : start + _SEARCHED], open_columns[start : start + _SEARCHED])
        scale[at], low[at] = _searched(blocks[at], scale[at], low[at], levels)
    return scale, low


def _searched(blocks: Floats, scale: Floats, low: Floats, levels: int) -> tuple[Floats, Floats]:
    """The grid on which all weights of a block lie, where there is one: steps between its ends, first level used."""
    least, span = blocks.min(-1), blocks.max(-1) - blocks.min(-1)
    miss = _miss(blocks, scale, low, levels) / span
    for steps in range(min(levels, 31), 0, -1):
        for first in range(levels + 1 - steps) if levels == 15 else (0,):
            todo = np.nonzero(miss > 1e-6)[0]
            if not todo.size:
                return scale, low
            step = _nonzero(_halved(span[todo] / np.float32(steps)))
            start = _halved(least[todo] - first * step)
            found = _miss(blocks[todo], step, start, levels) / span[todo]
            better = found < 0.5 * np.minimum(miss[todo], 1e-2)
            at = todo[better]
            miss[at], scale[at], low[at] = found[better], step[better], start[better]
    return scale, low


def _miss(blocks: Floats, scale: Floats, low: Floats, levels: int) -> Any:
    """Largest distance of a block's weights from the grid."""
    with np.errstate(invalid="ignore"):  # a start beyond half precision is infinite: no grid
        codes = np.clip(np.rint((blocks - low[:, None]) / scale[:, None]), 0, levels)
        return np.abs(codes * scale[:, None] + low[:, None] - blocks).max(-1)
