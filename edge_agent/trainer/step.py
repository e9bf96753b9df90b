"""One training step, streamed: the same few block graphs run layer after layer over the mapped weights.

Forward keeps each block's input; backward computes a block again from it and returns the gradients of its adapter
(activation checkpointing, Chen et al. 2016, arXiv 1604.06174). Where the plan keeps the products of a block's frozen
matrices, too, they are not computed again. Every function here is a generator that yields after each run of a
session, 10 to 30 ms apart, so that whoever drives it may pause for heat, battery or a stop. A step holds nothing
worth saving: after a power cut it is done again.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.depth import FEATURES, HEAD
from edge_agent.planner import Plan, encodes_once
from edge_agent.trainer.batch import BatchArrays, Inputs, Piece, label_count
from edge_agent.trainer.checkpoints import Checkpoints, Filed, Half, Plain
from edge_agent.trainer.classify import TASK as CLASSIFY
from edge_agent.trainer.classify import Answer, Classifier
from edge_agent.trainer.frozen import FrozenEncoder
from edge_agent.trainer.head import Head, HeadResult
from edge_agent.trainer.pairs import POOL, POOL_BACKWARD, Pooling, Slopes
from edge_agent.trainer.pairs import TASK as EMBED
from edge_agent.trainer.sessions import Floats, Graph, Tensor
from fedge.errors import DataError

Ints = NDArray[np.int64]
# Trained layers: one more session costs 2 MB and saves a tenth of one block's way back.
_FIRST_PAYS_BELOW: Final = 9


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss_sum` in nats over `labels` tokens; `gradients` of the *mean* loss, by name of each A and B that trains.

    There are none when the loss is not finite.
    """

    loss_sum: float
    labels: int
    gradients: dict[str, Floats]


@dataclass(frozen=True, slots=True)
class _Forward:
    """What the way back needs of the way there."""

    checkpoints: Checkpoints
    kept: dict[int, dict[str, Floats]]


