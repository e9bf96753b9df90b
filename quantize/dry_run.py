"""What `fedge quantize` would make, told in seconds: no weight is read and nothing is written.

The model is built without storage from its configuration (of a folder) or its header (of a GGUF), so every matrix has
its size; the weight file is laid out on paper as `quantize.weights` would lay it out, and its size is exact. What
memory a step takes on a board is for the device's own planner to say: it gets a draft of the manifest, in a temporary
folder, through `fedge bundle plan`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.audio import AudioInput
from fedge.errors import DataError, FedgeError, UnsupportedError
from fedge.io.model_source import resolve_model
from fedge.lora import DENSE, LoraConfig
from fedge.release import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    SentenceVectors,
    TensorPlace,
    encode_manifest,
    sign_manifest,
)
from quantize.audio import check_audio_config, is_audio, outline_audio
from quantize.blocks import adapted_modules, graph_config, linears_of, matrix_of
from quantize.encoders import outline_classifier, task_for, task_of, with_targets
from quantize.formats import EMBEDDING_FORMAT, FORMATS, WeightFormat
from quantize.inputs import hears
from quantize.sentences import outline_sentences, vectors_of
from quantize.source import no_classes, no_seconds, other_task
from quantize.supported import check_config, kind_of
from quantize.tail import norms_of
from quantize.watching import layers_of, layers_path_of

# GGUF types whose grid a format of ours holds, smallest format first; a K-quant is refitted.
_EXACT: Final = {
    "Q4_0": ("int4d", "int8g", "int8d"),
    "Q4_1": ("int4d", "int8d"),
    "Q5_0": ("int8g", "int8d"),
    "Q5_1": ("int8d",),
    "Q8_0": ("int8g", "int8d"),
}
_AUTO: Final = (None, "auto")
_REFIT: Final = "int8g"
_PAGE, _LINE = 4096, 64  # as quantize.weights aligns
_PLAN_SECONDS_MAX: Final = 120
# Graphs without weights: measured 9 KB a layer in infer.onnx and up to 17 KB in each of the others (SmolLM2-135M).
_GRAPH_BYTES_LAYER: Final = 9_000
_GRAPH_BYTES: Final = 10_000
_GRAPHS: Final = (
    "block_fwd.onnx",
    "block_bwd.onnx",
    "block_fwd_keep.onnx",
    "block_bwd_keep.onnx",
    "block_bwd_first.onnx",
)


@dataclass(frozen=True, slots=True)
class Outline:
    """A model by its sizes: the skeleton, where its layers are, what the file says of itself."""

    model: Any  # on torch's meta device: shapes and no storage
    architecture: str
    name: str
    tokenizer_bytes: int
    grids: frozenset[str] = frozenset()  # types of the matrices in a GGUF; empty for a folder
    classes: tuple[str, ...] = ()  # of a classifier
    vectors: SentenceVectors | None = None  # of a sentence encoder
    audio: AudioInput | None = None  # of a classifier of sound

    @property
    def task(self) -> str:
        """As `source.Source.task`."""
        return task_for(self.classes, self.vectors)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What quantising would give. `boards` is what `fedge bundle plan` says; sizes in bytes."""

    model: str
    architecture: str
    weights_format: str
    exact: bool
    reason: str
    parameters: int
    weights_bytes: int
    bundle_bytes: int
    adapter: dict[str, Any]
    tokens_per_step: int
    boards: list[dict[str, Any]]


def forecast(
    source: str,
    lora: LoraConfig,
    requested: str | None,
    classes: Sequence[str] = (),
    task: str = "",
    seconds: float = 0,
) -> Forecast:
    """Raises the refusals that quantising itself would raise for this configuration, before any weight is read."""
    outline = outline_of(source, classes, task, seconds)
    if outline.task != "generate":
        lora = with_targets(outline.model, lora)
    fmt, exact, reason = _format(outline, requested)
    manifest = draft(outline, lora, fmt)
    plan = _plan(manifest)
    layout = manifest.layout
    return Forecast(
        model=outline.name,
        architecture=outline.architecture,
        weights_format=fmt.name,
        exact=exact,
        reason=reason,
        parameters=sum(value.numel() for value in outline.model.parameters()),
        weights_bytes=manifest.files[WEIGHTS].size,
        bundle_bytes=sum(entry.size for entry in manifest.files.values()),
        adapter={
            "matrices": len(layout.slots),
            "rank": layout.r,
            "numbers": layout.numbers,
            "bytes": 4 * layout.numbers,
            "modules": sorted(manifest.lora_shapes),
        },
        tokens_per_step=plan["tokens_per_step"],
        boards=plan["boards"],
    )


