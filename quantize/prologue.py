"""What a model does before its first layer, as one graph: the rows of the embedding and the tensors that layers share.

The model's own code is traced, with every layer replaced by a stub that notes how it was called. So a
scaled embedding, learned positions, a sliding window's mask or a second rotary table come over
because the model computes them, not because somebody remembered to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from quantize.anatomy import Anatomy, Slot, take, unrotated
from quantize.inputs import MASK, example, name_of, sizes, words_of
from quantize.joint import EXAMPLE, outer_dimensions, to_onnx
from quantize.placeholder import DOMAIN, EMBEDDING
from quantize.tracing import tracing
from quantize.watching import StandIn, arguments_of, untraceable

TABLE: Final = "EMB"  # the embedding, quantised
POSITIONS: Final = "POS"  # a table of learned positions, as it is
_ROWS: Final = 17  # of the traced embedding; any other number works at run time


class _Stub(StandIn):
    """Notes its call."""

    def __init__(self, layer: nn.Module, hidden: str, calls: list[dict[str, Any]]) -> None:
        super().__init__(layer)
        self._hidden, self._calls = hidden, calls

    def forward(self, *args: Any, **words: Any) -> Any:
        arguments = arguments_of(self._layer[0], args, words)
        self._calls.append(arguments)
        return (arguments[self._hidden],)


class _Untupled(_Stub):
    """The same for layers that return the hidden states alone."""

    def forward(self, *args: Any, **words: Any) -> Any:
        return super().forward(*args, **words)[0]


class Prologue(nn.Module):
    """(ids, attention mask, outer tensors) -> (x, aux tensors in the order of `Anatomy.aux_outputs`)."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self._calls: list[dict[str, Any]] = []
        self._anatomy = [anatomy]
        stub = _Stub if anatomy.tuples else _Untupled
        # A copy without the layers and what follows them, and with a small table in the place of the large one.
        memo: dict[int, Any] = {
            id(layer): stub(layer, anatomy.call.hidden, self._calls) for layer in anatomy.layers
        }
        memo |= {id(module): nn.Identity() for module in (anatomy.norm, anatomy.head) if module is not None}
        if anatomy.embedding is not None:
            small = nn.Parameter(torch.zeros(_ROWS, anatomy.hidden), requires_grad=False)
            memo[id(anatomy.embedding.weight)] = small
        self.skeleton = copy.deepcopy(anatomy.model, memo)
        if anatomy.embedding is not None:
            self.skeleton.get_input_embeddings().padding_idx = None  # matters to its gradient alone
        self.outer = outer_names(anatomy)

    def forward(self, ids: Tensor, mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(words_of(self.skeleton, ids, mask), *tensors)

    def run(self, words: Mapping[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same for a call of the model with these words."""
        anatomy, calls = self._anatomy[0], self._calls
        calls.clear()
        given = dict(zip(self.outer.values(), tensors, strict=True))
        torch.func.functional_call(self.skeleton, given, (), dict(words))
        found = [calls[0][anatomy.call.hidden]]
        for name in anatomy.aux:
            readers = anatomy.readers.values()
            if name in anatomy.shared:
                index, slots = next(reader for reader in readers if name in reader[1])
                found.append(take(slots[name], calls[index]))
            else:
                found += [self._own(name, calls[index], slots) for index, slots in readers]
        # An argument that is the attention mask itself must be a value of its own to be an output.
        same = id(words.get("attention_mask"))
        return tuple(value.clone() if id(value) == same else value for value in found)

    def _own(self, name: str, given: Mapping[str, Any], slots: Mapping[str, Slot]) -> Tensor:
        if name in slots:
            return take(slots[name], given)
        return unrotated(name, take(self._anatomy[0].call.slots[name], given))


def outer_names(anatomy: Anatomy) -> dict[str, str]:
    """Name in the weight file -> name in the model, of every parameter outside layers, norm and head; EMB first."""
    names: dict[str, str] = {}
    skipped = {id(value) for layer in anatomy.layers for value in layer.parameters()}
    skipped |= {
        id(value) for module in (anatomy.norm, anatomy.head) if module for value in module.parameters()
    }
    table = None if anatomy.embedding is None else anatomy.embedding.weight
    skipped.discard(id(table))
    skipped |= {id(value) for name, value in anatomy.model.named_parameters() if name in anatomy.tail.all}
    positions = _position_table(anatomy)
    for name, value in anatomy.model.named_parameters():
        if value is table:
            names = {TABLE: name, **names}
        elif id(value) not in skipped:
            names[POSITIONS if value is positions else name] = name
    return names


def _position_table(anatomy: Anatomy) -> Tensor | None:
    longest = getattr(anatomy.model.config, "max_position_embeddings", None)
    tables = [module for module in anatomy.model.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        if table is not anatomy.embedding and longest is not None and table.num_embeddings >= longest:
            return table.weight
    return None


def export_prologue(anatomy: Anatomy) -> onnx.ModelProto:
    """Inputs input_ids, attention_mask, EMB and other outer tensors by name; outputs x and `Anatomy.aux_outputs`."""
    program = Prologue(anatomy)
    given, mask = example(anatomy.model, *EXAMPLE)
    own = dict(program.skeleton.named_parameters())
    tensors = tuple(
        torch.randn(_ROWS, anatomy.hidden) if name == TABLE else own[full].detach()
        for name, full in program.outer.items()
    )
    b, s = outer_dimensions(anatomy)
    axes = sizes(anatomy.model, b, s)
    rows = [{0: Dim("rows", min=2)} if name == TABLE else None for name in program.outer]
    try:
        with torch.no_grad(), tracing():
            exported = torch.export.export(
                program,
                (torch.zeros_like(given), torch.ones_like(mask), *tensors),
                dynamic_shapes=(axes, axes, tuple(rows)),
                strict=False,
            )
    except Exception as error:  # whatever the model's own code may raise under the exporter
        raise untraceable("what comes before the layers", anatomy.model, error) from error
    inputs = (name_of(anatomy.model), MASK, *program.outer)
    return _plain_tables(to_onnx(exported, inputs, ("x", *anatomy.aux_outputs)))


def _plain_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rows of every table but the embedding by a plain Gather; inputs that nothing reads are left out."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == EMBEDDING and node.input[1] != TABLE:
            node.domain, node.op_type = "", "Gather"
            node.input[:] = [node.input[1], node.input[0]]
    used = {name for node in model.graph.node for name in node.input}
    for value in [value for value in model.graph.input if value.name not in used]:
        model.graph.input.remove(value)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return model
