"""From placeholder operators to stock ONNX Runtime operators over the bytes of a weight format.

A training graph reads its matrices as inputs; `quantize.products` says how each format is multiplied there. An
inference graph has constant weights: `quantize.decode_lowering`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx

from quantize.formats import FORMATS, Size, WeightFormat
from quantize.graph import GraphWriter, tensor_input
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR, LINEAR_DX
from quantize.products import PRODUCTS, Bytes

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A frozen matrix behind a placeholder. `rows` may be symbolic: the streamed head takes any slice."""

    rows: Size
    columns: int
    format: WeightFormat


class Lowering:
    """Writes one graph in which the matrices are inputs called NAME.q, NAME.s and so on."""

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.writer = GraphWriter("low")
        self.weights: dict[str, tuple[str, tuple[Size, ...]]] = {}  # tensor -> (dtype, shape)
        self.backward_matrices: frozenset[str] = frozenset()
        self._matrices = matrices
        self._made: dict[Hashable, Any] = {}

    def run(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with every placeholder replaced."""
        for tensor in model.graph.initializer:
            self.writer.initializers[tensor.name] = tensor
        self.backward_matrices = frozenset(
            node.input[1] for node in model.graph.node if node.domain == DOMAIN and node.op_type == LINEAR_DX
        )
        for node in model.graph.node:
            if node.domain != DOMAIN:
                self.writer.nodes.append(node)
            else:
                self._replace(node)
        inputs = [value for value in model.graph.input if value.name not in self._matrices]
        inputs += [tensor_input(name, *kind) for name, kind in self.weights.items()]
        return self.writer.model(inputs, model.graph.output)

    def _replace(self, node: onnx.NodeProto) -> None:
        x, weight = node.input
        if node.op_type == LINEAR:
            self.linear(x, weight, node.output[0])
        elif node.op_type == LINEAR_DX:
            matrix = self.matrix(weight)
            product = PRODUCTS[matrix.format.training].backward(self, self._flat(x, matrix.rows), weight)
            self._restore(product, x, matrix.columns, node.output[0])
        else:
            assert node.op_type == EMBEDDING
            self._rows(x, weight, node.output[0])

    def linear(self, x: str, weight: str, output: str) -> None:
        """output[..., N] = x[..., K] W^T."""
        matrix = self.matrix(weight)
        product = PRODUCTS[matrix.format.training].forward(self, self._flat(x, matrix.columns), weight)
        self._restore(product, x, matrix.rows, output)

    def matrix(self, weight: str) -> Matrix:
        """The matrix behind a name."""
        return self._matrices[weight]

    def is_widest(self, weight: str) -> bool:
        """Whether no matrix of the graph reads more numbers a position, and some read fewer."""
        widths = [matrix.columns for matrix in self._matrices.values()]
        return min(widths) < self.matrix(weight).columns == max(widths)

    def part(self, weight: str, suffix: str) -> str:
        """Name of a stored tensor of a matrix, noted as something that the graph reads."""
        name, matrix = f"{weight}.{suffix}", self._matrices[weight]
        part = matrix.format.part(suffix)
        self.weights.setdefault(name, (part.dtype, part.shape(matrix.rows, matrix.columns)))
        return name

    def floats(self, weight: str, suffix: str) -> str:
        """A part in single precision."""
        return self.once(
            ("floats", weight, suffix),
            lambda: self.writer.add("Cast", [self.part(weight, suffix)], to=onnx.TensorProto.FLOAT),
        )

    def scale(self, weight: str) -> str:
        """The scales in single precision."""
        return self.floats(weight, "s")

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` wrote for this key, written once a graph."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def _rows(self, ids: str, weight: str, output: str) -> None:
        products = PRODUCTS[self.matrix(weight).format.training]
        assert isinstance(products, Bytes), "embeddings are in 8 bits"
        writer = self.writer
        shape = writer.add(
            "Concat", [writer.add("Shape", [ids]), writer.integers(self.matrix(weight).columns)], axis=0
        )
        writer.add("Reshape", [products.rows(self, ids, weight), shape], output)

    def _flat(self, x: str, width: Size) -> str:
        """x as a matrix. Only symbolic rows (the streamed head) come as a matrix already."""
        if self._is_matrix:
            return x
        assert isinstance(width, int)
        return self.once(
            ("flat", x), lambda: self.writer.add("Reshape", [x, self.writer.integers(-1, width)])
        )

    def _restore(self, matrix: str, like: str, width: Size, output: str) -> None:
        writer = self.writer
        if self._is_matrix:
            writer.add("Identity", [matrix], output)
            return
        assert isinstance(width, int)
        leading = writer.add("Shape", [like], start=0, end=-1)
        shape = writer.add("Concat", [leading, writer.integers(width)], axis=0)
        writer.add("Reshape", [matrix, shape], output)

    @property
    def _is_matrix(self) -> bool:
        return any(isinstance(matrix.rows, str) for matrix in self._matrices.values())


def lower(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[Size, int]], format_name: str
) -> onnx.ModelProto:
    """The model with placeholders over `shapes` (rows, columns) replaced by operators for training."""
    fmt = FORMATS[format_name]
    return Lowering({name: Matrix(*shape, fmt) for name, shape in shapes.items()}).run(model)
