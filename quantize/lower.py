"""From placeholder operators to stock ONNX Runtime operators over the bytes of a weight format.

Training dequantises a matrix inside the graph (`GatherBlockQuantized` over all its rows) and multiplies densely:
with weights as inputs nothing can be prepacked, and `MatMulNBits` would be slower. Decoding has constant weights
and uses `MatMulNBits`. An offset per block never touches the codes:

    x W^T = x Q^T + blocksum(x) D^T        g W = g Q + repeat(g D, 32)

with Q = (code - zero) * scale and D the offsets; K/32 columns, about 3 % of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from quantize.formats import BLOCK, FORMATS, WeightFormat
from quantize.graph import MICROSOFT, GraphWriter, tensor_input
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR, LINEAR_DX

Size = int | str


@dataclass(frozen=True, slots=True)
class Matrix:
    """A frozen matrix behind a placeholder. `rows` may be symbolic: the streamed head takes any slice."""

    rows: Size
    columns: int
    format: WeightFormat


class Lowering:
    """Writes one graph in which the matrices are inputs called NAME.q, NAME.s, NAME.d."""

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self.writer = GraphWriter("low")
        self.weights: dict[str, tuple[str, tuple[Size, ...]]] = {}  # tensor -> (dtype, shape)
        self._matrices = matrices
        self._dense: dict[str, str] = {}
        self._sums: dict[str, str] = {}

    def run(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with every placeholder replaced."""
        for tensor in model.graph.initializer:
            self.writer.initializers[tensor.name] = tensor
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
            self._linear_dx(x, weight, node.output[0])
        else:
            assert node.op_type == EMBEDDING
            self._gather(weight, x, node.output[0])

    def linear(self, x: str, weight: str, output: str) -> None:
        """output[..., N] = x[..., K] W^T."""
        matrix = self._matrices[weight]
        flat = self._flat(x, matrix.columns)
        terms = [flat, self._dequantised(weight)]
        if matrix.format.has_offset:
            terms.append(
                self.writer.add(
                    "Gemm", [self.block_sums(flat, matrix.columns), self.part(weight, "d")], transB=1
                )
            )
        self._restore(self.writer.add("Gemm", terms, transB=1), x, matrix.rows, output)

    def _linear_dx(self, gradient: str, weight: str, output: str) -> None:
        writer, matrix = self.writer, self._matrices[weight]
        flat, columns = self._flat(gradient, matrix.rows), matrix.columns
        product = writer.add("Gemm", [flat, self._dequantised(weight)])
        if matrix.format.has_offset:
            shift = writer.add("Gemm", [flat, self.part(weight, "d")])
            blocks = writer.add("Reshape", [product, writer.integers(-1, columns // BLOCK, BLOCK)])
            shifted = writer.add("Add", [blocks, writer.add("Unsqueeze", [shift, writer.integers(-1)])])
            product = writer.add("Reshape", [shifted, writer.integers(-1, columns)])
        self._restore(product, gradient, columns, output)

    def block_sums(self, x: str, columns: int) -> str:
        """Sums of x[..., K] over each block of 32 columns, computed once for all matrices that read x."""
        if x not in self._sums:
            writer = self.writer
            blocks = writer.add("Reshape", [x, writer.integers(-1, columns // BLOCK, BLOCK)])
            self._sums[x] = writer.add("ReduceSum", [blocks, writer.integers(-1)], keepdims=0)
        return self._sums[x]

    def part(self, weight: str, part: str) -> str:
        """Name of a stored tensor of a matrix, noted as something that the graph reads."""
        name, matrix = f"{weight}.{part}", self._matrices[weight]
        dtype = "uint8" if part == "q" else "float32"
        self.weights[name] = (dtype, matrix.format.part_shape(part, matrix.rows, matrix.columns))
        return name

    def _dequantised(self, weight: str) -> str:
        if weight not in self._dense:
            writer, rows = self.writer, self._matrices[weight].rows
            if isinstance(rows, int):
                count = writer.constant(np.array(rows, np.int64))
            else:
                shape = writer.add("Shape", [self.part(weight, "q")], start=0, end=1)
                count = writer.add("Squeeze", [shape])
            zero, one = writer.constant(np.array(0, np.int64)), writer.constant(np.array(1, np.int64))
            self._dense[weight] = self._gather(weight, writer.add("Range", [zero, count, one]))
        return self._dense[weight]

    def _gather(self, weight: str, ids: str, output: str | None = None) -> str:
        tensors = [self.part(weight, "q"), ids, self.part(weight, "s")]
        return self.writer.add(
            "GatherBlockQuantized",
            tensors,
            output,
            domain=MICROSOFT,
            bits=self._matrices[weight].format.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def _flat(self, x: str, width: Size) -> str:
        """x as a matrix. Only symbolic rows (the streamed head) come as a matrix already."""
        if self._is_matrix:
            return x
        assert isinstance(width, int)
        return self.writer.add("Reshape", [x, self.writer.integers(-1, width)])

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
    """The same products by `MatMulNBits`, for constant weights; `levels` gives the accuracy level by weight name."""

    def __init__(self, matrices: Mapping[str, Matrix], levels: Mapping[str, int]) -> None:
        super().__init__(matrices)
        self._levels = levels

    def linear(self, x: str, weight: str, output: str) -> None:
        """output[..., N] = x[..., K] W^T."""
        writer, matrix = self.writer, self._matrices[weight]
        if not matrix.format.has_offset:
            self._product(x, weight, output)
            return
        product = self._product(x, weight)
        sums = self.block_sums(x, matrix.columns)
        shift = writer.add("Gemm", [sums, self.part(weight, "d")], transB=1)
        writer.add("Add", [product, writer.add("Reshape", [shift, writer.add("Shape", [product])])], output)

    def _product(self, x: str, weight: str, output: str | None = None) -> str:
        matrix = self._matrices[weight]
        bits, blocks = matrix.format.bits, matrix.columns // BLOCK
        tensors = [x, self.part(weight, "q"), self.part(weight, "s")]
        self.weights[f"{weight}.q"] = ("uint8", (matrix.rows, blocks, BLOCK * bits // 8))
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


def embedding_rows(hidden: int, format_name: str) -> onnx.ModelProto:
    """rows.onnx: rows[M, D] of the embedding EMB at ids[M]."""
    writer = GraphWriter()
    writer.add(EMBEDDING, ["ids", "EMB"], "rows", domain=DOMAIN)
    model = writer.model(
        [tensor_input("ids", "int64", ["M"]), tensor_input("EMB", "float32", ["V", hidden])],
        [tensor_input("rows", "float32", ["M", hidden])],
    )
    return lower(model, {"EMB": ("V", hidden)}, format_name)


def cross_entropy_slice(hidden: int, format_name: str) -> onnx.ModelProto:
    """ce.onnx: one vocabulary slice of a streamed softmax over f[M, D] W^T.

    Running maximum m, denominator z and sum acc of exp-weighted rows, as in online softmax (Milakov and
    Gimelshein 2018, arXiv 1805.02867). After the last slice log-sum-exp is m + log z and the gradient of it with
    respect to f is acc / z. The first slice gets m = -1e30, z = 0, acc = 0.
    """
    writer = GraphWriter()
    one = writer.integers(1)
    logits = writer.add(LINEAR, ["f", "W"], domain=DOMAIN)
    top = writer.add("Max", [writer.add("ReduceMax", [logits, one], keepdims=1), "m"], "m2")
    shrink = writer.add("Exp", [writer.add("Sub", ["m", top])])
    weights = writer.add("Exp", [writer.add("Sub", [logits, top])])
    total = writer.add("ReduceSum", [weights, one], keepdims=1)
    writer.add("Add", [writer.add("Mul", ["z", shrink]), total], "z2")
    rows = writer.add(LINEAR_DX, [weights, "W"], domain=DOMAIN)
    writer.add("Add", [writer.add("Mul", ["acc", shrink]), rows], "acc2")
    widths = {"f": hidden, "W": hidden, "m": 1, "z": 1, "acc": hidden}
    inputs = [tensor_input(n, "float32", ["R" if n == "W" else "M", width]) for n, width in widths.items()]
    outputs: Sequence[onnx.ValueInfoProto] = [
        tensor_input(n, "float32", ["M", w]) for n, w in (("m2", 1), ("z2", 1), ("acc2", hidden))
    ]
    return lower(writer.model(inputs, outputs), {"W": ("R", hidden)}, format_name)
