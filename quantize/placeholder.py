"""Placeholder operators: a frozen matrix product stays one node from torch's tracer to the ONNX graph.

The tracer sees `fedge::linear(x, w)` with a float matrix; `lower` later replaces the node by the operators of the
weight's format. Its derivative is a placeholder too, so no transposed or dense copy of a frozen weight appears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import onnx
import onnxscript
import torch
from onnxscript import opset18 as op
from torch import Tensor

DOMAIN: Final = "fedge"
LINEAR: Final = "Linear"  # y[..., N] = x[..., K] w[N, K]^T
LINEAR_DX: Final = "LinearDx"  # gx[..., K] = gy[..., N] w[N, K]
EMBEDDING: Final = "Embedding"  # rows of w[V, D]


@torch.library.custom_op("fedge::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T."""
    return x @ weight.t()


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("fedge::linear_dx", mutates_args=())
def linear_dx(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight."""
    return gradient @ weight


@linear_dx.register_fake
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


@torch.library.custom_op("fedge::embedding", mutates_args=())
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]."""
    return weight[ids]


@embedding.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _save_weight(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return linear_dx(gradient, ctx.saved_tensors[0]), None


linear.register_autograd(_linear_backward, setup_context=_save_weight)


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """How torch's exporter writes the placeholders, look-ups, and two operators whose stock translation is wasteful."""
    _register_schemas()
    fedge = onnxscript.values.Opset(DOMAIN, 1)
    return {
        torch.ops.fedge.linear.default: lambda x, w: fedge.Linear(x, w),
        torch.ops.fedge.linear_dx.default: lambda x, w: fedge.LinearDx(x, w),
        torch.ops.fedge.embedding.default: lambda ids, w: fedge.Embedding(ids, w),
        torch.ops.aten.embedding.default: _embedding,
        torch.ops.aten.slice_scatter.default: _slice_scatter,
        torch.ops.aten.squeeze.dims: _squeeze,
        torch.ops.aten.empty_permuted.default: _empty_permuted,
    }


def _register_schemas() -> None:
    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    floats, integers = ("T", ["tensor(float)"], ""), ("I", ["tensor(int64)"], "")
    for name, first in ((LINEAR, "T"), (LINEAR_DX, "T"), (EMBEDDING, "I")):
        inputs = [parameter("x", first), parameter("w", "T")]
        kinds = [floats, integers] if first == "I" else [floats]
        made = schema(name, DOMAIN, 1, inputs=inputs, outputs=[parameter("y", "T")], type_constraints=kinds)
        onnx.defs.register_schema(made)


def _embedding(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """The model's own look-up; what else it may say is about the gradient of the table."""
    return onnxscript.values.Opset(DOMAIN, 1).Embedding(indices, weight)


def _squeeze(self: Any, dim: Sequence[int]) -> Any:
    """Axes of size one, taken out all at once."""
    return op.Squeeze(self, op.Constant(value_ints=list(dim)))


def _slice_scatter(
    self: Any, src: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    """self[:start] ++ src ++ self[end:]: one Concat instead of the exporter's ScatterND over all indices."""
    assert step == 1
    parts = [src]
    if start:
        parts.insert(0, op.Slice(self, _axis(0), _axis(start), _axis(dim)))
    if end is not None and end < 2**31:
        parts.append(op.Slice(self, _axis(end), _axis(2**62), _axis(dim)))
    return src if len(parts) == 1 else op.Concat(*parts, axis=dim)


def _empty_permuted(size: Any, physical_layout: Any = None, **_: Any) -> Any:
    """A tensor that is written in full later: its content does not matter, zeros will do."""
    if isinstance(size, Sequence):
        lengths = [_axis(n) if isinstance(n, int) else op.Reshape(n, _axis(1)) for n in size]
        size = op.Concat(*lengths, axis=0)
    return op.Expand(op.Constant(value_float=0.0), size)


def _axis(value: int) -> Any:
    return op.Constant(value_ints=[value])
