"""The placeholders of an inference graph as products by constant weights, which the runtime prepares when it loads.

A device writes one token after another, so every product is a row by a matrix, and costs what it takes to read the
matrix. Three things follow. Matrices that read the same activations are one product: their parts are joined in the
graph, which the runtime does once, when it loads. An offset per block is a product of its own, by D as in
`quantize.products`, and D is given three axes: with two the runtime would pack it for products of many rows, and then
reads it half as fast (28 against 15 microseconds for 3072 x 18). Matrices whose offsets all lie where the codes are
centred have no such product at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import onnx

from quantize.formats import BLOCK
from quantize.graph import MICROSOFT
from quantize.lower import Lowering, Matrix
from quantize.placeholder import DOMAIN
from quantize.products import block_sums, bnb_product

# y = x [w1; w2; ..]^T + a1 + a2 ..: inputs x, `matrices` weights, addends; x [B, S, K]
JOINED: Final = "Joined"
MATRICES: Final = "matrices"
_NATIVE: Final = "MatMulNBits"


def joined_node(x: str, weights: Sequence[str], addends: Sequence[str], output: str) -> onnx.NodeProto:
    """A placeholder for one product by several matrices, one below the other, and what is added to it."""
    inputs = [x, *weights, *addends]
    return onnx.helper.make_node(JOINED, inputs, [output], domain=DOMAIN, matrices=len(weights))


def apart(node: onnx.NodeProto) -> tuple[str, list[str], list[str]]:
    """x, weights and addends of a `joined_node`."""
    count = next(attribute.i for attribute in node.attribute if attribute.name == MATRICES)
    x, *rest = node.input
    return x, rest[:count], rest[count:]


class DecodeLowering(Lowering):
    """`levels` gives `MatMulNBits`' accuracy level by weight name.

    `centred` names the weights whose blocks all have the offset -zero x scale: nothing is left of it about the zero.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        levels: Mapping[str, int],
        *,
        centred: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(matrices)
        self._levels, self._centred = levels, centred

    def linear(self, x: str, weight: str, output: str) -> None:
        """output[..., N] = x[..., K] W^T."""
        matrix = self.matrix(weight)
        if matrix.format.decoding == "MatMulBnb4":
            self.writer.add("Identity", [bnb_product(self, x, weight)], output)
        elif matrix.format.decoding != _NATIVE:
            super().linear(x, weight, output)
        elif self._has_offsets([weight]):
            flat = self._flat(x, matrix.columns)
            sums = block_sums(self, flat, matrix.columns)
            terms = [sums, self._offsets([weight]), self._native(flat, [weight])]
            self._restore(self.writer.add("Gemm", terms, transB=1), x, matrix.rows, output)
        else:
            self._native(x, [weight], output)

    def _replace(self, node: onnx.NodeProto) -> None:
        if node.op_type != JOINED:
            super()._replace(node)
            return
        x, weights, addends = apart(node)
        terms = [*self._terms(x, weights), *addends]
        if len(terms) > 1:
            self.writer.add("Sum" if len(terms) > 2 else "Add", terms, node.output[0])
        else:
            self.writer.nodes[-1].output[0] = node.output[0]

    def _terms(self, x: str, weights: Sequence[str]) -> list[str]:
        """What adds up to x [w1; w2; ..]^T; a single term is the output of the last node."""
        writer, first = self.writer, self.matrix(weights[0])
        if first.format.decoding != _NATIVE:
            products = [writer.fresh() for _ in weights]
            for weight, product in zip(weights, products, strict=True):
                self.linear(x, weight, product)
            return products if len(products) == 1 else [writer.add("Concat", products, axis=-1)]
        if not self._has_offsets(weights):
            return [self._native(x, weights)]
        whole = writer.add("Mul", [self._offsets(weights), writer.constant(np.float32(BLOCK))])
        stacked = writer.add("Unsqueeze", [whole, writer.integers(0)])
        shift = writer.add("FusedMatMul", [self._means(x), stacked], domain=MICROSOFT, transB=1)
        return [self._native(x, weights), shift]

    def _has_offsets(self, weights: Sequence[str]) -> bool:
        return self.matrix(weights[0]).format.has_offset and not self._centred.issuperset(weights)

    def _means(self, x: str) -> str:
        """[B, S, K / 32] of x [B, S, K]: the mean of each block, which D x 32 makes up for without rounding.

        One operator where sums are two: with one row, that is a sixteenth of all that a token costs.
        """
        return self.once(
            ("means", x),
            lambda: self.writer.add("AveragePool", [x], kernel_shape=[BLOCK], strides=[BLOCK]),
        )

    def _offsets(self, weights: Sequence[str]) -> str:
        """D [N, K / 32]: what the code that the runtime takes as zero is worth."""
        writer = self.writer
        zero = writer.constant(np.float32(self.matrix(weights[0]).format.zero))
        middle = writer.add("Mul", [self._joined_floats(weights, "s"), zero])
        return writer.add("Add", [self._joined_floats(weights, "m"), middle])

    def _native(self, x: str, weights: Sequence[str], output: str | None = None) -> str:
        """x by code - zero; the runtime joins the parts and casts the scales when it loads the graph."""
        matrix = self.matrix(weights[0])
        bits, blocks = matrix.format.bits, matrix.columns // BLOCK
        tensors = [x, self._joined_parts(weights, "q"), self._joined_floats(weights, "s")]
        rows = 0
        for weight in weights:
            count = self.matrix(weight).rows
            assert isinstance(count, int)
            rows += count
            self.weights[f"{weight}.q"] = ("uint8", (count, blocks, BLOCK * bits // 8))
        if "z" in matrix.format.suffixes:
            tensors.append(self._joined_parts(weights, "z"))
        return self.writer.add(
            _NATIVE,
            tensors,
            output,
            domain=MICROSOFT,
            K=matrix.columns,
            N=rows,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=self._levels[weights[0]],
        )

    def _joined_parts(self, weights: Sequence[str], suffix: str) -> str:
        parts = [self.part(weight, suffix) for weight in weights]
        if len(parts) == 1:
            return parts[0]
        return self.once(("joined", *parts), lambda: self.writer.add("Concat", parts, axis=0))

    def _joined_floats(self, weights: Sequence[str], suffix: str) -> str:
        if len(weights) == 1:
            return self.floats(weights[0], suffix)
        parts = self._joined_parts(weights, suffix)
        return self.once(
            ("floats of", parts),
            lambda: self.writer.add("Cast", [parts], to=onnx.TensorProto.FLOAT),
        )
