"""The output layer as graphs that never hold all logits: rows at the labels, and one slice of the cross-entropy.

The matrix is the embedding when the model shares them, else one of its own. A soft-cap c tanh(z / c) on the logits
(Gemma 2, arXiv 2408.00118) belongs to the slice; at the label the device applies it, with the same c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx

from quantize.graph import GraphWriter, tensor_input
from quantize.lower import lower
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR, LINEAR_DX

HEAD: Final = "HEAD"  # the output matrix in the weight file, where it is not the embedding
_SLICE: Final = "W"  # some rows of it


def output_rows(hidden: int, table: str, format_name: str) -> onnx.ModelProto:
    """rows.onnx: rows[M, D] of the output matrix `table` (EMB or HEAD) at ids[M]."""
    writer = GraphWriter()
    writer.add(EMBEDDING, ["ids", table], "rows", domain=DOMAIN)
    model = writer.model(
        [tensor_input("ids", "int64", ["M"]), tensor_input(table, "float32", ["V", hidden])],
        [tensor_input("rows", "float32", ["M", hidden])],
    )
    return lower(model, {table: ("V", hidden)}, format_name)


def cross_entropy_slice(hidden: int, format_name: str, cap: float = 0.0) -> onnx.ModelProto:
    """ce.onnx: one vocabulary slice of a streamed softmax over f[M, D] W^T, soft-capped when `cap` is not 0.

    Running maximum m, denominator z and sum acc of exp-weighted rows, as in online softmax (Milakov and
    Gimelshein 2018, arXiv 1805.02867). After the last slice log-sum-exp is m + log z and the gradient of it with
    respect to f is acc / z. The first slice gets m = -1e30, z = 0, acc = 0.
    """
    writer = GraphWriter()
    one = writer.integers(1)
    logits = writer.add(LINEAR, ["f", _SLICE], domain=DOMAIN)
    if cap:
        bound = writer.constant(np.array(cap, np.float32))
        bent = writer.add("Tanh", [writer.add("Div", [logits, bound])])
        logits = writer.add("Mul", [bent, bound])
    top = writer.add("Max", [writer.add("ReduceMax", [logits, one], keepdims=1), "m"], "m2")
    shrink = writer.add("Exp", [writer.add("Sub", ["m", top])])
    weights = writer.add("Exp", [writer.add("Sub", [logits, top])])
    total = writer.add("ReduceSum", [weights, one], keepdims=1)
    writer.add("Add", [writer.add("Mul", ["z", shrink]), total], "z2")
    if cap:  # d cap(z) / d z = 1 - tanh^2
        slope = writer.add("Sub", [writer.constant(np.array(1, np.float32)), writer.add("Mul", [bent, bent])])
        weights = writer.add("Mul", [weights, slope])
    rows = writer.add(LINEAR_DX, [weights, _SLICE], domain=DOMAIN)
    writer.add("Add", [writer.add("Mul", ["acc", shrink]), rows], "acc2")
    widths = {"f": hidden, _SLICE: hidden, "m": 1, "z": 1, "acc": hidden}
    inputs = [tensor_input(n, "float32", ["R" if n == _SLICE else "M", width]) for n, width in widths.items()]
    outputs: Sequence[onnx.ValueInfoProto] = [
        tensor_input(n, "float32", ["M", w]) for n, w in (("m2", 1), ("z2", 1), ("acc2", hidden))
    ]
    return lower(writer.model(inputs, outputs), {_SLICE: ("R", hidden)}, format_name)
