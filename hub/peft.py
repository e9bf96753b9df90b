"""PEFT adapter folders, written and read: `adapter_config.json` and `adapter_model.safetensors`.

The rule: a reader sees a whole folder or none of it, what we export computes in stock PEFT what we evaluated, and
an element type is a property of each tensor in the file, never of our expectation. Exports are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedge.errors import DataError, NoInputError, UnsupportedError
from fedge.io import durable
from fedge.lora import AdapterLayout, LoraConfig
from fedge.peft import CONFIG_FILE, TENSOR_FILE, lora_config, match_names, peft_config, peft_name

Floats = NDArray[np.float32]
_TENSOR_FILE_BYTES_MAX: Final = 512 * 1024**2  # twice the largest adapter in float32, and room


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter that was read: `tensors` has every `L{i}/{module}.A` and `.B` as float32."""

    config: LoraConfig
    base_model_name: str
    tensors: dict[str, Floats]
    notices: tuple[str, ...]


def write_peft(
    folder: Path,
    layout: AdapterLayout,
    config: LoraConfig,
    a_seed: bytes,
    b_vector: Floats,
    base_model_name: str,
) -> None:
    """Write the adapter so that `peft.PeftModel.from_pretrained` loads it. Raises StorageError, DataError."""
    tensors = {**layout.frozen(a_seed), **layout.split(b_vector)}
    named = {peft_name(name): np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    fields = peft_config(config, base_model_name)
    durable.make_folder(folder)
    durable.write_bytes(folder / TENSOR_FILE, save(named, metadata={"format": "pt"}))
    durable.write_bytes(folder / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(fields), indent=2))


def read_peft(folder: Path, layout: AdapterLayout) -> PeftAdapter:
    """Read a PEFT folder into the slots of `layout`, all of them.

    Raises NoInputError, DataError naming file and tensor, UnsupportedError naming the config field or the type.
    """
    fields = _config_fields(folder / CONFIG_FILE)
    config, notices = lora_config(fields)
    if config.r != layout.r:
        raise UnsupportedError("adapter has another rank than the bundle", field="r", value=config.r)
    path = folder / TENSOR_FILE
    raw = _raw_tensors(path)
    match = match_names(raw, layout)
    tensors = {ours: _widened(path, name, raw[name]) for name, ours in match.ours.items()}
    for name, shape in {**layout.a_shapes, **layout.b_shapes}.items():
        if tensors[name].shape != shape:
            raise DataError(f"{path}: tensor has another shape", field=name, value=tensors[name].shape)
    if not any(tensors[name].any() for name in layout.b_shapes):
        notices += ("every B is zero: the adapter has no effect yet",)
    base = fields.get("base_model_name_or_path")
    return PeftAdapter(config, base if isinstance(base, str) else "", tensors, notices + match.notices)


def _config_fields(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError as error:
        raise NoInputError("adapter config does not exist", field="path", value=str(path)) from error
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} cannot be read: {error}", field=CONFIG_FILE) from error


@dataclass(frozen=True, slots=True)
class _Raw:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _raw_tensors(path: Path) -> dict[str, _Raw]:
    """Types, shapes and bytes. safetensors' own numpy loader knows no bfloat16."""
    try:
        if path.stat().st_size > _TENSOR_FILE_BYTES_MAX:
            raise DataError("adapter file is too large", field=str(path), value=path.stat().st_size)
        found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except FileNotFoundError as error:
        raise NoInputError("adapter weights do not exist", field="path", value=str(path)) from error
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}", field=TENSOR_FILE) from error
    return {name: _Raw(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def _widened(path: Path, name: str, raw: _Raw) -> Floats:
    """float32 of the same value, bit for bit: a bfloat16 is the upper half of a float32."""
    if raw.dtype == "F32":
        values = np.frombuffer(raw.data, "<f4").astype(np.float32)
    elif raw.dtype == "F16":
        values = np.frombuffer(raw.data, "<f2").astype(np.float32)
    elif raw.dtype == "BF16":
        values = (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        raise UnsupportedError(f"{path}: element type of {name} is not read", field="dtype", value=raw.dtype)
    return values.reshape(raw.shape)
