"""Attention's weights are computed again when the gradient is there, and not before.

Where attention works in pieces (`quantize.pieces`), the way back needs the weights of one piece after the other. They
depend on queries and keys alone, so ONNX Runtime would compute those of all pieces as soon as it can, and hold them
until their gradients come: all scores at once, which the pieces are there to avoid. So the product that begins each
piece waits for the gradient that it will meet, by a Reshape to the shape that it has, as in `quantize.late`. The
gradient by the weights is as large as they are, and would be there for all pieces as soon as the one by the output
is: it waits for the weights of its own piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantize.graph import make_model

GRADIENT: Final = "gy"
_NOTHING: Final = "late/no-row"
_PLAIN: Final = ("Transpose", "Reshape", "Identity", "Cast")
_TO_SCORES: Final = (*_PLAIN, "Add", "Mul", "Div", "Where")


def late_scores(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model; one without pieces, or without a way back, is returned as it is."""
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    later = _after(graph)
    waits: dict[str, str] = {}  # output of a product as large as the scores -> what it waits for
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Softmax" and node.output[0] not in later:
            met = list(_met(node.output[0], readers, later))
            start = _product(node.input[0], producers)
            products = {name: _product(name, producers) for name in met if name is not None}
            given = [name for name, product in products.items() if product is None]
            if given and None not in met and start is not None:
                waits[start] = given[0]
                waits |= {product: node.output[0] for product in products.values() if product is not None}
    return _waiting(model, waits) if waits else model


def _after(graph: onnx.GraphProto) -> set[str]:
    """Names of all values that depend on the gradient."""
    later = {GRADIENT}
    for node in graph.node:
        if later.intersection(node.input):
            later.update(node.output)
    return later


def _met(name: str, readers: dict[str, list[onnx.NodeProto]], later: set[str]) -> Iterator[str | None]:
    """For each node that computes with the value `name`: what of the gradient it meets there, None for nothing."""
    for node in readers.get(name, []):
        if node.op_type in _PLAIN and node.input[0] == name and node.output[0] not in later:
            yield from _met(node.output[0], readers, later)
        elif node.op_type not in ("Shape", "Size"):
            yield next((other for other in node.input if other in later), None)


def _product(name: str, producers: dict[str, onnx.NodeProto]) -> str | None:
    """The product of queries and keys that leads to the value `name`."""
    node = producers.get(name)
    if node is None:
        return None
    if node.op_type == "MatMul":
        return name
    if node.op_type not in _TO_SCORES:
        return None
    return next((found for read in node.input if (found := _product(read, producers)) is not None), None)


def _waiting(model: onnx.ModelProto, waits: dict[str, str]) -> onnx.ModelProto:
    """The first factor of each product waits; nodes stay in an order in which everything is there when it is read."""
    nodes: list[onnx.NodeProto] = []
    for number, node in enumerate(model.graph.node):
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        gradient = waits.get(node.output[0]) if node.output else None
        if gradient is not None:
            late, factor = f"late/scores/{number}", node.input[0]
            nodes += [
                helper.make_node("Shape", [gradient], [f"{late}/row"], start=0, end=1),
                helper.make_node("Mul", [f"{late}/row", _NOTHING], [f"{late}/nothing"]),
                helper.make_node("Shape", [factor], [f"{late}/sizes"]),
                helper.make_node("Add", [f"{late}/sizes", f"{late}/nothing"], [f"{late}/shape"]),
                helper.make_node("Reshape", [factor, f"{late}/shape"], [late]),
            ]
            changed.input[0] = late
        nodes.append(changed)
    nothing = numpy_helper.from_array(np.array([0], np.int64), _NOTHING)
    graph = model.graph
    return make_model(_in_order(nodes), graph.input, graph.output, [*graph.initializer, nothing])


def _in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Each node after all that it reads, otherwise as they are."""
    made = {name for node in nodes for name in node.output}
    done: set[str] = set()
    order: list[onnx.NodeProto] = []
    waiting = nodes
    while waiting:
        left = []
        for node in waiting:
            if all(name in done or name not in made for name in node.input):
                order.append(node)
                done.update(node.output)
            else:
                left.append(node)
        assert len(left) < len(waiting), "a graph has no circle"
        waiting = left
    return order
