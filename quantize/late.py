"""Weights are made dense when they are needed, not before, and not kept for later.

A node that reads nothing but weights is ready from the start, and ONNX Runtime runs what is ready: all matrices of a
block lie dense in memory before the first product, and stay there for the way back. So each product makes its own
(a pass over the codes takes a few hundredths of a product with 256 rows), and each is made to wait: the stored bytes
pass through a Reshape to the shape that they have, and that shape is computed from the activation that the matrix
will be multiplied by. The Reshape copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """The same model, in which each product with a large stored matrix makes it dense for itself, just before."""
    graph = model.graph
    stored = {value.name: _sizes(value) for value in graph.input if _is_large(value)}
    if not stored:
        return model
    chains = _Chains(stored, {name: node for node in graph.node for name in node.output})
    free, nodes = _weights(graph), list[onnx.NodeProto]()
    pending: list[onnx.NodeProto] = []
    for node in graph.node:
        if free.issuperset(node.input):
            free.update(node.output)
            (pending if chains.leads_from(node) else nodes).append(node)
            continue
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        activation = next(name for name in node.input if name not in free)
        changed.input[:] = [chains.copy(name, activation, nodes) for name in node.input]
        nodes.append(changed)
    outputs = {value.name for value in graph.output}
    nodes += [node for node in pending if outputs.intersection(node.output)]
    return make_model(nodes, graph.input, graph.output, [*graph.initializer, *chains.constants])


class _Chains:
    """The nodes that lead from stored bytes to a dense matrix, written again for each product."""

    def __init__(self, stored: Mapping[str, list[int]], producers: Mapping[str, onnx.NodeProto]) -> None:
        self.constants = [numpy_helper.from_array(np.array([0], np.int64), _NOTHING)]
        self._stored, self._producers = stored, producers
        self._from = set(stored)
        self._copies = 0

    def leads_from(self, node: onnx.NodeProto) -> bool:
        """Whether a node that reads weights alone reads stored bytes; such nodes are asked for in order."""
        found = bool(self._from.intersection(node.input))
        if found:
            self._from.update(node.output)
        return found

    def copy(self, name: str, activation: str, nodes: list[onnx.NodeProto]) -> str:
        """The value `name`, computed only after `activation`; values without stored bytes stay as they are."""
        if name not in self._from:
            return name
        self._copies += 1
        return self._copied(name, activation, nodes, f"late/{self._copies}/")

    def _copied(self, name: str, activation: str, nodes: list[onnx.NodeProto], prefix: str) -> str:
        if name not in self._from:
            return name
        if name in self._stored:
            return self._waiting(name, activation, nodes, prefix)
        producer = self._producers[name]
        node = onnx.NodeProto()
        node.CopyFrom(producer)
        node.input[:] = [self._copied(read, activation, nodes, prefix) for read in producer.input]
        node.output[:] = [prefix + made for made in producer.output]
        nodes.append(node)
        return prefix + name

    def _waiting(self, name: str, activation: str, nodes: list[onnx.NodeProto], prefix: str) -> str:
        late, sizes = prefix + name, f"late/sizes/{name}"
        if all(tensor.name != sizes for tensor in self.constants):
            self.constants.append(numpy_helper.from_array(np.array(self._stored[name], np.int64), sizes))
        nodes.extend(
            [
                helper.make_node("Shape", [activation], [f"{late}/rows"], start=0, end=1),
                helper.make_node("Mul", [f"{late}/rows", _NOTHING], [f"{late}/nothing"]),
                helper.make_node("Add", [sizes, f"{late}/nothing"], [f"{late}/shape"]),
                helper.make_node("Reshape", [name, f"{late}/shape"], [late]),
            ]
        )
        return late


def _weights(graph: onnx.GraphProto) -> set[str]:
    """Names of what is the same for every text: frozen tensors and constants."""
    inputs = {value.name for value in graph.input if "." in value.name}
    adapters = {name for name in inputs if name.endswith((".A", ".B")) or name.startswith(KEEP)}
    return (inputs - adapters) | {tensor.name for tensor in graph.initializer} | {""}


def _is_large(value: onnx.ValueInfoProto) -> bool:
    kind, sizes = value.type.tensor_type, _sizes(value)
    return kind.elem_type in _STORED and bool(sizes) and all(sizes) and math.prod(sizes) >= _SMALL


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value for size in value.type.tensor_type.shape.dim]