class Streamer:
    """The bundle's graphs and the loop over its blocks. `folder` is where a plan may keep checkpoints in a file."""

    def __init__(self, bundle: Bundle, threads: int, plan: Plan, folder: Path) -> None:
        self._bundle, self._threads, self._plan = bundle, threads, plan
        self._graphs: dict[str, Graph] = {}
        manifest = bundle.manifest
        self._depth = manifest.layers
        names = manifest.tensors
        self._outer = [name for name in names if not _layer_of(name)]
        self._layers = [[name for name in names if _layer_of(name) == f"L{i}"] for i in range(self._depth)]
        self._spans = [bundle.span(layer) for layer in self._layers]
        table = [name for name in names if name.startswith("EMB.")]
        self._table = bundle.span(table) if table else (0, 0)
        self._input = "input_ids" if manifest.hears is None else "input_features"
        self._classifier: Classifier | None = None
        self._pooling: Pooling | None = None
        self._head: Head | None = None
        self._frozen: FrozenEncoder | None = None
        if manifest.task == CLASSIFY:
            self._classifier = Classifier(bundle, self._graph("classify"))
        elif manifest.task == EMBED:
            self._pooling = Pooling(self._graph(POOL), self._graph(POOL_BACKWARD))
        else:
            self._head = Head(bundle, self._graph("rows"), self._graph("ce"))
        self._filed = Filed(folder, self._depth) if plan.checkpoints == "file" else None
        norms = ("norm_fwd", "norm_bwd") if self._head is not None else ()
        for name in ("prologue", "block_fwd", "block_bwd", *norms):
            if name != "block_bwd" or plan.keep < self._depth:
                self._graph(name)
        if plan.keep:
            self._graph("block_fwd_keep")
            self._graph("block_bwd_keep")

    def features(
        self, ids: Inputs, mask: Ints, adapter: Mapping[str, Floats], trained: range = range(0)
    ) -> Generator[None, None, tuple[Floats, dict[str, Floats], _Forward]]:
        """The last block's output [B, S, D], the aux tensors, and what the way back through `trained` needs."""
        forward = _Forward(self._checkpoints(), {})
        aux = self._before(ids, mask)
        x = aux.pop("x")
        self._bundle.let_go(self._table)
        yield
        for i in range(self._depth):
            keeps = i in trained and i >= self._depth - self._plan.keep
            if i in trained:
                forward.checkpoints.put(i, x)
            graph = self._graph("block_fwd_keep" if keeps else "block_fwd")
            out = graph.run({"x": x, **self._block(i, aux, adapter)}, last=i == self._depth - 1)
            x = out.pop("y")
            if keeps:
                forward.kept[i] = out
            self._bundle.let_go(self._spans[i])
            yield
        return x, aux, forward

    def losses(
        self, ids: Inputs, mask: Ints, labels: Ints, adapter: Mapping[str, Floats]
    ) -> Generator[None, None, Floats]:
        """The loss in nats of every label, in reading order; empty when there is none."""
        if not (labels >= 0).any():
            return np.zeros(0, np.float32)
        if self._head is None:
            answer = yield from self.answers(Piece(ids, mask, labels), adapter)
            return answer.nll
        h, _, _ = yield from self.features(ids, mask, adapter)
        result, _ = yield from self._loss(h, labels)
        return result.nll

    def answers(self, batch: BatchArrays, adapter: Mapping[str, Floats]) -> Generator[None, None, Answer]:
        """What a classifier makes of the rows with a label, of which there is one at least; or what pairs give."""
        h, _, _ = yield from self.features(batch.ids, batch.mask, adapter)
        answer = self._ending().run(h, batch, adapter, self._outside())
        yield
        return answer

    def vectors(self, batch: BatchArrays, adapter: Mapping[str, Floats]) -> Generator[None, None, Floats]:
        """What a sentence encoder makes of each row [B, D]."""
        assert self._pooling is not None, "this bundle is no sentence encoder"
        h, _, _ = yield from self.features(batch.ids, batch.mask, adapter)
        found = self._pooling.vectors(h, batch, self._outside())
        yield
        return found

    def step(
        self, batch: BatchArrays, adapter: Mapping[str, Floats], lowest: int = 0, of_labels: int = 0
    ) -> Generator[None, None, StepResult]:
        """Loss of a batch, and its gradients in the layers from `lowest` up: the way back ends there.

        The mean is over the batch's own labels, or over `of_labels`, of which this is a part. Raises DataError
        without a label.
        """
        count = label_count(batch)
        if count == 0 and not isinstance(batch, Slopes):
            raise DataError("batch has no label", field="labels", value=0, hint="Leave such batches out")
        if lowest == self._depth and (frozen := self._frozen_encoder()) is not None:
            return (yield from self._head_alone(frozen, batch, adapter, count, of_labels or count))
        trained = range(lowest, self._depth)
        h, aux, forward = yield from self.features(batch.ids, batch.mask, adapter, trained)
        loss_sum, g, gradients = yield from self._end(h, batch, adapter, np.float32(of_labels or count))
        del h  # as large as a checkpoint, and nobody's any more
        if g is None:
            return StepResult(loss_sum, count, {})
        for i in reversed(trained):
            kept = forward.kept.pop(i, {})
            graph = self._backward(i, lowest, keeps=bool(kept))
            feeds = {"x": forward.checkpoints.take(i), "gy": g, **kept, **self._block(i, aux, adapter)}
            out = graph.run(feeds, last=i == lowest)
            g = out.pop("gx", g)
            # As they come they lie in the runtime's arena, each in a piece that may be megabytes large.
            gradients.update((f"L{i}/{n.removeprefix('g:')}", value.copy()) for n, value in out.items())
            out.clear()
            self._bundle.let_go(self._spans[i])
            yield
        return StepResult(loss_sum, count, gradients)

    def _head_alone(
        self, frozen: FrozenEncoder, batch: BatchArrays, adapter: Mapping[str, Floats], count: int, of: int
    ) -> Generator[None, None, StepResult]:
        assert self._classifier is not None, "only a classifier has a frozen encoder"

        def encode(ids: Inputs, mask: Ints) -> Generator[None, None, Floats]:
            h, _, _ = yield from self.features(ids, mask, adapter)
            return h

        values = self._classifier.values(adapter)
        answer = yield from frozen.step(batch, adapter, values, self._outside(), encode)
        loss_sum = float(answer.nll.sum(dtype=np.float64))
        if not np.isfinite(loss_sum):
            return StepResult(loss_sum, count, {})
        return StepResult(loss_sum, count, {n: g / np.float32(of) for n, g in answer.gradients.items()})

    def _frozen_encoder(self) -> FrozenEncoder | None:
        """What trains the head alone, where the bundle has the graphs for it."""
        if self._frozen is None and encodes_once(self._bundle.manifest):
            self._frozen = FrozenEncoder(self._graph(FEATURES), self._graph(HEAD))
        return self._frozen

    def _end(
        self, h: Floats, batch: BatchArrays, adapter: Mapping[str, Floats], count: np.float32
    ) -> Generator[None, None, tuple[float, Floats | None, dict[str, Floats]]]:
        """Sum of the losses, and the gradients of sum / `count` by the last block's output and by what is dense.

        There are none when the sum is not finite.
        """
        if self._head is None:
            answer = self._ending().run(h, batch, adapter, self._outside())
            yield
            loss_sum = float(answer.nll.sum(dtype=np.float64))
            if not np.isfinite(loss_sum):
                return loss_sum, None, {}
            return loss_sum, answer.gradient / count, {n: g / count for n, g in answer.gradients.items()}
        result, gradient = yield from self._loss(h, batch.labels)
        loss_sum = float(result.nll.sum(dtype=np.float64))
        if not np.isfinite(loss_sum):
            return loss_sum, None, {}
        gradient /= count
        g = self._graph("norm_bwd").run({"h": h, "gf": gradient, **self._outside()})["gh"]
        yield
        return loss_sum, g, {}

    def _ending(self) -> Classifier | Pooling:
        """What stands behind the last block of an encoder."""
        ending = self._classifier or self._pooling
        assert ending is not None, "this bundle is no encoder"
        return ending

    def _before(self, ids: Inputs, mask: Ints) -> dict[str, Floats]:
        """What the prologue makes of ids, or of features: x and the aux tensors."""
        return self._graph("prologue").run({self._input: ids, "attention_mask": mask, **self._outside()})

    def _loss(self, h: Floats, labels: Ints) -> Generator[None, None, tuple[HeadResult, Floats]]:
        """Losses at the labels, and the gradient of their sum by the final features [B, S, D]."""
        assert self._head is not None, "this bundle is an encoder"
        f = self._graph("norm_fwd").run({"h": h, **self._outside()})["f"]
        yield
        at, shape = np.flatnonzero(labels.reshape(-1) >= 0), f.shape
        chosen = f.reshape(-1, shape[-1])[at]
        del f
        result = yield from self._head.run(chosen, labels.reshape(-1)[at], self._plan.head_rows)
        gradient = np.zeros((labels.size, shape[-1]), np.float32)
        gradient[at] = result.gradient
        return result, gradient.reshape(shape)

    def _backward(self, i: int, lowest: int, *, keeps: bool) -> Graph:
        if keeps:
            return self._graph("block_bwd_keep")
        first = "block_bwd_first.onnx" in self._bundle.manifest.files
        if i == lowest and first and self._depth - lowest < _FIRST_PAYS_BELOW:
            return self._graph("block_bwd_first")
        return self._graph("block_bwd")

    def _block(self, i: int, aux: Mapping[str, Floats], adapter: Mapping[str, Floats]) -> dict[str, Tensor]:
        """What the block of layer i reads beside x: weights, its A and B, and the aux tensors of its kind."""
        prefix, kinds = f"L{i}/", self._bundle.manifest.layer_kinds
        feeds: dict[str, Tensor] = {name: value for name, value in aux.items() if "@" not in name}
        if kinds:
            of_kind = f"@{kinds[i]}"
            feeds |= {n.removesuffix(of_kind): v for n, v in aux.items() if n.endswith(of_kind)}
        feeds |= {name.removeprefix(prefix): self._bundle.tensor(name) for name in self._layers[i]}
        feeds |= {name.removeprefix(prefix): v for name, v in adapter.items() if name.startswith(prefix)}
        return feeds

    def _checkpoints(self) -> Checkpoints:
        if self._filed is not None:
            return self._filed
        return Half() if self._plan.checkpoints == "half" else Plain()

    def _outside(self) -> dict[str, Tensor]:
        return {name: self._bundle.tensor(name) for name in self._outer}

    def _graph(self, name: str) -> Graph:
        """The session of a graph, loaded when it is first asked for."""
        if name not in self._graphs:
            self._graphs[name] = Graph(self._bundle.graph(name), self._threads)
        return self._graphs[name]


def _layer_of(name: str) -> str:
    head, slash, _ = name.partition("/")
    return head if slash and head != "dense" else ""