def outline_of(source: str, classes: Sequence[str] = (), task: str = "", seconds: float = 0) -> Outline:
    """The outline of a model folder or a GGUF; `classes`, `task` and `seconds` as `source.load` has them.

    Raises what loading it would; UnsupportedError for a hub id.
    """
    place = resolve_model(source)
    if place.path is None:
        raise UnsupportedError(
            "a dry run reads local files only",
            field="model",
            value=place.hub_id,
            hint="Download the model first",
        )
    if place.kind != "gguf":
        return _of_folder(place.path, classes, task, seconds)
    if classes:
        raise no_classes(place.path.name)
    if seconds:
        raise no_seconds(place.path.name)
    if task not in ("", "generate"):
        raise other_task(place.path.name, task, "generate")
    return _of_gguf(place.path)


def _of_folder(folder: Path, classes: Sequence[str], task: str, seconds: float) -> Outline:
    from transformers import AutoConfig

    try:
        text = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise DataError("config.json is not JSON", field="model", value=str(folder)) from error
    if is_audio(text):
        if task not in ("", "classify"):
            raise other_task(str(text["model_type"]), task, "classify")
        heard = outline_audio(folder, check_audio_config(text), classes, seconds)
        own = type(heard.model).__name__, folder.resolve().name
        return Outline(heard.model, *own, 0, classes=heard.classes, audio=heard.audio)
    architecture = check_config(text)
    if seconds:
        raise no_seconds(architecture)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vocabulary = folder / "tokenizer.json"
    size = vocabulary.stat().st_size if vocabulary.is_file() else 0
    name = folder.resolve().name
    if classes and kind_of(architecture) == "generate":
        raise no_classes(architecture)
    task = task_of(folder, architecture, classes, task)
    if task == "embed":
        vectors = vectors_of(folder)
        return Outline(outline_sentences(config, vectors), architecture, name, size, vectors=vectors)
    if task == "classify":
        opened = outline_classifier(config, architecture, classes)
        return Outline(opened.model, architecture, name, size, classes=opened.classes)
    return Outline(_skeleton(config), architecture, name, size)


