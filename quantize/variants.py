"""More ways to cut the joint graph of a block, for boards that have memory to spare or a bottom layer to train.

`block_fwd_keep` also gives the products of the frozen matrices that the way back would compute again, and
`block_bwd_keep` takes them: a third less arithmetic for the numbers that stay in memory. `block_bwd_first` leaves
out the gradient of the block's input, which the lowest trained layer hands to nobody.

A variant is cut only where it pays: by matrix products, of which ONNX Runtime runs all that a graph has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import onnx
from onnx import TensorProto, helper

from quantize.graph import make_model, select
from quantize.placeholder import DOMAIN, LINEAR, LINEAR_DX

KEEP: Final = "keep:"  # prefix of the tensors that travel from block_fwd_keep to block_bwd_keep
_INPUT_GRADIENT: Final = "gx"


def block_variants(joint: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """Graph name -> graph with placeholders, from the joint one: outputs y, gx and g:NAME for each adapter tensor."""
    backward = [value.name for value in joint.graph.output if value.name != "y"]
    again = {node.output[0]: KEEP + node.input[1].removesuffix(".w") for node in _products(joint, backward)}
    variants = {}
    if again:
        kept = _renamed(joint, again)
        variants["block_fwd_keep"] = select(_with_outputs(kept, again.values()), ["y", *again.values()])
        variants["block_bwd_keep"] = select(_with_inputs(kept, again.values()), backward)
    first = [name for name in backward if name != _INPUT_GRADIENT]
    if first and _count(joint, first) < _count(joint, backward):
        variants["block_bwd_first"] = select(joint, first)
    return variants


def _products(model: onnx.ModelProto, outputs: list[str]) -> list[onnx.NodeProto]:
    """The forward products of frozen matrices that computing `outputs` takes, in order."""
    return [n for n in select(model, outputs).graph.node if n.domain == DOMAIN and n.op_type == LINEAR]


def _count(model: onnx.ModelProto, outputs: list[str]) -> int:
    return sum(node.op_type in (LINEAR, LINEAR_DX) for node in select(model, outputs).graph.node)


def _renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """A copy in which values have other names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    outputs = [*model.graph.output, *_floats(names)]
    return make_model(model.graph.node, model.graph.input, outputs, model.graph.initializer)


def _with_inputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with these values given from outside instead of computed."""
    given = set(names)
    nodes = [node for node in model.graph.node if not given.intersection(node.output)]
    inputs = [*model.graph.input, *_floats(names)]
    return make_model(nodes, inputs, model.graph.output, model.graph.initializer)


def _floats(names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    """Declarations of [batch, length, width] tensors whose sizes the graph does not fix."""
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None]) for name in names]
