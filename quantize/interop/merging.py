"""A base and its adapter as one ordinary model folder: safetensors, config, tokenizer.

Two bases can be merged into. The *source* keeps the weights as the model's makers gave them, in their own type; the
*bundle* puts the weights in that the devices have, decoded from their format, so that the folder computes what the
devices computed. In both cases file after file of the source folder is read, changed and written: memory holds one.

Which way round a matrix lies is read from the module of the model's class (GPT-2's are transposed), never from its
shape.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedge.errors import DataError, UnsupportedError, UsageError
from fedge.io import durable
from fedge.io.model_source import ModelSource, resolve_model
from fedge.release import Manifest
from quantize.interop.bundle_weights import BundleWeights
from quantize.interop.factors import Opened

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WEIGHTS: Final = "*.safetensors"
# Beside the weights: what a model folder consists of. Pickled weights and code stay behind.
_TAKEN_ALONG: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class Merged:
    """What was done: matrices changed, and the largest change of a matrix relative to its norm."""

    matrices: int
    largest_change: float
    notices: tuple[str, ...]


def merge(
    adapter: Opened, base: str, out: Path, *, dtype: str = "", bundle: tuple[Path, Manifest] | None = None
) -> Merged:
    """Write the folder `out`: the model that `base` names (folder, hub id, GGUF, registered name) with `adapter` in it.

    `dtype`: of the written tensors (default: as in the base). With a `bundle`, its decoded weights are what the
    adapter is added to. Raises UsageError when `out` exists, DataError naming what does not fit, NoInputError.
    """
    if out.exists():
        raise UsageError("the folder exists already", field="out", value=str(out), hint="Choose another one")
    if dtype and dtype not in DTYPES:
        raise UsageError("no such type", field="dtype", value=dtype, hint=f"One of {', '.join(DTYPES)}")
    durable.make_folder(out.absolute().parent)
    place = resolve_model(base)
    if place.kind == "gguf":
        return _merge_gguf(adapter, base, out, dtype, bundle)
    return _merge_folder(adapter, _folder_of(place), out, dtype, bundle)


def _merge_folder(
    adapter: Opened, folder: Path, out: Path, dtype: str, bundle: tuple[Path, Manifest] | None
) -> Merged:
    shards = sorted(folder.glob(_WEIGHTS))
    names = [name for shard in shards for name in _names(shard)]
    if not names:
        raise UnsupportedError("no *.safetensors in the model folder", field="base", value=str(folder))
    model = _skeleton(folder)
    work = _Work(adapter, model, names, dtype, BundleWeights(*bundle, model) if bundle else {})
    with durable.appearing(out) as part:
        part.mkdir()
        for pattern in _TAKEN_ALONG:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and not (part / path.name).exists():
                    shutil.copyfile(path, part / path.name)
        for shard in shards:
            with safe_open(shard, framework="pt") as stream:
                changed = {name: work(name, stream.get_tensor(name)) for name in _names(shard)}
                metadata = stream.metadata()
            save_file(changed, part / shard.name, metadata=metadata or {"format": "pt"})
        _set_dtype(part / "config.json", dtype)
        _name_tokenizer(part)
        return work.done()


def _merge_gguf(
    adapter: Opened, base: str, out: Path, dtype: str, bundle: tuple[Path, Manifest] | None
) -> Merged:
    from quantize.source import load

    source = load(base)
    model = source.model
    names = [name for name, _ in model.named_parameters()]
    work = _Work(adapter, model, names, dtype, BundleWeights(*bundle, model) if bundle else {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = work(name, parameter.data)
    model.config.use_cache = True
    with durable.appearing(out) as part:
        model.save_pretrained(part, safe_serialization=True)
        (part / "tokenizer.json").write_bytes(source.tokenizer)
        _set_dtype(part / "config.json", dtype)
        _name_tokenizer(part)
        return work.done()


def _folder_of(place: ModelSource) -> Path:
    if place.path is not None:
        return place.path
    from quantize.source import _from_hub

    return _from_hub(place)


class _Work:
    """Changes one tensor after the other, and knows in the end whether all of the adapter was used."""

    def __init__(
        self,
        adapter: Opened,
        model: Any,
        names: list[str],
        dtype: str,
        weights: Mapping[str, Any],
    ) -> None:
        self._transposed, self._dtype, self._weights = _transposed_modules(model), dtype, weights
        self._changes = {_only(f"{pair.path}.weight", names): pair for pair in adapter.factors.values()}
        self._dense = {_only(name, names): value for name, value in adapter.dense.items()}
        self._left = set(self._changes) | set(self._dense)
        self._largest, self._notices, self._adds = 0.0, adapter.notices, adapter.dense_adds

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        dtype = DTYPES[self._dtype] if self._dtype and tensor.is_floating_point() else tensor.dtype
        if name in self._weights:
            given = torch.from_numpy(np.ascontiguousarray(self._weights[name]))
            tensor = given.t() if self._is_transposed(name) else given
        if name in self._changes:
            change = torch.from_numpy(self._changes[name].dense())
            change = change.t() if self._is_transposed(name) else change
            if change.shape != tensor.shape:
                raise DataError("adapter does not fit the base", field=name, value=tuple(tensor.shape))
            before = tensor.float()
            self._largest = max(self._largest, float(change.norm() / before.norm().clamp_min(1e-30)))
            tensor = before + change
        if name in self._dense:
            given = torch.from_numpy(np.ascontiguousarray(self._dense[name]))
            tensor = tensor.float() + given if self._adds else given
        self._left.discard(name)
        return tensor.to(dtype).contiguous()

    def done(self) -> Merged:
        """The figures. Raises DataError when a part of the adapter met no tensor."""
        if self._left:
            raise DataError("parts of the adapter met no tensor of the base", field=min(self._left))
        return Merged(len(self._changes), self._largest, self._notices)

    def _is_transposed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._transposed


def _only(wanted: str, names: list[str]) -> str:
    """The tensor of this name; made on the bare model, or saved from it, it lacks or has one word in front."""
    if wanted in names:
        return wanted
    close = [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(close) != 1:
        raise DataError(
            "the base has no such tensor",
            field="adapter",
            value=wanted,
            hint=f"A name there looks like {names[len(names) // 2]}",
        )
    return close[0]


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as stream:
        return list(stream.keys())


def _skeleton(folder: Path) -> Any:
    """The model without weights, by its class in transformers; no code that came with it is run."""
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError("config.json cannot be used", field="base", value=str(error)) from error
    named = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, named, None)
    if kind is None:
        raise UnsupportedError("this model architecture is not known", field="architecture", value=named)
    with torch.device("meta"):
        return kind(config)


def _transposed_modules(model: Any) -> frozenset[str]:
    """Modules whose weight lies (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def _set_dtype(path: Path, dtype: str) -> None:
    if not dtype:
        return
    config = json.loads(path.read_bytes())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


def _name_tokenizer(folder: Path) -> None:
    """Without a tokenizer_config.json transformers guesses a class by the model and puts its own tokens in front."""
    if not (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").exists():
        return
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