def _of_gguf(path: Path) -> Outline:
    from gguf import GGUFReader

    from quantize import tokenizer as tokenizers
    from quantize.gguf_families import Fields, config_of

    try:
        reader = GGUFReader(path)
        fields = Fields({name: value.contents() for name, value in reader.fields.items()})
    except (ValueError, IndexError, KeyError) as error:
        raise DataError("the GGUF cannot be read", field="model", value=f"{path.name}: {error}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = config_of(fields, tensors)
    check_config({key: value for key, value in config.to_diff_dict().items() if value is not None})
    grids = {t.tensor_type.name for n, t in tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    name = str(fields.get("general.basename") or fields.get("general.name") or path.stem)
    size = len(tokenizers.from_gguf(fields))
    return Outline(_skeleton(config), config.architectures[0], name, size, frozenset(grids))


def _skeleton(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _format(outline: Outline, requested: str | None) -> tuple[WeightFormat, bool, str]:
    """The format that `quantize.choice` would take, as far as a header tells."""
    kept = set(_EXACT["Q4_0"])
    for grid in outline.grids:
        kept &= set(_EXACT.get(grid, ()))
    kept = kept if outline.grids else set()
    if requested not in _AUTO:
        if requested not in FORMATS:
            known = ", ".join(["auto", *FORMATS])
            raise UnsupportedError(
                "no such weight format", field="format", value=requested, hint=f"Known: {known}"
            )
        return FORMATS[str(requested)], requested in kept, "asked for"
    for name in _EXACT["Q4_0"]:
        if name in kept:
            return FORMATS[name], True, f"{name} holds every weight of the source as it is"
    grid = (
        f"the source has {', '.join(sorted(outline.grids))}"
        if outline.grids
        else "the source has float weights"
    )
    return FORMATS[_REFIT], False, f"{grid}; {_REFIT} costs least"


# ---------------------------------------------------------------- the manifest on paper
def draft(outline: Outline, lora: LoraConfig, fmt: WeightFormat) -> Manifest:
    """A manifest with the sizes of everything and the hash of nothing. Raises UnsupportedError, ConfigError."""
    model, config = outline.model, outline.model.config
    path, layers = layers_path_of(model), layers_of(model)
    places, size = _laid_out(model, layers, fmt)
    graphs = dict.fromkeys(_GRAPHS, _GRAPH_BYTES)
    if outline.task == "embed":
        graphs |= dict.fromkeys(("pool.onnx", "pool_bwd.onnx"), _GRAPH_BYTES // 10)
    else:
        graphs["classify.onnx" if outline.classes else "infer.onnx"] = _GRAPH_BYTES_LAYER * len(layers)
    sizes = {WEIGHTS: size, **graphs}
    if outline.audio is None:
        sizes[TOKENIZER] = outline.tokenizer_bytes
    heads = int(getattr(config, "num_attention_heads", 1))
    rows, hidden = (0, config.hidden_size) if outline.audio else model.get_input_embeddings().weight.shape
    return Manifest(
        format=FORMAT,
        model=outline.name,
        architecture=outline.architecture,
        licence="",
        source_sha256="",
        weights_format=fmt.name,
        embedding_format=EMBEDDING_FORMAT,
        layers=len(layers),
        hidden=hidden,
        vocabulary=rows,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        positions_max=int(getattr(config, "max_position_embeddings", 0) or 0),
        head_tied=bool(getattr(config, "tie_word_embeddings", False)),
        eos_id=0,
        pad_id=0,
        lora=lora,
        lora_shapes=adapted_modules(model, graph_config(model, lora)),
        aux=(),
        head_rows=4096 if outline.task == "generate" else 0,
        operators=(),
        runtime_min="0",
        tensors=places,
        files={name: FileEntry(size=size, sha256="0" * 64) for name, size in sizes.items()},
        gates={},
        publisher="",
        layer_path=path,
        task=outline.task,
        classes=outline.classes,
        vectors=outline.vectors or msgspec.UNSET,
        audio=outline.audio or msgspec.UNSET,
        dense={
            name.removeprefix(DENSE): place.shape for name, place in places.items() if name.startswith(DENSE)
        },
    )


def _laid_out(model: Any, layers: list[Any], fmt: WeightFormat) -> tuple[dict[str, TensorPlace], int]:
    places: dict[str, TensorPlace] = {}
    at = 0
    for name, shape, dtype in _tensors(model, layers, fmt):
        size = prod(shape) * np.dtype(dtype).itemsize
        step = _PAGE if size >= _PAGE else _LINE
        at += -at % step
        places[name] = TensorPlace(offset=at, shape=shape, dtype=dtype)
        at += size
    return places, at


def _tensors(model: Any, layers: list[Any], fmt: WeightFormat) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Every tensor of the weight file in its order: layers, tables, what stands outside the layers."""
    inside = set()
    for index, layer in enumerate(layers):
        matrices = linears_of(layer)
        for name, parameter in layer.named_parameters():
            inside.add(parameter)
            module, _, kind = name.rpartition(".")
            if module in matrices and kind == "weight":
                yield from _matrix(f"L{index}/{module}.w", matrix_of(matrices[module]).shape, fmt)
            else:
                yield f"L{index}/{name}", tuple(parameter.shape), "float32"
    output = model.get_output_embeddings()
    table = None if hears(model) else model.get_input_embeddings().weight
    head = table if output is None else output.weight
    tables = [] if table is None else [("EMB", table)]
    for name, matrix in (*tables, *([] if head is table else [("HEAD", head)])):
        yield from _matrix(name, matrix.shape, FORMATS[EMBEDDING_FORMAT])
    trained = _head_of(model, layers) if output is None else []
    for name, parameter in model.named_parameters():
        if name not in trained and not any(parameter is other for other in (*inside, table, head)):
            yield name, tuple(parameter.shape), "float32"
    for name in trained:
        yield DENSE + name, tuple(model.get_parameter(name).shape), "float32"


def _head_of(model: Any, layers: list[Any]) -> list[str]:
    """A classifier's parameters that are trained in full: what comes after the last layer and is no norm."""
    norms = norms_of(model)
    named = list(model.named_parameters())
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    last = max(index for index, (_, parameter) in enumerate(named) if id(parameter) in inside)
    return sorted(name for name, _ in named[last + 1 :] if name.rpartition(".")[0] not in norms)


def _matrix(name: str, shape: Any, fmt: WeightFormat) -> Iterator[tuple[str, tuple[int, ...], str]]:
    rows, columns = shape
    for part in fmt.parts:
        yield f"{name}.{part.suffix}", tuple(map(int, part.shape(rows, columns))), part.dtype


def _plan(manifest: Manifest) -> dict[str, Any]:
    """What the device's planner makes of the draft."""
    with tempfile.TemporaryDirectory(prefix="fedge-draft-") as folder:
        key = Ed25519PrivateKey.generate()  # nobody believes it: the folder is gone in a moment
        data = encode_manifest(
            msgspec.structs.replace(manifest, publisher=key.public_key().public_bytes_raw().hex())
        )
        (Path(folder) / MANIFEST).write_bytes(data)
        (Path(folder) / SIGNATURE).write_bytes(sign_manifest(data, key))
        words = [sys.executable, "-m", "fedge", "bundle", "plan", folder, "--json"]
        done = subprocess.run(  # noqa: S603 - a list of our own words, no shell
            words, capture_output=True, text=True, timeout=_PLAN_SECONDS_MAX, check=False
        )
    if done.returncode:
        raise FedgeError(f"the planner gave no answer: {done.stderr.strip()}")
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan
