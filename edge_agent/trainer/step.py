"""One training step, streamed: the same two block graphs run layer after layer over the mapped weights.

Forward keeps only each block's input; backward computes a block again from it and returns the gradients of its B
(activation checkpointing, Chen et al. 2016, arXiv 1604.06174). Every function here is a generator that yields after
each run of a session, 10 to 30 ms apart, so that whoever drives it may pause for heat, battery or a stop. A step
holds nothing worth saving: after a power cut it is done again.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.trainer.head import Head, HeadResult
from edge_agent.trainer.sessions import Floats, Graph, Tensor
from fedge.errors import ConfigError, DataError

Ints = NDArray[np.int64]
_NOTHING: Final = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss_sum` in nats over `labels` tokens; `gradients` of the *mean* loss, by name of each B that trains."""

    loss_sum: float
    labels: int
    gradients: dict[str, Floats]


class Streamer:
    """The bundle's graphs and the loop over its blocks."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        def graph(name: str) -> Graph:
            return Graph(bundle.graph(name), threads)

        self._bundle = bundle
        self._prologue, self._forward, self._backward = map(graph, ("prologue", "block_fwd", "block_bwd"))
        self._norm, self._norm_backward = graph("norm_fwd"), graph("norm_bwd")
        self._head = Head(bundle, graph("rows"), graph("ce"))
        names = bundle.manifest.tensors
        self._outer = [name for name in names if not _layer_of(name)]
        self._layers = [
            [name for name in names if _layer_of(name) == f"L{i}"] for i in range(bundle.manifest.layers)
        ]
        self._spans = [bundle.span(layer) for layer in self._layers]
        self._b_gradients = tuple(name for name in self._backward.outputs if name.endswith(".B"))

    def features(
        self, ids: Ints, mask: Ints, adapter: Mapping[str, Floats], kept: dict[int, Floats] | None = None
    ) -> Generator[None, None, tuple[Floats, dict[str, Floats]]]:
        """The last block's output [B, S, D] and the aux tensors; `kept` gets the input of each block that it names."""
        outer = self._tensors(self._outer)
        aux = self._prologue.run({"input_ids": ids, "attention_mask": mask, **outer})
        x = aux.pop("x")
        yield
        for i in range(self._bundle.manifest.layers):
            if kept is not None and i in kept:
                kept[i] = x
            x = self._forward.run({"x": x, **aux, **self._block(i, adapter)}, ("y",))["y"]
            self._bundle.let_go(self._spans[i])
            yield
        return x, aux

    def losses(
        self, ids: Ints, mask: Ints, labels: Ints, adapter: Mapping[str, Floats]
    ) -> Generator[None, None, Floats]:
        """The loss in nats of every label, in reading order; empty when there is none."""
        if not (labels >= 0).any():
            return np.zeros(0, np.float32)
        h, _ = yield from self.features(ids, mask, adapter)
        result, _ = yield from self._loss(h, labels)
        return result.nll

    def step(
        self, ids: Ints, mask: Ints, labels: Ints, adapter: Mapping[str, Floats], depth: int = 0
    ) -> Generator[None, None, StepResult]:
        """Loss of a batch, and its gradients in the top `depth` layers, 0 = all: the way back ends there.

        Raises DataError without a label, ConfigError when not finite.
        """
        count = int((labels >= 0).sum())
        if count == 0:
            raise DataError("batch has no label", field="labels", value=0, hint="Leave such batches out")
        layers = self._bundle.manifest.layers
        trained = range(layers - min(depth or layers, layers), layers)
        kept = dict.fromkeys(trained, _NOTHING)
        h, aux = yield from self.features(ids, mask, adapter, kept)
        result, gradient = yield from self._loss(h, labels)
        loss_sum = float(result.nll.sum(dtype=np.float64))
        require_finite("loss", loss_sum)
        gradient /= np.float32(count)
        norm = self._tensors(self._outer)
        g = self._norm_backward.run({"h": h, "gf": gradient, **norm})["gh"]
        yield
        gradients: dict[str, Floats] = {}
        for i in reversed(trained):
            feeds = {"x": kept.pop(i), "gy": g, **aux, **self._block(i, adapter)}
            out = self._backward.run(feeds, ("gx", *self._b_gradients))
            g = out.pop("gx")
            gradients.update((f"L{i}/{name.removeprefix('g:')}", value) for name, value in out.items())
            self._bundle.let_go(self._spans[i])
            yield
        return StepResult(loss_sum, count, gradients)

    def reserve(self, rows: int, tokens: int, adapter: Mapping[str, Floats]) -> None:
        """One block, one slice of the head and back, on the largest batch there will be.

        The runtime's arena keeps what it once had and reuses a piece only for what fits: met smallest first, the
        shapes of a ragged data set leave 10 to 20 MB of holes. Met largest first, none.
        """
        ids = np.zeros((rows, tokens), np.int64)
        outer, block = self._tensors(self._outer), self._block(0, adapter)
        aux = self._prologue.run({"input_ids": ids, "attention_mask": np.ones_like(ids), **outer})
        x = aux.pop("x")
        h = self._forward.run({"x": x, **aux, **block}, ("y",))["y"]
        flat = self._norm.run({"h": h, **outer})["f"].reshape(ids.size, -1)
        next(islice(self._head.run(flat, ids.reshape(-1)), 1, None))
        g = self._norm_backward.run({"h": h, "gf": flat.reshape(h.shape), **outer})["gh"]
        self._backward.run({"x": x, "gy": g, **aux, **block}, ("gx", *self._b_gradients))
        self._bundle.let_go(self._spans[0])

    def _loss(self, h: Floats, labels: Ints) -> Generator[None, None, tuple[HeadResult, Floats]]:
        """Losses at the labels, and the gradient of their sum by the final features [B, S, D]."""
        f = self._norm.run({"h": h, **self._tensors(self._outer)})["f"]
        yield
        at = np.flatnonzero(labels.reshape(-1) >= 0)
        flat = f.reshape(-1, f.shape[-1])
        result = yield from self._head.run(flat[at], labels.reshape(-1)[at])
        gradient = np.zeros_like(flat)
        gradient[at] = result.gradient
        return result, gradient.reshape(f.shape)

    def _block(self, i: int, adapter: Mapping[str, Floats]) -> dict[str, Tensor]:
        prefix = f"L{i}/"
        feeds = {name.removeprefix(prefix): self._bundle.tensor(name) for name in self._layers[i]}
        for name in self._forward.inputs:
            if prefix + name in adapter:
                feeds[name] = adapter[prefix + name]
        return feeds

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._bundle.tensor(name) for name in names}


def require_finite(what: str, value: float) -> None:
    """Raises ConfigError when training has left the finite numbers."""
    if not np.isfinite(value):
        raise ConfigError(
            "training diverged", field=what, value=value, hint="Lower the learning rate of the campaign"
        )


def _layer_of(name: str) -> str:
    head, slash, _ = name.partition("/")
    return head if slash else ""
