"""PEFT adapter folders, written and read: `adapter_config.json` and `adapter_model.safetensors`.

The rule: a reader sees a whole folder or none of it, what we export computes in stock PEFT what we evaluated, and
an element type is a property of each tensor in the file, never of our expectation. Exports are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError, NoInputError
from fedge.io import durable
from fedge.io.safetensors_file import encode_tensors, read_tensors, widened
from fedge.io.weight_file import dense_starts
from fedge.lora import DENSE, LAYER_PATH, AdapterLayout, LoraConfig
from fedge.peft import CONFIG_FILE, TENSOR_FILE, lora_config, match_names, peft_config, peft_name
from fedge.release import Manifest

Floats = NDArray[np.float32]
_TASK_TYPES: Final = {"generate": "CAUSAL_LM", "classify": "SEQ_CLS", "embed": "FEATURE_EXTRACTION"}
LABELS_FILE: Final = "labels.json"
TENSOR_FILE_BYTES_MAX: Final = 512 * 1024**2  # twice the largest adapter in float32, and room


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter that was read: every `L{i}/{module}.A` and `.B` of `layout`, and every `dense/NAME`, as float32.

    `layout` is the adapter's own: ranks and layers as its config says. Dense values are as in the file, not changes.
    """

    config: LoraConfig
    base_model_name: str
    tensors: dict[str, Floats]
    notices: tuple[str, ...]
    layout: AdapterLayout


def export_peft(
    folder: Path,
    tensors: Mapping[str, Floats],
    config: LoraConfig,
    manifest: Manifest,
    weights: Path,
    *,
    layout: AdapterLayout,
) -> None:
    """Write an adapter of the bundle that `manifest` describes, so that `peft.PeftModel.from_pretrained` loads it.

    `tensors` are the adapter's: what is dense is the change, and its start is read from the checked weight file at
    `weights`. Raises StorageError, DataError.
    """
    starts = dense_starts(weights, manifest)
    write_peft(
        folder,
        {name: tensor + starts[name] if name in starts else tensor for name, tensor in tensors.items()},
        config,
        manifest.model,
        layout=layout,
        # PEFT's sequence classifiers are called with ids; its plain model hands on whatever it is given.
        task_type=None if manifest.hears is not None else _TASK_TYPES.get(manifest.task),
        fan_in_fan_out=manifest.architecture.startswith("GPT2"),
        classes=manifest.classes,
    )


def changes_of(found: PeftAdapter, weights: Path, manifest: Manifest) -> dict[str, Floats]:
    """The tensors of an adapter that was read, as an adapter of the bundle has them: what is dense as its change.

    The start is read from the checked weight file at `weights`.
    """
    dense = found.layout.dense_shapes
    if not dense:
        return found.tensors
    starts = dense_starts(weights, manifest)
    return {**found.tensors, **{name: found.tensors[name] - starts[name] for name in dense}}


def write_peft(
    folder: Path,
    tensors: Mapping[str, Floats],
    config: LoraConfig,
    base_model_name: str,
    *,
    layout: AdapterLayout | None = None,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
    classes: Sequence[str] = (),
) -> None:
    """Write tensors by our names, A and B alike. What is dense is written as given: the value, not the change.

    Without a `layout` the layers are taken to be at `model.layers`. Names of `classes` go beside it, in the words in
    which transformers takes them for a model: `AutoModelForSequenceClassification.from_pretrained(base, **labels)`.
    """
    path = LAYER_PATH if layout is None else layout.layer_path
    named = {peft_name(name, path): tensor for name, tensor in tensors.items()}
    fields = peft_config(
        config, base_model_name, layout=layout, task_type=task_type, fan_in_fan_out=fan_in_fan_out
    )
    durable.make_folder(folder)
    durable.write_bytes(folder / TENSOR_FILE, encode_tensors(named))
    durable.write_bytes(folder / CONFIG_FILE, msgspec.json.format(msgspec.json.encode(fields), indent=2))
    if classes:
        names = dict(enumerate(classes))
        labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        durable.write_bytes(folder / LABELS_FILE, msgspec.json.format(msgspec.json.encode(labels), indent=2))


def read_peft(folder: Path, layout: AdapterLayout, *, classes: Sequence[str] = ()) -> PeftAdapter:
    """Read a PEFT folder for the model of `layout`: each tensor in the file has its place, each place its tensor.

    The places are those of the file's own config among the modules that `layout` has; rank and layers may differ, and
    so may how much of the head it brings. `classes` are those of the bundle, in order. Raises NoInputError, DataError
    naming file and tensor, UnsupportedError naming the config field or the type.
    """
    fields = read_config(folder / CONFIG_FILE)
    config, notices = lora_config(fields)
    theirs = layout.like(config)
    path = folder / TENSOR_FILE
    raw = read_tensors(path, bytes_max=TENSOR_FILE_BYTES_MAX)
    match = match_names(raw, theirs)
    tensors = {ours: widened(path, name, raw[name]) for name, ours in match.ours.items()}
    for name, shape in {**theirs.a_shapes, **theirs.shapes}.items():
        if tensors[name].shape != shape:
            raise DataError(
                f"{path}: tensor has another shape",
                field=name,
                value=tensors[name].shape,
                hint=f"The bundle has {shape} here"
                + (": another number of classes, or another model" if name.startswith(DENSE) else ""),
            )
    if not any(tensors[name].any() for name in theirs.b_shapes):
        notices += ("every B is zero: the adapter has no effect yet",)
    if theirs.dense:
        _check_classes(folder / LABELS_FILE, classes)
    notices += _head_notice(layout, theirs)
    base = fields.get("base_model_name_or_path")
    return PeftAdapter(
        config, base if isinstance(base, str) else "", tensors, notices + match.notices, theirs
    )


def _head_notice(layout: AdapterLayout, theirs: AdapterLayout) -> tuple[str, ...]:
    own = [name for name, _ in layout.dense if name not in dict(theirs.dense)]
    if not own:
        return ()
    if not theirs.dense:
        return ("the adapter has no head: the bundle's own is kept",)
    return (f"the adapter has no {', '.join(own)}: the bundle's own is kept",)


def _check_classes(path: Path, classes: Sequence[str]) -> None:
    """Rows of a head mean classes by their order alone; where both sides name them they must agree."""
    if not classes or not path.exists():
        return
    try:
        named = msgspec.json.decode(path.read_bytes(), type=_Labels).id2label
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} cannot be read: {error}", field=LABELS_FILE) from error
    found = [named[key] for key in sorted(named)]
    if sorted(named) != list(range(len(classes))) or found != list(classes):
        raise DataError(
            f"{path}: the adapter's head tells other classes apart, or has them in another order",
            field="id2label",
            value=found[:8],
            hint=f"The bundle's are, in order: {', '.join(classes[:8])}",
        )


class _Labels(msgspec.Struct):
    id2label: dict[int, str]


def read_config(path: Path) -> dict[str, object]:
    """The fields of an `adapter_config.json`. Raises NoInputError, DataError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError as error:
        raise NoInputError("adapter config does not exist", field="path", value=str(path)) from error
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} cannot be read: {error}", field=CONFIG_FILE) from error
