"""Splits without sequences: the exporter writes a split as a sequence of tensors, which no device graph may hold."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantize.graph import GraphWriter


def cut_sequences(graph: onnx.GraphProto) -> None:
    """Every part of a split that is taken out of a sequence becomes a slice; the sequences go."""
    constants = _constants(graph)
    splits = {node.output[0]: node for node in graph.node if node.op_type == "SplitToSequence"}
    writer = GraphWriter("split/")
    for node in graph.node:
        if node.op_type == "SequenceAt" and node.input[0] in splits:
            split = splits[node.input[0]]
            start, end = _span(constants[split.input[1]], int(constants[node.input[1]]))
            axis = next((entry.i for entry in split.attribute if entry.name == "axis"), 0)
            places = [writer.integers(value) for value in (start, end, axis)]
            writer.nodes.append(helper.make_node("Slice", [split.input[0], *places], node.output))
        elif node.op_type != "SplitToSequence":
            writer.nodes.append(node)
    if splits:
        nodes = list(writer.nodes)  # owned by the graph until it is emptied
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(kept)
        graph.initializer.extend(writer.initializers.values())


def _span(split: np.ndarray, index: int) -> tuple[int, int]:
    """Where part `index` lies: `split` is the size of every part, or one size for each."""
    if split.ndim == 0:
        return index * int(split), (index + 1) * int(split)
    ends = list(accumulate(int(size) for size in split))
    return ends[index] - int(split[index]), ends[index]


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            value = helper.get_attribute_value(node.attribute[0])
            is_tensor = isinstance(value, onnx.TensorProto)
            found[node.output[0]] = numpy_helper.to_array(value) if is_tensor else np.asarray(value)
    return found
