"""Torch modules to ONNX graphs whose weights are inputs: the block with its backward pass, the norm, the prologue.

`make_fx` traces one function that runs a block forward and asks autograd for the gradients, so the result is a
plain graph of forward and backward together. `lower.select` cuts it into the two graphs of the bundle later.
The weights stay inputs: one graph then serves every layer, fed from the mapped weight file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from quantize.blocks import block_parameters
from quantize.placeholder import embedding, translations

AUX: Final = ("mask", "cos", "sin")  # what the prologue computes once and every block reads
OPSET: Final = 18  # the lowest that torch's exporter writes; older runtimes read it too
_EXAMPLE: Final = (2, 13)  # batch and length of the traced example; any other works at run time


def export_block(block: nn.Module, hidden: int, head_dim: int) -> onnx.ModelProto:
    """Inputs x, gy, aux, adapter, frozen tensors; outputs y, gx and g:NAME for each adapter tensor."""
    adapter, frozen = block_parameters(block)
    split = 2 + len(AUX)

    def joint(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = tensors[0].detach().requires_grad_()
        trained = {n: t.detach().requires_grad_() for n, t in zip(adapter, tensors[split:], strict=False)}
        fixed = dict(zip(frozen, tensors[split + len(adapter) :], strict=True))
        y = call_block(block, {**trained, **fixed}, x, *tensors[2:split])
        return (y, *torch.autograd.grad(y, [x, *trained.values()], tensors[1]))

    batch, length = _EXAMPLE
    x = torch.randn(batch, length, hidden)
    mask = torch.zeros(batch, 1, length, length)
    cos, sin = torch.rand(1, length, head_dim), torch.rand(1, length, head_dim)
    tensors = (x, torch.randn_like(x), mask, cos, sin, *adapter.values(), *frozen.values())
    b, s = _dimensions()
    shapes = ({0: b, 1: s}, {0: b, 1: s}, {0: b, 2: s, 3: s}, {1: s}, {1: s})
    names = ("x", "gy", *AUX, *adapter, *frozen)
    outputs = ("y", "gx", *(f"g:{name}" for name in adapter))
    return _traced(joint, tensors, (*shapes, *[None] * (len(tensors) - split)), names, outputs)


def export_norm(norm: nn.Module, hidden: int) -> onnx.ModelProto:
    """Inputs h, gf, norm.*; outputs f, gh."""
    weights = {name: value.detach() for name, value in norm.named_parameters()}

    def joint(h: Tensor, gf: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        h = h.detach().requires_grad_()
        f = torch.func.functional_call(norm, dict(zip(weights, values, strict=True)), (h,))
        return f, torch.autograd.grad(f, h, gf)[0]

    h = torch.randn(*_EXAMPLE, hidden)
    b, s = _dimensions()
    shapes = ({0: b, 1: s}, {0: b, 1: s}, *[None] * len(weights))
    names = ("h", "gf", *(f"norm.{name}" for name in weights))
    return _traced(joint, (h, torch.randn_like(h), *weights.values()), shapes, names, ("f", "gh"))


class _Prologue(nn.Module):
    """Embedding, causal mask (0 or the lowest float, added to scores) and rotary tables of positions 0, 1, 2, ..."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, ids: Tensor, attention_mask: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        x = embedding(ids, table)
        positions = torch.arange(ids.shape[1])
        cos, sin = self.rotary(x, positions[None])
        seen = (positions[None] <= positions[:, None])[None, None] & (attention_mask[:, None, None] > 0)
        return x, torch.where(seen, 0.0, torch.finfo(torch.float32).min), cos, sin


def export_prologue(rotary: nn.Module, hidden: int) -> onnx.ModelProto:
    """Inputs input_ids, attention_mask, EMB; outputs x and aux."""
    ids = torch.zeros(_EXAMPLE, dtype=torch.long)
    b, s = _dimensions()
    shapes = ({0: b, 1: s}, {0: b, 1: s}, {0: Dim("rows", min=2)})
    arguments = (ids, torch.ones_like(ids), torch.randn(17, hidden))
    with torch.no_grad():
        program = torch.export.export(_Prologue(rotary), arguments, dynamic_shapes=shapes, strict=False)
    return to_onnx(program, ("input_ids", "attention_mask", "EMB"), ("x", *AUX))


def call_block(
    block: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    **more: Any,
) -> Tensor:
    """One layer of transformers' Llama family, its parameters given from outside."""
    keywords = {"attention_mask": mask, "position_embeddings": (cos, sin), **more}
    y = torch.func.functional_call(block, parameters, (x,), keywords)
    return y[0] if isinstance(y, tuple) else y


def to_onnx(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """ONNX graph of an exported program, its inputs and outputs renamed in order."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # one line per missing torchvision operator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=translations(),
        )
    model: onnx.ModelProto = exported.model_proto
    _rename(model.graph, inputs, outputs)
    return model


def _rename(graph: onnx.GraphProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name inputs and outputs; a prefix keeps the inner values, called after aten operators, out of their way."""
    renamed = {value.name: name for value, name in zip(graph.input, inputs, strict=True)}
    renamed |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}

    def rename(name: str) -> str:
        return renamed.get(name) or (f"inner/{name}" if name else "")

    for node in graph.node:
        node.input[:] = map(rename, node.input)
        node.output[:] = map(rename, node.output)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = rename(value.name)
    del graph.value_info[:]


def _traced(
    function: Callable[..., Any],
    arguments: tuple[Tensor, ...],
    shapes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    traced = make_fx(function, tracing_mode="symbolic")(*arguments)
    program = torch.export.export(traced, arguments, dynamic_shapes=shapes, strict=False)
    return to_onnx(program, inputs, outputs)


def _dimensions() -> tuple[Any, Any]:
    return Dim("batch", min=1, max=4096), Dim("length", min=3, max=1 << 20)
