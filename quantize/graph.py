"""ONNX plumbing that knows nothing of models: write nodes, cut a graph, make it canonical.

Rule: the same computation gives the same bytes. Exporters number their values by counters and attach stack traces
and absolute paths; `canonical` removes all of it, so that a bundle's hash depends on the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 18
IR_VERSION: Final = 8  # what opset 18 came with; the lowest that can carry it
_FOLD_BYTES_MAX: Final = 4096
_DTYPES: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int64": TensorProto.INT64,
}


class GraphWriter:
    """Collects nodes in order and constants once each; names are made up as v0, v1, ..."""

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._prefix = prefix
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node with one output and return the output's name."""
        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [output], domain=domain, **attributes))
        return output

    def constant(self, value: npt.NDArray | np.generic) -> str:
        """Name of a constant; equal constants are stored once."""
        value = np.asarray(value)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self.fresh()
            self.initializers[name] = numpy_helper.from_array(value, name)
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(np.array(values, np.int64))

    def fresh(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"

    def model(
        self, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The finished model. Constants and inputs that nothing reads are left out."""
        used = {name for node in self.nodes for name in node.input} | {value.name for value in outputs}
        constants = [tensor for name, tensor in self.initializers.items() if name in used]
        kept = [value for value in inputs if value.name in used]
        return make_model(self.nodes, kept, list(outputs), constants)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    """A model with the lowest versions that its operators need."""
    graph = helper.make_graph(nodes, "fedge", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    opsets += [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in nodes} - {""})]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fedge")


def tensor_input(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Declaration of a graph input or output; `dtype` is a numpy name."""
    return helper.make_tensor_value_info(name, _DTYPES[dtype], list(shape))


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constant folding and clean-up by onnxscript, kept from folding anything large into the file."""
    intermediate = onnx_ir.from_proto(model)
    onnxscript.optimizer.optimize_ir(
        intermediate, input_size_limit=_FOLD_BYTES_MAX, output_size_limit=_FOLD_BYTES_MAX
    )
    return onnx_ir.to_proto(intermediate)


def select(
    model: onnx.ModelProto, outputs: Sequence[str], *, given: Sequence[onnx.ValueInfoProto] = ()
) -> onnx.ModelProto:
    """The part of a model that computes `outputs`, from its inputs and from inner values that are `given`.

    ONNX Runtime runs a whole graph whatever is fetched from it.
    """
    wanted, there = set(outputs), {value.name for value in given}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if wanted.difference(there).intersection(node.output):
            nodes.insert(0, node)
            wanted.update(node.input)
    known = {value.name: value for value in model.graph.output}
    inputs = [*given, *(value for value in model.graph.input if value.name in wanted)]
    constants = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    return make_model(nodes, inputs, [known[name] for name in outputs], constants)


def expand_powers(model: onnx.ModelProto) -> onnx.ModelProto:
    """x^1, x^2, x^3 as products: ONNX Runtime's Pow calls pow() on every element."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    writer = GraphWriter("power")
    for node in model.graph.node:
        exponent = constants.get(node.input[1]) if node.op_type == "Pow" else None
        if exponent is None or exponent.size != 1 or exponent.item() not in (1, 2, 3):
            writer.nodes.append(node)
            continue
        base, result = node.input[0], node.input[0]
        for _ in range(int(exponent.item()) - 2):
            result = writer.add("Mul", [result, base])
        if exponent.item() == 1:
            writer.add("Identity", [base], node.output[0])
        else:
            writer.add("Mul", [result, base], node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    return model


def operators(model: onnx.ModelProto) -> set[str]:
    """Operators of a graph, as "Name" or "domain:Name"."""
    return {f"{n.domain}:{n.op_type}" if n.domain else n.op_type for n in model.graph.node}


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without metadata, its inner values and symbolic dimensions renamed by order of appearance."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    fixed |= {tensor.name for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    renamed = {"": ""} | {name: name for name in fixed}

    def rename(name: str) -> str:
        return renamed.setdefault(name, f"v{len(renamed)}")

    nodes = []
    for node in graph.node:
        clean = helper.make_node(
            node.op_type, map(rename, node.input), map(rename, node.output), domain=node.domain
        )
        clean.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
        for attribute in clean.attribute:
            if attribute.HasField("t"):
                attribute.t.ClearField("name")
            attribute.doc_string = ""
        nodes.append(clean)
    constants = []
    for tensor in graph.initializer:
        clean_tensor = onnx.TensorProto()
        clean_tensor.CopyFrom(tensor)
        clean_tensor.name = rename(tensor.name)
        clean_tensor.doc_string = ""
        constants.append(clean_tensor)
    return make_model(nodes, _plain(graph.input), _plain(graph.output), constants)


def _plain(values: Iterable[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    """Declarations with their sizes where fixed; symbolic sizes become anonymous."""
    plain = []
    for value in values:
        kind = value.type.tensor_type
        shape = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
        plain.append(helper.make_tensor_value_info(value.name, kind.elem_type, shape))
    return plain
