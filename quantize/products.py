"""How a graph multiplies by a frozen matrix in each weight format, in stock operators over the stored bytes.

Training graphs get their weights as inputs, so nothing can be prepacked: a matrix is dequantised inside the graph and
multiplied densely. `DequantizeLinear` with a scale for every block of 32 is the fastest dequantiser there is (0.16 ns
a weight; `GatherBlockQuantized` takes 0.5 with 8 bits and 1.0 with 4). It cannot take two codes out of a byte, so the
product is rearranged instead of the weights. With b = 16 high + low, the stored byte, and z the zero:

    X1 = (b - 17 z) s = 16 (high - z) s + (low - z) s        X0 = ((b & 15) - z) s
    x W^T = x_high / 16 X1^T + (x_low - x_high / 16) X0^T    g W = [g X0, (g X1 - g X0) / 16], interleaved

with x_low and x_high the even and the odd columns of x: one bitwise operation on bytes instead of two and a merge.
An offset per block never touches the codes either; D is the value of code z, K/32 columns, 3 % of the work:

    x W^T = x Q^T + blocksum(x) D^T        g W = g Q + repeat(g D, 32)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from quantize.formats import BLOCK, NF4_LEVELS, Arithmetic
from quantize.graph import MICROSOFT

if TYPE_CHECKING:
    from quantize.lower import Lowering

_STEPS: Final = 127  # of an activation, to either side of its zero
_ZERO: Final = 128


class Products(Protocol):
    """Products by matrix `w`; activations are matrices [M, K] or [M, N] by name, results are names."""

    def forward(self, low: Lowering, x: str, w: str) -> str:
        """x W^T."""
        ...

    def backward(self, low: Lowering, gradient: str, w: str) -> str:
        """gradient W."""
        ...


class Nibbles:
    """Two 4-bit codes a byte, with an offset or a zero per block."""

    def forward(self, low: Lowering, x: str, w: str) -> str:
        """x W^T."""
        writer, matrix = low.writer, low.matrix(w)
        even, odd = low.once(("halves", x), lambda: self._halves(low, x, matrix.columns))
        first, second = self._dense(low, w)
        shift = writer.add("Gemm", [block_sums(low, x, matrix.columns), self._centre(low, w)], transB=1)
        product = writer.add("Gemm", [even, first, shift], transB=1)
        return writer.add("Gemm", [odd, second, product], transB=1)

    def backward(self, low: Lowering, gradient: str, w: str) -> str:
        """gradient W."""
        writer, matrix = low.writer, low.matrix(w)
        first, second = self._dense(low, w)
        even = writer.add("Gemm", [gradient, first])
        both = writer.add("Sub", [writer.add("Gemm", [gradient, second]), even])
        odd = writer.add("Mul", [both, writer.constant(np.float32(1 / 16))])
        apart = writer.add("Concat", [even, odd], axis=1)
        apart = writer.add("Reshape", [apart, writer.integers(-1, 2, matrix.columns // 2)])
        product = writer.add("Transpose", [apart], perm=[0, 2, 1])
        return with_offsets(low, gradient, product, self._centre(low, w), matrix.columns)

    def _halves(self, low: Lowering, x: str, columns: int) -> tuple[str, str]:
        """(even columns less a 16th of the odd ones, a 16th of the odd columns) of x."""
        writer = low.writer
        pairs = writer.add("Reshape", [x, writer.integers(-1, columns // 2, 2)])
        apart = writer.add("Transpose", [pairs], perm=[2, 0, 1])
        even, odd = (
            writer.add("Gather", [apart, writer.constant(np.array(index, np.int64))], axis=0)
            for index in (0, 1)
        )
        odd = writer.add("Mul", [odd, writer.constant(np.float32(1 / 16))])
        return writer.add("Sub", [even, odd]), odd

    def _dense(self, low: Lowering, w: str) -> tuple[str, str]:
        """X0 and X1, each [N, K / 2]."""
        return low.once(("dense", w), lambda: self._make_dense(low, w))

    def _make_dense(self, low: Lowering, w: str) -> tuple[str, str]:
        writer, matrix = low.writer, low.matrix(w)
        stored = low.part(w, "q")
        lower = writer.add("BitwiseAnd", [stored, writer.constant(np.array(15, np.uint8))])
        zero, half = matrix.format.zero, BLOCK // 2
        first, second = (
            dequantised(low, codes, low.scale(w), shift, half, matrix.columns // 2)
            for codes, shift in ((lower, zero), (stored, 17 * zero))
        )
        return first, second

    def _centre(self, low: Lowering, w: str) -> str:
        """D [N, K / 32]: what a weight with code z is worth."""
        return low.once(("centre", w), lambda: self._make_centre(low, w))

    def _make_centre(self, low: Lowering, w: str) -> str:
        writer, matrix = low.writer, low.matrix(w)
        zero = writer.constant(np.float32(matrix.format.zero))
        if matrix.format.has_offset:
            middle = writer.add("Mul", [low.scale(w), zero])
            return writer.add("Add", [low.floats(w, "m"), middle])
        return writer.add("Mul", [writer.add("Sub", [zero, self._zeros(low, w)]), low.scale(w)])

    def _zeros(self, low: Lowering, w: str) -> str:
        """The codes of value 0 as floats [N, K / 32]; they are packed like weights."""
        writer, columns = low.writer, low.matrix(w).columns
        stored, last = low.part(w, "z"), writer.integers(-1)
        lower = writer.add("BitwiseAnd", [stored, writer.constant(np.array(15, np.uint8))])
        upper = writer.add("BitShift", [stored, writer.constant(np.array(4, np.uint8))], direction="RIGHT")
        pairs = [writer.add("Unsqueeze", [half, last]) for half in (lower, upper)]
        packed = -(-columns // (2 * BLOCK))
        flat = writer.add("Reshape", [writer.add("Concat", pairs, axis=-1), writer.integers(-1, 2 * packed)])
        if 2 * packed != columns // BLOCK:
            flat = writer.add(
                "Slice", [flat, writer.integers(0), writer.integers(columns // BLOCK), writer.integers(1)]
            )
        return writer.add("Cast", [flat], to=1)


class Bytes:
    """One 8-bit code a byte, about 128 or with an offset per block."""

    def forward(self, low: Lowering, x: str, w: str) -> str:
        """x W^T."""
        terms = [x, self._dense(low, w)]
        matrix = low.matrix(w)
        if matrix.format.has_offset:
            sums = block_sums(low, x, matrix.columns)
            terms.append(low.writer.add("Gemm", [sums, self._centre(low, w)], transB=1))
        return low.writer.add("Gemm", terms, transB=1)

    def backward(self, low: Lowering, gradient: str, w: str) -> str:
        """gradient W."""
        matrix = low.matrix(w)
        product = low.writer.add("Gemm", [gradient, self._dense(low, w)])
        if not matrix.format.has_offset:
            return product
        return with_offsets(low, gradient, product, self._centre(low, w), matrix.columns)

    def rows(self, low: Lowering, ids: str, w: str) -> str:
        """W[ids] for ids of any shape, as a matrix: only these rows are dequantised."""
        writer, matrix = low.writer, low.matrix(w)
        assert not matrix.format.has_offset, "embeddings are centred"
        codes = writer.add("Gather", [low.part(w, "q"), ids], axis=0)
        scale = writer.add("Cast", [writer.add("Gather", [low.part(w, "s"), ids], axis=0)], to=1)
        return dequantised(low, codes, scale, matrix.format.zero, BLOCK, matrix.columns)

    def _dense(self, low: Lowering, w: str) -> str:
        matrix = low.matrix(w)
        return low.once(
            ("dense", w),
            lambda: dequantised(
                low, low.part(w, "q"), low.scale(w), matrix.format.zero, BLOCK, matrix.columns
            ),
        )

    def _centre(self, low: Lowering, w: str) -> str:
        writer = low.writer
        middle = writer.constant(np.float32(low.matrix(w).format.zero))
        return low.once(
            ("centre", w),
            lambda: writer.add("Add", [low.floats(w, "m"), writer.add("Mul", [low.scale(w), middle])]),
        )


class Table:
    """4-bit codes into a table of 16 levels, as bitsandbytes stores them."""

    def forward(self, low: Lowering, x: str, w: str) -> str:
        """x W^T. `MatMulBnb4` cannot multiply by W itself, so a graph that needs both has a dense matrix anyway."""
        if w in low.backward_matrices:
            return low.writer.add("Gemm", [x, self._dense(low, w)], transB=1)
        return bnb_product(low, x, w)

    def backward(self, low: Lowering, gradient: str, w: str) -> str:
        """gradient W."""
        return low.writer.add("Gemm", [gradient, self._dense(low, w)])

    def _dense(self, low: Lowering, w: str) -> str:
        return low.once(("dense", w), lambda: self._make_dense(low, w))

    def _make_dense(self, low: Lowering, w: str) -> str:
        writer, matrix = low.writer, low.matrix(w)
        high, lower = np.divmod(np.arange(256), 16)
        pairs = writer.constant(np.stack([NF4_LEVELS[high], NF4_LEVELS[lower]], -1))
        index = writer.add("Cast", [low.part(w, "q")], to=6)
        levels = writer.add("Gather", [pairs, index], axis=0)
        blocks = writer.add("Reshape", [levels, writer.integers(-1, matrix.format.block)])
        scale = writer.add("Reshape", [low.part(w, "s"), writer.integers(-1, 1)])
        return writer.add(
            "Reshape", [writer.add("Mul", [blocks, scale]), writer.integers(-1, matrix.columns)]
        )


class Integers:
    """Integer products: 8-bit weights with a scale per row, activations rounded to 8 bits about their own zero.

    Every row of activations has a scale of its own and a fixed zero, so a token's result does not depend on the
    tokens beside it. (`DynamicQuantizeMatMul` takes one range over all rows, and is slower.)

    What the widest matrices of a block read on the way forward (in most models the product of gate and up) has single
    numbers far above the others, which leave the others few steps. It is rounded twice, what the first left out as
    well: SmolLM2-135M's whole gradient is then wrong by 0.25 of its length instead of 0.34. The weights stay integers.
    """

    def forward(self, low: Lowering, x: str, w: str) -> str:
        """x W^T."""
        weight, scale = low.part(w, "q"), low.part(w, "s")
        product = self._product(low, self._once(low, x), weight, scale)
        if not low.is_widest(w):
            return product
        rest = low.once(("rest", x), lambda: self._rest(low, x))
        return low.writer.add("Add", [product, self._product(low, self._once(low, rest), weight, scale)])

    def backward(self, low: Lowering, gradient: str, w: str) -> str:
        """gradient W: the scales of W's rows go into the gradient before it is rounded."""
        writer = low.writer
        scaled = writer.add("Mul", [gradient, low.part(w, "s")])
        turned = low.once(("turned", w), lambda: writer.add("Transpose", [low.part(w, "q")], perm=[1, 0]))
        return self._product(low, self._once(low, scaled), turned, writer.constant(np.float32(1)))

    def _product(self, low: Lowering, rounded: Rounded, weight: str, scale: str) -> str:
        writer = low.writer
        one, zero = writer.constant(np.float32(1)), writer.constant(np.array(_ZERO, np.uint8))
        product = writer.add(
            "MatMulIntegerToFloat", [rounded.codes, weight, one, scale, zero], domain=MICROSOFT
        )
        return writer.add("Mul", [product, rounded.size])

    def _once(self, low: Lowering, x: str) -> Rounded:
        return low.once(("rounded", x), lambda: self._rounded(low, x))

    def _rounded(self, low: Lowering, x: str) -> Rounded:
        writer, last = low.writer, low.writer.integers(-1)
        top = writer.add("ReduceMax", [writer.add("Abs", [x]), last], keepdims=1)
        size = writer.add("Mul", [top, writer.constant(np.float32(1 / _STEPS))])
        size = writer.add("Max", [size, writer.constant(np.float32(1e-30))])  # a row of zeros
        flat = writer.add("Squeeze", [size, last])
        zeros = writer.add(
            "Expand", [writer.constant(np.array(_ZERO, np.uint8)), writer.add("Shape", [flat])]
        )
        return Rounded(writer.add("QuantizeLinear", [x, flat, zeros], axis=0), size, flat, zeros)

    def _rest(self, low: Lowering, x: str) -> str:
        """What rounding leaves of x, [M, K]."""
        writer, found = low.writer, self._once(low, x)
        held = writer.add("DequantizeLinear", [found.codes, found.flat, found.zeros], axis=0)
        return writer.add("Sub", [x, held])


