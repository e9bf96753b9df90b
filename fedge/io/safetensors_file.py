"""Safetensors files, read and written with numpy alone: a board has no torch, and no safetensors library.

The layout (huggingface/safetensors, `README.md` "Format"): 8 bytes little-endian header length, a JSON header
`name -> {dtype, shape, data_offsets}`, then the tensors' bytes. The rule: an element type is a property of each
tensor in the file, never of our expectation, and a file counts only when its tensors lie within it, one after the
other, without a hole: a length is checked before anything of that length is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError, NoInputError, UnsupportedError
from fedge.io.durable import storage_error

Floats = NDArray[np.float32]

HEADER_BYTES_MAX: Final = 16 * 1024**2  # 100,000 tensors with long names; the library's own limit is 100 MB
_AXES_MAX: Final = 16
_METADATA: Final = "__metadata__"
PYTORCH: Final = {"format": "pt"}  # transformers refuses a file that does not say it
_ITEM_BYTES: Final = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as the file has it; `dtype` is the file's word."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A whole file: its free-text metadata, and every tensor by name."""

    metadata: dict[str, str]
    tensors: dict[str, RawTensor]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_tensors(path: Path, *, bytes_max: int) -> dict[str, RawTensor]:
    """Every tensor of the file by name. Raises NoInputError, StorageError, DataError naming file and tensor."""
    return read_file(path, bytes_max=bytes_max).tensors


def read_file(path: Path, *, bytes_max: int) -> TensorFile:
    """The same with the file's metadata."""
    try:
        size = path.stat().st_size
        if size > bytes_max:
            raise DataError("tensor file is too large", field=str(path), value=size)
        whole = memoryview(path.read_bytes())
    except FileNotFoundError as error:
        raise NoInputError("tensor file does not exist", field="path", value=str(path)) from error
    except OSError as error:
        raise storage_error(error, path, verb="read") from error
    metadata, entries, body = _header(path, whole)
    return TensorFile(metadata, _placed(path, entries, body))


def _placed(path: Path, entries: Mapping[str, _Entry], body: memoryview) -> dict[str, RawTensor]:
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or not start <= stop <= len(body):
            raise DataError(f"{path}: tensor has an impossible place", field=name, value=entry.data_offsets)
        if len(entry.shape) > _AXES_MAX or any(n < 0 for n in entry.shape):
            raise DataError(f"{path}: tensor has an impossible shape", field=name, value=entry.shape)
        item = _ITEM_BYTES.get(entry.dtype)
        if item is not None and math.prod(entry.shape) * item != stop - start:
            raise DataError(f"{path}: tensor has another size than its shape", field=name, value=stop - start)
        found[name], end = RawTensor(entry.dtype, entry.shape, body[start:stop]), stop
    if end != len(body):
        raise DataError(f"{path}: bytes that belong to no tensor", field="bytes", value=len(body) - end)
    return found


def widened(path: Path, name: str, raw: RawTensor) -> Floats:
    """float32 of the same value, bit for bit: a bfloat16 is the upper half of a float32.

    Raises UnsupportedError naming tensor and type for anything but F32, F16 and BF16.
    """
    if raw.dtype == "F32":
        values = np.frombuffer(raw.data, "<f4").astype(np.float32)
    elif raw.dtype == "F16":
        values = np.frombuffer(raw.data, "<f2").astype(np.float32)
    elif raw.dtype == "BF16":
        values = (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise UnsupportedError(f"{path}: element type of {name} is not read", field="dtype", value=raw.dtype)
    return values.reshape(raw.shape)


def encode_tensors(tensors: Mapping[str, Floats], metadata: Mapping[str, str] = PYTORCH) -> bytes:
    """A file of float32 tensors, in the order of their names: equal tensors give equal bytes."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    parts, end = [], 0
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name], dtype="<f4").tobytes()
        header[name] = _Entry("F32", tensors[name].shape, (end, end + len(data)))
        parts.append(data)
        end += len(data)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _header(path: Path, whole: memoryview) -> tuple[dict[str, str], dict[str, _Entry], memoryview]:
    length = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or length > min(HEADER_BYTES_MAX, len(whole) - 8):
        raise DataError(f"{path} cannot be read: no header of safetensors", field="header", value=length)
    try:
        fields = msgspec.json.decode(whole[8 : 8 + length], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(fields.pop(_METADATA, b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in fields.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", field="header") from error
    return metadata, entries, whole[8 + length :]
