"""Opens an adapter whatever its kind: our own file, a PEFT folder, or a GGUF LoRA.

The rule: every tensor of the file is used or named. Without a bundle at hand nothing says which modules there should
be, so a missing pair is seen by its other half, and a rank by the config that promises it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedge.errors import DataError, NoInputError, UnsupportedError
from fedge.io.adapter_file import Adapter, is_adapter_file, read_adapter
from fedge.io.peft_folder import TENSOR_FILE_BYTES_MAX, read_config
from fedge.io.safetensors_file import read_tensors, widened
from fedge.lora import DENSE, LoraConfig
from fedge.peft import CONFIG_FILE, TENSOR_FILE, lora_config
from quantize.interop.factors import Factors, Floats, Opened, key_of

_PEFT_NAME: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_PEFT_PREFIX: Final = "base_model.model."
_GGUF_MAGIC: Final = b"GGUF"


def open_adapter(path: Path) -> Opened:
    """The adapter at `path`. Raises NoInputError, DataError, UnsupportedError, IntegrityError naming file and field."""
    if path.is_dir():
        return _open_peft(path)
    if not path.is_file():
        raise NoInputError("no such adapter", field="path", value=str(path))
    if is_adapter_file(path):
        return opened(read_adapter(path), path.stat().st_size)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == _GGUF_MAGIC:
        from quantize.interop.gguf_lora import read_gguf_lora

        return read_gguf_lora(path)
    raise DataError(
        f"{path} is no adapter",
        field="path",
        value=str(path),
        hint="Give a file of `fedge agent train-once --adapter-out`, a PEFT folder, or a GGUF LoRA",
    )


def opened(adapter: Adapter, size: int) -> Opened:
    """One of our adapters in this module's terms."""
    header, layout = adapter.header, adapter.header.layout
    factors = {
        slot.name: Factors(
            f"{layout.layer_path}.{slot.layer}.{slot.path}",
            adapter.tensors[f"{slot.name}.A"],
            adapter.tensors[f"{slot.name}.B"],
            slot.scale,
        )
        for slot in layout.slots
    }
    about = {
        "model": header.model,
        "architecture": header.architecture,
        "bundle": header.bundle,
        "rule": header.rule,
        "a_seed": header.a_seed.hex(),
        "steps": header.steps,
        **_config_about(header.lora),
    }
    dense = {name.removeprefix(DENSE): adapter.tensors[name] for name in layout.dense_shapes}
    return Opened("fedge", about, factors, dense, size, _effect_notice(factors, dense), dense_adds=True)


def _open_peft(folder: Path) -> Opened:
    fields = read_config(folder / CONFIG_FILE)
    config, notices = lora_config(fields)
    path = folder / TENSOR_FILE
    pairs: dict[str, dict[str, Floats]] = {}
    dense: dict[str, Floats] = {}
    for name, raw in read_tensors(path, bytes_max=TENSOR_FILE_BYTES_MAX).items():
        values, found = widened(path, name, raw), _PEFT_NAME.fullmatch(name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = values
        elif any(part in config.modules_to_save for part in name.split(".")):
            dense[name.removeprefix(_PEFT_PREFIX)] = values
        else:
            raise DataError(f"{path}: a tensor that is no part of a LoRA", field=name, value=raw.shape)
    factors = {key_of(module): _pair(path, module, pair, config) for module, pair in sorted(pairs.items())}
    if not factors and not dense:
        raise DataError(f"{path} holds no LoRA", field="tensors", value=0)
    about = {"model": fields.get("base_model_name_or_path") or "", **_config_about(config)}
    return Opened(
        "peft", about, factors, dense, path.stat().st_size, notices + _effect_notice(factors, dense)
    )


def _pair(path: Path, module: str, pair: Mapping[str, Floats], config: LoraConfig) -> Factors:
    for letter in "AB":
        if letter not in pair:
            raise DataError(f"{path}: half of a pair is missing", field=f"{module}.lora_{letter}.weight")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise UnsupportedError("only LoRA of matrices is read", field=module, value=(a.shape, b.shape))
    if not len(a) == b.shape[1] == config.rank_of(module):
        raise DataError(
            f"{path}: the rank is not the one in {CONFIG_FILE}", field=module, value=(a.shape, b.shape)
        )
    return Factors(module, a, b, config.scale_of(module))


def _config_about(config: LoraConfig) -> dict[str, object]:
    return {
        "r": config.r,
        "alpha": config.alpha,
        "rslora": config.rslora,
        "targets": config.targets if isinstance(config.targets, str) else sorted(config.targets),
    }


def _effect_notice(factors: Mapping[str, Factors], dense: Mapping[str, Floats]) -> tuple[str, ...]:
    quiet = not dense and not any(pair.b.any() and pair.a.any() for pair in factors.values())
    return ("every change is zero: the adapter has no effect yet",) if quiet else ()
