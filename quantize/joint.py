"""Torch modules to ONNX graphs whose weights are inputs: the block with its backward pass, and the last norm.

`make_fx` traces one function that runs a block forward and asks autograd for the gradients, so the result is a
plain graph of forward and backward together. `graph.select` cuts it into the two graphs of the bundle later.
The weights stay inputs: one graph then serves every layer, fed from the mapped weight file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from quantize.anatomy import BATCH, LENGTH, Anatomy, Size, take
from quantize.blocks import block_parameters
from quantize.idle import drop_idle
from quantize.sequences import cut_sequences
from quantize.tracing import changes_nothing, onnx_of, program_of, tracing
from quantize.watching import untraceable

_LENGTH_MAX: Final = 1 << 20
EXAMPLE: Final = (2, 13)  # batch and length of the traced example; any other works at run time


def export_block(anatomy: Anatomy, block: nn.Module) -> onnx.ModelProto:
    """Inputs x, gy, aux, adapter, frozen tensors; outputs y, gx and g:NAME for each adapter tensor."""
    adapter, frozen = block_parameters(block)
    split = 2 + len(anatomy.aux)

    def joint(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = tensors[0].detach().requires_grad_()
        trained = {n: t.detach().requires_grad_() for n, t in zip(adapter, tensors[split:], strict=False)}
        fixed = dict(zip(frozen, tensors[split + len(adapter) :], strict=True))
        aux = dict(zip(anatomy.aux, tensors[2:split], strict=True))
        y = anatomy.call(block, {**trained, **fixed}, x, aux)
        return (y, *torch.autograd.grad(y, [x, *trained.values()], tensors[1]))

    x = torch.randn(*EXAMPLE, anatomy.hidden)
    tensors = (x, torch.randn_like(x), *example_aux(anatomy), *adapter.values(), *frozen.values())
    b, s = dimensions()
    shapes = ({0: b, 1: s}, {0: b, 1: s}, *aux_shapes(anatomy, b, s))
    names = ("x", "gy", *anatomy.aux, *adapter, *frozen)
    outputs = ("y", "gx", *(f"g:{name}" for name in adapter))
    try:
        traced = traced_graph(joint, tensors, (*shapes, *[None] * (len(tensors) - split)), names, outputs)
    except Exception as error:  # whatever a layer's own code may raise under a tracer
        raise untraceable(f"{anatomy.layers_path}.{anatomy.pattern}", block, error) from error
    for node in traced.graph.node:  # the exporter asks the last input for its sizes; the way there has no gy
        if node.op_type == "Shape" and node.input[0] == "gy":
            node.input[0] = "x"
    return traced


def example_aux(anatomy: Anatomy) -> list[Tensor]:
    """Aux tensors of the traced example, with the types that the model gives them."""
    sizes = dict(zip((BATCH, LENGTH), EXAMPLE, strict=True))
    found = []
    for name, shape in anatomy.call.shapes.items():
        size = [n if isinstance(n, int) else sizes[n] for n in shape]
        found.append(torch.zeros(size, dtype=take(anatomy.call.slots[name], anatomy.call.fixed).dtype))
    return found


def aux_shapes(anatomy: Anatomy, batch: Any, length: Any) -> list[dict[int, Any]]:
    """Which axes of each aux tensor follow the batch, for torch's exporter."""
    symbols: dict[Size, Any] = {BATCH: batch, LENGTH: length}
    return [
        {axis: symbols[size] for axis, size in enumerate(shape) if size in symbols}
        for shape in anatomy.call.shapes.values()
    ]


def export_norm(norm: nn.Module, hidden: int) -> onnx.ModelProto:
    """Inputs h, gf, norm.*; outputs f, gh."""
    weights = {name: value.detach() for name, value in norm.named_parameters()}

    def joint(h: Tensor, gf: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        h = h.detach().requires_grad_()
        f = torch.func.functional_call(norm, dict(zip(weights, values, strict=True)), (h,))
        return f, torch.autograd.grad(f, h, gf)[0]

    h = torch.randn(*EXAMPLE, hidden)
    b, s = dimensions()
    shapes = ({0: b, 1: s}, {0: b, 1: s}, *[None] * len(weights))
    names = ("h", "gf", *(f"norm.{name}" for name in weights))
    return traced_graph(joint, (h, torch.randn_like(h), *weights.values()), shapes, names, ("f", "gh"))


def to_onnx(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """ONNX graph of an exported program, its inputs and outputs renamed in order."""
    model = onnx_of(program)
    _rename(model.graph, inputs, outputs)
    cut_sequences(model.graph)
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


def traced_graph(
    function: Callable[..., Any],
    arguments: tuple[Tensor, ...],
    shapes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    pure: bool = False,
) -> onnx.ModelProto:
    """The graph of a function of tensors; `shapes` says which sizes may change, as torch's exporter wants it.

    Sizes are fixed but for batch and length, and the trace is of torch's core operators. torch's exporter would trace
    twice more, to check and to decompose, at twice the cost of all the rest; nothing is left to decompose, so it is
    told so, and where nothing is left to check (`tracing.program_of`) it is spared both.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing():
        stand_ins = [_stand_in(mode, *pair) for pair in zip(arguments, shapes, strict=True)]
        with mode, enable_python_dispatcher():
            traced = make_fx(function, decomposition_table=core_aten_decompositions())(*stand_ins)
        drop_idle(traced, pure=pure)
        program = program_of(traced, mode.shape_env)
        if program is None:
            program = torch.export.export(traced, arguments, dynamic_shapes=shapes, strict=False)
            if not all(map(changes_nothing, traced.graph.nodes)):
                program = program.run_decompositions({})  # what is done in place becomes a value of its own
    program.run_decompositions = lambda *_: program
    return to_onnx(program, inputs, outputs)


def _stand_in(mode: FakeTensorMode, tensor: Tensor, symbols: Mapping[int, Any] | None) -> Tensor:
    """A tensor without numbers whose sizes are symbols where `symbols` has the axis."""
    kinds = [
        DimDynamic.DUCK if axis in (symbols or {}) else DimDynamic.STATIC for axis in range(tensor.dim())
    ]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def dimensions(longest: int = _LENGTH_MAX) -> tuple[Any, Any]:
    """Batch and length as torch's exporter knows them; `longest` where the model's code holds tables of a length."""
    return Dim("batch", min=1, max=4096), Dim("length", min=3, max=longest)


def outer_dimensions(anatomy: Anatomy) -> tuple[Any, Any]:
    """The same for what surrounds the layers: encoders cut positions out of a buffer, which has an end."""
    longest = getattr(anatomy.model.config, "max_position_embeddings", None) if anatomy.head is None else None
    return dimensions(longest) if longest else dimensions()
