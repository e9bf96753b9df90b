"""What a classifier does after its last layer: pooling, last norm, head; found and cut off by tracing the model's code.

Everything of a causal LM after its layers is one norm and one matrix. A classifier may do anything: take the first
token or the mean, pass through a pooler, a dense layer and an output layer, pick the last token that is no padding.
So no head is known by name. The model runs with its layers replaced by stubs, the last of which hands out the hidden
states that it is given from outside, and whatever parameters the logits then still depend on are the tail's.

Norms of the tail stay frozen, like all norms; the rest is trained in full.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from quantize.inputs import words_of
from quantize.watching import StandIn


@dataclass(frozen=True, slots=True)
class TailNames:
    """Parameters after the last layer, by name in the model; the outermost modules that hold trained ones alone."""

    trained: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[str]:
        """Trained and frozen."""
        return frozenset(self.trained + self.frozen)


NO_TAIL: Final = TailNames()


class _Passing(StandIn):
    """Gives back what it is given first, or what is `given` in its place."""

    def __init__(self, layer: nn.Module, tuples: bool, given: list[Tensor] | None) -> None:
        super().__init__(layer)
        self._tuples, self._given = tuples, given

    def forward(self, *args: Any, **words: Any) -> Any:
        hidden = self._given[0] if self._given else args[0] if args else next(iter(words.values()))
        return (hidden,) if self._tuples else hidden


class Tail(nn.Module):
    """(h [B, S, D], ids, attention mask, parameters by name) -> logits [B, C]."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], *, tuples: bool) -> None:
        super().__init__()
        self._given: list[Tensor] = []
        last = len(layers) - 1
        memo: dict[int, Any] = {
            id(layer): _Passing(layer, tuples, self._given if index == last else None)
            for index, layer in enumerate(layers)
        }
        self.skeleton = copy.deepcopy(model, memo).requires_grad_(False)

    def forward(self, h: Tensor, ids: Tensor, mask: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        self._given[:] = [h]
        words = words_of(self.skeleton, ids, mask)
        logits: Tensor = torch.func.functional_call(self.skeleton, dict(parameters), (), words).logits
        return logits


def tail_names(tail: Tail, h: Tensor, ids: Tensor, mask: Tensor) -> TailNames:
    """The parameters that the logits depend on, given the last layer's output."""
    named = dict(tail.skeleton.named_parameters())

    def run(h: Tensor, *values: Tensor) -> Tensor:
        return tail(h, ids, mask, dict(zip(named, values, strict=True)))

    with torch.no_grad():
        graph = make_fx(run)(h, *named.values()).graph
    _, *places = [node for node in graph.nodes if node.op == "placeholder"]
    needed = _needed(graph)
    read = [name for name, place in zip(named, places, strict=True) if place in needed]
    norms = norms_of(tail.skeleton)
    frozen = tuple(name for name in read if name.rpartition(".")[0] in norms)
    trained = tuple(sorted(set(read) - set(frozen)))
    return TailNames(trained, frozen, _modules(trained, set(named) - set(trained)))


def norms_of(model: nn.Module) -> set[str]:
    """Paths of the norms of a model: they stay frozen in a head as everywhere."""
    return {name for name, module in model.named_modules() if "Norm" in type(module).__name__}


def _needed(graph: Graph) -> set[Node]:
    """What the output is computed from. Dead code would not do: an addition in place counts as alive."""
    *_, output = graph.nodes
    needed, waiting = set[Node](), [output]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _modules(trained: Sequence[str], others: set[str]) -> tuple[str, ...]:
    """The outermost modules that hold trained parameters and none of the others."""
    found = set()
    for name in trained:
        parts = name.split(".")[:-1]
        path = next(
            ".".join(parts[:n])
            for n in range(1, len(parts) + 1)
            if not any(other.startswith(".".join(parts[:n]) + ".") for other in others)
        )
        found.add(path)
    return tuple(sorted(found))
