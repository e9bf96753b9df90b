"""A bundle's inference graph as a folder that Hugging Face's `optimum.onnxruntime` loads and generates with.

The graph is the bundle's own, over the same weight file; only its edges change: inputs and outputs get the names that
optimum looks for, every position's logits are given, and the adapter is folded in as constants. The graph knows no
padding, so a padded batch gets logits that are no numbers instead of wrong ones.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedge.errors import UnsupportedError, UsageError
from fedge.io import durable
from fedge.io.adapter_file import Adapter
from fedge.release import TOKENIZER, WEIGHTS, Manifest

GRAPH: Final = "infer.onnx"
_OUT: Final = "model.onnx"
# Where optimum-onnx 0.1 (`modeling_decoder.py`) takes sizes of the cache from; for all others it assumes one key head
# for each query head, and heads that share the hidden width evenly.
_OWN_KEY_HEADS: Final = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"}
_OWN_HEAD_WIDTH: Final = {"gemma", "gemma3_text"}


def write_optimum(out: Path, bundle: Path, manifest: Manifest, adapter: Adapter | None) -> None:
    """Write the folder `out`; without an adapter, the model as it was quantised.

    Raises UsageError when `out` exists, UnsupportedError for a bundle that cannot be decoded, or whose cache optimum
    would give another shape, StorageError.
    """
    if out.exists():
        raise UsageError("the folder exists already", field="out", value=str(out), hint="Choose another one")
    if GRAPH not in manifest.files:
        raise UnsupportedError("this bundle has no inference graph", field="files", value=GRAPH)
    model_type = _model_type(manifest)
    _check_cache(manifest, model_type)
    model = renamed(onnx.load(bundle / GRAPH, load_external_data=False), _fed(manifest, adapter))
    durable.make_folder(out.absolute().parent)
    with durable.appearing(out) as part:
        part.mkdir()
        _share(bundle / WEIGHTS, part / WEIGHTS)
        (part / _OUT).write_bytes(model.SerializeToString(deterministic=True))
        shutil.copyfile(bundle / TOKENIZER, part / TOKENIZER)
        _write_config(part, manifest, model_type)


def renamed(model: onnx.ModelProto, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The graph under optimum's names, with `tensors` in the place of the inputs of that name."""
    graph, names = model.graph, {"ids": "input_ids", "positions": "position_ids"}
    for value in (*graph.input, *graph.output):
        found = value.name.removeprefix("n")
        if found[:1] in "kv" and found[1:].isdigit():
            side = "present" if value.name.startswith("n") else "past_key_values"
            names[value.name] = f"{side}.{found[1:]}.{'key' if found[0] == 'k' else 'value'}"
    inner = {"logits": "logits of what was read"}
    nodes = [_with_names(node, names | inner) for node in graph.node]
    declared = [value for value in graph.input if value.name not in tensors and value.name != "at"]
    for value in (*declared, *graph.output):
        value.name = names.get(value.name, value.name)
    order = {"input_ids": 0, "position_ids": 2}
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"])
    inputs = sorted([*declared, mask], key=lambda value: order.get(value.name, 1 if value is mask else 3))
    constants = [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in sorted(tensors.items())]
    before, after = _edges("at" in {value.name for value in graph.input}, inner["logits"])
    made = helper.make_graph(
        [*before, *nodes, *after], graph.name, inputs, graph.output, [*graph.initializer, *constants]
    )
    opsets = model.opset_import
    return helper.make_model(made, opset_imports=opsets, ir_version=model.ir_version)


def _edges(has_places: bool, logits: str) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes before and after: `at` = all positions; logits that are no numbers when something is padded."""

    def constant(name: str, value: Any, dtype: type) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype)))

    before = [
        constant("zero", 0, np.int64),
        constant("one", 1, np.int64),
        helper.make_node("Shape", ["input_ids"], ["shape of ids"]),
        helper.make_node("Gather", ["shape of ids", "one"], ["tokens"]),
        helper.make_node("Range", ["zero", "tokens", "one"], ["at"]),
    ]
    after = [
        constant("no number", np.nan, np.float32),
        helper.make_node("ReduceMin", ["attention_mask"], ["lowest"], keepdims=0),
        helper.make_node("Cast", ["lowest"], ["nothing padded"], to=TensorProto.BOOL),
        helper.make_node("Where", ["nothing padded", logits, "no number"], ["logits"]),
    ]
    return (before if has_places else []), after


def _with_names(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _fed(manifest: Manifest, adapter: Adapter | None) -> dict[str, np.ndarray]:
    """A and B for every place in the graph: of any rank, B in the scale that the graph has built in, or zeros."""
    layout = manifest.layout
    slots = {} if adapter is None else {slot.name: slot for slot in adapter.header.layout.slots}
    fed = {}
    for path, module in layout.graph.items():
        for layer in range(manifest.layers):
            name = f"L{layer}/{path}"
            slot = slots.pop(name, None)
            if adapter is None or slot is None:
                fed[f"{name}.A"] = np.zeros((1, module.n_in), np.float32)
                fed[f"{name}.B"] = np.zeros((module.out, 1), np.float32)
                continue
            fed[f"{name}.A"] = adapter.tensors[f"{name}.A"]
            fed[f"{name}.B"] = adapter.tensors[f"{name}.B"] * np.float32(slot.scale / module.scale)
    if slots:
        raise UnsupportedError(
            "the bundle's graph has no place for this module", field="module", value=min(slots)
        )
    return fed


def _model_type(manifest: Manifest) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = [t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == manifest.architecture]
    if types:
        return str(min(types, key=len))  # llama, not code_llama
    raise UnsupportedError(
        "optimum generates with causal language models", field="architecture", value=manifest.architecture
    )


def _check_cache(manifest: Manifest, model_type: str) -> None:
    key_heads = manifest.kv_heads if model_type in _OWN_KEY_HEADS else manifest.heads
    width = manifest.head_dim if model_type in _OWN_HEAD_WIDTH else manifest.hidden // manifest.heads
    if (key_heads, width) != (manifest.kv_heads, manifest.head_dim):
        raise UnsupportedError(
            f"optimum would give a {model_type} another cache than it has",
            field="kv_heads, head_dim",
            value=(manifest.kv_heads, manifest.head_dim),
            hint=f"It would take {(key_heads, width)}; use `--to gguf`, `--to hf` or fedge itself",
        )


def _write_config(folder: Path, manifest: Manifest, model_type: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        model_type,
        architectures=[manifest.architecture],
        vocab_size=manifest.vocabulary,
        hidden_size=manifest.hidden,
        num_hidden_layers=manifest.layers,
        num_attention_heads=manifest.heads,
        num_key_value_heads=manifest.kv_heads,
        head_dim=manifest.head_dim,
        max_position_embeddings=manifest.positions_max,
        tie_word_embeddings=manifest.head_tied,
        bos_token_id=None,
        eos_token_id=manifest.eos_id,
        pad_token_id=manifest.pad_id,
        use_cache=True,
    )
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=manifest.eos_id, pad_token_id=manifest.pad_id).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    words = {
        name: tokenizer.id_to_token(number)
        for name, number in (("eos_token", manifest.eos_id), ("pad_token", manifest.pad_id))
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(folder)


def _share(source: Path, target: Path) -> None:
    """One copy of the weights when both lie on one disk; the runtime refuses symbolic links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
