"""A classifier's head in two graphs: what does not depend on anything that trains, and the rest.

While the encoder is frozen, what its head reads of a text is the same in every epoch, and for most heads it is one
short vector: the mean over the text, or its first token. `features.onnx` gives that vector, `head.onnx` goes on from
it; a device keeps the vector and runs the encoder once for each row. Both are cut out of the graph of the whole head,
node for node, so that they compute what it computes.

Heads whose first trained matrix meets every token (a score for each position) have no such vector and stay whole.
"""

from __future__ import annotations

from typing import Final

import onnx

from fedge.lora import DENSE
from quantize.graph import select, tensor_input

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
    value = tensor_input(VECTOR, "float32", ("b", "f"))
    named = _named(whole, vector, value)
    outputs = [output.name for output in whole.graph.output if output.name != "gh"]
    first = select(named, [VECTOR])
    second = select(_sized_by_labels(named), outputs, given=[value])
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


def _named(whole: onnx.ModelProto, vector: str, value: onnx.ValueInfoProto) -> onnx.ModelProto:
    """A copy of the graph whose inner value `vector` has the name of `value`, and is an output as well."""
    copy = onnx.ModelProto()
    copy.CopyFrom(whole)
    for node in copy.graph.node:
        for names in (node.input, node.output):
            names[:] = [value.name if name == vector else name for name in names]
    copy.graph.output.append(value)
    return copy


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
