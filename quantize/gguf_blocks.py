"""Quantisation blocks of GGUF as parts of our formats, code by code.

What a block stores is a code for each weight, a scale and perhaps an offset per 32 of them, so most types are a
format of ours in another order of bytes. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 come over without any change of value. The
scales of Q4_K and Q5_K are products of two numbers and get rounded to half precision (2^-11); their codes stay. All
other types have no such grid and are dequantised by the gguf library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import Q4_K

from quantize.formats import BLOCK, FORMATS, Codes, Floats, Parts, assemble

Rows = npt.NDArray[np.uint8]  # the bytes of each row of a matrix

_SUPER: Final = 256  # weights in a block of the K types


def read_blocks(kind: Any, rows: Rows) -> tuple[str, Parts] | None:
    """(format name, parts) of a matrix whose rows have these bytes, or None when no format has the type's grid."""
    reader = _READERS.get(kind)
    if reader is None:
        return None
    name, codes, scale, low = reader(rows)
    return name, assemble(codes, scale, low, FORMATS[name])


_Grid = tuple[str, Codes, Floats, Floats | None]  # format, codes (N, blocks, 32), scale, value of code 0


def _q4_0(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 18)
    return "int4d", _nibbles(blocks[..., 2:]), _halves(blocks, 0), None


def _q4_1(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 20)
    return "int4d", _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 22)
    codes = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return "int8g", codes + np.uint8(128 - 16), _halves(blocks, 0), None


def _q5_1(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 24)
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return "int8d", codes, _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 34)
    return "int8g", blocks[..., 2:] ^ np.uint8(128), _halves(blocks, 0), None  # two's complement -> about 128


def _q4_k(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 144)
    return "int4d", _k_nibbles(rows, blocks[..., 16:]), *_k_scales(rows, blocks)


def _q5_k(rows: Rows) -> _Grid:
    blocks = _blocks(rows, 176)
    bits = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(
        1
    )  # (N, blocks, 8, 32)
    codes = _k_nibbles(rows, blocks[..., 48:]) | bits.reshape(len(rows), -1, BLOCK) << np.uint8(4)
    return "int8d", codes, *_k_scales(rows, blocks)


_READERS: Final[dict[Any, Callable[[Rows], _Grid]]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
}


def _blocks(rows: Rows, size: int) -> Rows:
    return rows.reshape(len(rows), -1, size)


def _halves(blocks: Rows, start: int) -> Floats:
    """A float16 field of every block, as float32 (N, blocks)."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: Rows) -> Codes:
    """Codes (N, blocks, 32): low nibbles are elements 0 to 15 of a block, high nibbles 16 to 31."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _fifth_bits(packed: Rows) -> Codes:
    """Bit 4 of each of 32 codes, in its place: bit i of a little-endian word is element i's."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _k_nibbles(rows: Rows, packed: Rows) -> Codes:
    """Codes (N, blocks of 32, 32): each 32 bytes hold one block in their low and the next in their high nibbles."""
    bytes_ = packed.reshape(len(rows), -1, 1, BLOCK)
    return (bytes_ >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)).reshape(len(rows), -1, BLOCK)


def _k_scales(rows: Rows, blocks: Rows) -> tuple[Floats, Floats]:
    """Scale and value of code 0 of the eight blocks of 32 in each block of 256."""
    scales, offsets = Q4_K.get_scale_min(blocks[..., 4:16].reshape(-1, 12))
    shape = (len(rows), -1)
    scale = _halves(blocks, 0).reshape(-1, 1) * scales.astype(np.float32)
    low = -_halves(blocks, 2).reshape(-1, 1) * offsets.astype(np.float32)
    return scale.reshape(shape), low.reshape(shape)
