"""From placeholder operators to stock ONNX Runtime operators over the bytes of a weight format.

A training graph reads its matrices as inputs; `quantize.products` says how each format is multiplied there. A
decoding graph has constant weights, which the runtime prepacks: there it is `MatMulNBits` or its like.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx

from quantize.formats import BLOCK, FORMATS, Size, WeightFormat
from quantize.graph import MICROSOFT, GraphWriter, tensor_input
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR, LINEAR_DX
from quantize.products import PRODUCTS, Bytes, block_sums, bnb_product

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


class DecodeLowering(Lowering):
    """The same products with constant weights; `levels` gives `MatMulNBits`' accuracy level by weight name.

    `flat`: activations of matrices with offsets are matrices [M, K] already.
    """

    def __init__(
        self, matrices: Mapping[str, Matrix], levels: Mapping[str, int], *, flat: bool = False
    ) -> None:
        super().__init__(matrices)
        self._levels, self._are_flat = levels, flat

    def linear(self, x: str, weight: str, output: str) -> None:
        """output[..., N] = x[..., K] W^T."""
        writer, matrix = self.writer, self.matrix(weight)
        if matrix.format.decoding == "MatMulBnb4":
            writer.add("Identity", [bnb_product(self, x, weight)], output)
        elif matrix.format.decoding != "MatMulNBits":
            super().linear(x, weight, output)
        elif not matrix.format.has_offset:
            self._product(x, weight, output)
        else:
            self._with_offsets(x, weight, output)

    def _with_offsets(self, x: str, weight: str, output: str) -> None:
        """x Q^T + blocksum(x) D^T, the sum within the second product: at one row an operator costs as much as this."""
        writer, matrix = self.writer, self.matrix(weight)
        flat = x if self._are_flat else self._flat(x, matrix.columns)
        zero = writer.constant(np.float32(matrix.format.zero))
        centre = writer.add("Add", [self.floats(weight, "m"), writer.add("Mul", [self.scale(weight), zero])])
        terms = [block_sums(self, flat, matrix.columns), centre, self._product(flat, weight)]
        if self._are_flat:
            writer.add("Gemm", terms, output, transB=1)
        else:
            self._restore(writer.add("Gemm", terms, transB=1), x, matrix.rows, output)

    def _product(self, x: str, weight: str, output: str | None = None) -> str:
        """By code - zero; the runtime folds the cast of the scales when it loads the graph."""
        matrix = self.matrix(weight)
        bits, blocks = matrix.format.bits, matrix.columns // BLOCK
        tensors = [x, self.part(weight, "q"), self.scale(weight)]
        self.weights[f"{weight}.q"] = ("uint8", (matrix.rows, blocks, BLOCK * bits // 8))
        if "z" in matrix.format.suffixes:
            tensors.append(self.part(weight, "z"))
        return self.writer.add(
            "MatMulNBits",
            tensors,
            output,
            domain=MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=self._levels[weight],
        )


def lower(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[Size, int]], format_name: str
) -> onnx.ModelProto:
    """The model with placeholders over `shapes` (rows, columns) replaced by operators for training."""
    fmt = FORMATS[format_name]
    return Lowering({name: Matrix(*shape, fmt) for name, shape in shapes.items()}).run(model)
