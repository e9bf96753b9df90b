"""A classifier's head in two graphs: what does not depend on anything that trains, and the rest.

While the encoder is frozen, what its head reads of a text is the same in every epoch, and for most heads it is one
short vector: the mean over the text, or its first token. `features.onnx` gives that vector, `head.onnx` goes on from
it; a device keeps the vector and runs the encoder once for each row. Both are cut out of the graph of the whole head,
node for node, so that they compute what it computes.

Heads whose first trained matrix meets every token (a score for each position) have no such vector and stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import onnx

from fedge.lora import DENSE
from quantize.graph import make_model, select, tensor_input

FEATURES: Final = "features.onnx"
HEAD: Final = "head.onnx"
VECTOR: Final = "f"  # [B, F]
_TEXT: Final = ("h", "input_ids", "input_features", "attention_mask")
_TRAINED: Final = ("labels", DENSE)  # what the second graph is given, beside the vector


def features_and_head(whole: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """File name -> graph of the two halves of a head's graph; empty where it has no vector to be cut at."""
    vector = _vector(whole)
    if vector is None:
        return {}
    wanted = [value.name for value in whole.graph.output if value.name != "gh"]
    first = _computing(whole, {vector}, {vector: VECTOR}, [tensor_input(VECTOR, "float32", ("b", "f"))])
    outputs = [value for value in whole.graph.output if value.name in wanted]
    second = _computing(_sized_by_labels(whole), wanted, {vector: VECTOR}, outputs, given=vector)
    left = {value.name for value in second.graph.input}
    if left.intersection(_TEXT):
        return {}  # the way back reads more of the text than the way there
    return {FEATURES: first, HEAD: second}


def _vector(whole: onnx.ModelProto) -> str | None:
    """The one [B, F] value through which the logits see the text, if there is one."""
    forward = select(whole, ["nll", "logits"])
    trained = {v.name for v in forward.graph.input if v.name.startswith(_TRAINED)}
    text = {v.name for v in forward.graph.input if v.name.startswith(_TEXT)}
    met = set[str]()
    for node in forward.graph.node:
        read = set(node.input)
        if read & trained:
            met |= read & text
            trained.update(node.output)
        elif read & text:
            text.update(node.output)
    return met.pop() if len(met) == 1 and _rank(whole, next(iter(met))) == 2 else None


def _sized_by_labels(whole: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph that asks its labels how many rows there are, and not its text."""
    changed = onnx.ModelProto()
    changed.CopyFrom(whole)
    for node in changed.graph.node:
        if node.op_type == "Shape" and node.input[0] in _TEXT:
            span = {attribute.name: attribute.i for attribute in node.attribute}
            if span.get("start", 0) == 0 and span.get("end") == 1:
                node.input[0] = "labels"
    return changed


def _rank(model: onnx.ModelProto, name: str) -> int | None:
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for value in (*found.value_info, *found.input):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    return None


def _computing(
    whole: onnx.ModelProto,
    wanted: Iterable[str],
    renamed: Mapping[str, str],
    outputs: list[onnx.ValueInfoProto],
    given: str = "",
) -> onnx.ModelProto:
    """The nodes that compute `wanted`, as far back as to what is `given`; its own inputs and constants alone."""
    needed, nodes = set(wanted), list[onnx.NodeProto]()
    for node in reversed(whole.graph.node):
        if needed.difference({given}).intersection(node.output):
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            needed.update(node.input)
            for names in (copied.input, copied.output):
                names[:] = [renamed.get(name, name) for name in names]
            nodes.insert(0, copied)
    inputs = [value for value in whole.graph.input if value.name in needed]
    if given:
        inputs.insert(0, tensor_input(renamed[given], "float32", ("b", "f")))
    constants = [tensor for tensor in whole.graph.initializer if tensor.name in needed]
    return make_model(nodes, inputs, outputs, constants)
