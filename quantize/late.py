"""Weights are made dense when they are needed, and not before.

A node that reads nothing but weights is ready from the start, and ONNX Runtime runs what is ready: all matrices of a
block lie dense in memory before the first product. So each is made to wait: the stored bytes pass through a Reshape
to the shape that they have, and that shape is computed from the activation that the matrix will be multiplied by.
The Reshape copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.graph import make_model
from quantize.variants import KEEP

_SMALL: Final = 16_384  # stored bytes; below, waiting is not worth two nodes
_NOTHING: Final = "late/zero"
_STORED: Final = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT4)


def late_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in which large stored matrices wait for the activations that they meet first."""
    graph = model.graph
    stored = {value.name: _sizes(value) for value in graph.input if _is_large(value)}
    waits = _first_met(graph, stored)
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    constants, nodes = list(copy.initializer), list(copy.node)
    for name, activation in waits.items():
        late, sizes = _late(name), f"{_late(name)}/sizes"
        for node in nodes:
            node.input[:] = [late if read == name else read for read in node.input]
        constants.append(numpy_helper.from_array(np.array(stored[name], np.int64), sizes))
        nodes += [
            helper.make_node("Shape", [activation], [f"{late}/rows"], start=0, end=1),
            helper.make_node("Mul", [f"{late}/rows", _NOTHING], [f"{late}/nothing"]),
            helper.make_node("Add", [sizes, f"{late}/nothing"], [f"{late}/shape"]),
            helper.make_node("Reshape", [name, f"{late}/shape"], [late]),
        ]
    if waits:
        constants.append(numpy_helper.from_array(np.array([0], np.int64), _NOTHING))
    return make_model(
        _on_demand(nodes, _weights(graph) | set(map(_late, waits))), graph.input, graph.output, constants
    )


def _first_met(graph: onnx.GraphProto, stored: Mapping[str, list[int]]) -> dict[str, str]:
    """For each stored matrix the activation that it is multiplied by first; in the order of the graph."""
    free = _weights(graph)
    sources: dict[str, set[str]] = {name: {name} for name in stored}
    waits: dict[str, str] = {}
    for node in graph.node:
        read = set[str]().union(*(sources.get(name, set()) for name in node.input))
        met = [name for name in node.input if name not in free]
        if met:
            waits |= {name: met[0] for name in sorted(read) if name not in waits}
        else:
            free.update(node.output)
            sources.update((name, read) for name in node.output)
    return waits


def _weights(graph: onnx.GraphProto) -> set[str]:
    """Names of what is the same for every text: frozen tensors and constants."""
    inputs = {value.name for value in graph.input if "." in value.name}
    adapters = {name for name in inputs if name.endswith((".A", ".B")) or name.startswith(KEEP)}
    return (inputs - adapters) | {tensor.name for tensor in graph.initializer} | {""}


def _on_demand(nodes: Sequence[onnx.NodeProto], weights: set[str]) -> list[onnx.NodeProto]:
    """The nodes in an order in which each stands just before the first that reads it."""
    producer = {name: node for node in nodes for name in node.output}
    order: list[onnx.NodeProto] = []
    done: set[int] = set()
    free = set(weights)
    for wanted in nodes:
        if free.issuperset(wanted.input):
            free.update(wanted.output)
            continue
        stack = [wanted]
        while stack:
            node = stack[-1]
            needed = [producer[name] for name in node.input if name in producer]
            missing = [other for other in needed if id(other) not in done]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if id(node) not in done:
                done.add(id(node))
                order.append(node)
    return order


def _late(name: str) -> str:
    return f"late/{name}"


def _is_large(value: onnx.ValueInfoProto) -> bool:
    kind, sizes = value.type.tensor_type, _sizes(value)
    return kind.elem_type in _STORED and bool(sizes) and all(sizes) and math.prod(sizes) >= _SMALL


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value for size in value.type.tensor_type.shape.dim]