class Rounded(NamedTuple):
    """A matrix [M, K] as codes uint8 about 128; the scale of each row as [M, 1] and as [M], and its zeros [M]."""

    codes: str
    size: str
    flat: str
    zeros: str


PRODUCTS: Final[dict[Arithmetic, Products]] = {
    "nibbles": Nibbles(),
    "bytes": Bytes(),
    "table": Table(),
    "integers": Integers(),
}


def dequantised(low: Lowering, codes: str, scale: str, zero: int, block: int, columns: int) -> str:
    """(codes - zero) x scale as [N, columns], one scale for every `block` codes."""
    writer = low.writer
    flat = writer.add("Reshape", [scale, writer.integers(-1)])
    zeros = low.once(
        ("zeros", flat, str(zero)),
        lambda: writer.add(
            "Expand", [writer.constant(np.array(zero, np.uint8)), writer.add("Shape", [flat])]
        ),
    )
    blocks = writer.add("Reshape", [codes, writer.integers(-1, block)])
    floats = writer.add("DequantizeLinear", [blocks, flat, zeros], axis=0)
    return writer.add("Reshape", [floats, writer.integers(-1, columns)])


def block_sums(low: Lowering, x: str, columns: int) -> str:
    """Sums of x[M, K] over each block of 32 columns, computed once for all matrices that read x."""

    def make() -> str:
        writer = low.writer
        blocks = writer.add("Reshape", [x, writer.integers(-1, columns // BLOCK, BLOCK)])
        return writer.add("ReduceSum", [blocks, writer.integers(-1)], keepdims=0)

    return low.once(("sums", x), make)


def with_offsets(low: Lowering, gradient: str, product: str, centre: str, columns: int) -> str:
    """product + repeat(gradient D, 32)."""
    writer = low.writer
    shift = writer.add("Unsqueeze", [writer.add("Gemm", [gradient, centre]), writer.integers(-1)])
    blocks = writer.add("Reshape", [product, writer.integers(-1, columns // BLOCK, BLOCK)])
    return writer.add("Reshape", [writer.add("Add", [blocks, shift]), writer.integers(-1, columns)])


def bnb_product(low: Lowering, x: str, w: str) -> str:
    """x W^T of an nf4 matrix by `MatMulBnb4`."""
    writer, matrix = low.writer, low.matrix(w)
    flat = [writer.add("Reshape", [low.part(w, suffix), writer.integers(-1)]) for suffix in ("q", "s")]
    return writer.add(
        "MatMulBnb4",
        [x, *flat],
        domain=MICROSOFT,
        K=matrix.columns,
        N=matrix.rows,
        block_size=matrix.format.block,
        quant_type=1,
    )
