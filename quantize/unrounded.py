"""A graph of integer products with its rounding taken out, so that it can be held to torch as closely as any other.

Where activations are rounded on purpose (`quantize.products.Integers`), a difference from torch may be rounding or a
mistake. The copy that is made here differs in that alone: codes of activations stay the floats that they were before
they became whole numbers, and are multiplied with the weights' codes as floats. What is left is a mistake.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

_FLOATS = "unrounded/"


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph in which no activation is rounded. Graphs without integer products come back as they are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = list(copy.graph.node)
    sizes = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Squeeze"}
    codes = {node.output[0]: sizes[node.input[1]] for node in nodes if node.op_type == "QuantizeLinear"}
    del copy.graph.node[:]
    for node in nodes:
        name = node.output[0]
        if node.op_type == "QuantizeLinear":
            copy.graph.node.append(helper.make_node("Div", [node.input[0], codes[name]], [name]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in codes:
            copy.graph.node.append(helper.make_node("Mul", [node.input[0], codes[node.input[0]]], [name]))
        elif node.op_type == "MatMulIntegerToFloat":
            copy.graph.node.extend(_product(node))
        else:
            copy.graph.node.append(node)
    return copy


def _product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x W by floats: the scale of x is 1, and its zero is where it was."""
    x, weight, _, scale, *_ = node.input
    name = node.output[0]
    floats, scaled = f"{_FLOATS}{name}/w", f"{_FLOATS}{name}/s"
    return [
        helper.make_node("Cast", [weight], [floats], to=TensorProto.FLOAT),
        helper.make_node("Mul", [floats, scale], [scaled]),
        helper.make_node("MatMul", [x, scaled], [name]),
    ]
