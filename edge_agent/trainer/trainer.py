"""An open bundle that trains and evaluates: sessions, the frozen A of a campaign, and the plan for this board."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.depth import HEAD_ONLY, lowest_layer
from edge_agent.planner import Plan
from edge_agent.trainer.batch import BatchArrays, Inputs, Piece, cut, label_count, pieces
from edge_agent.trainer.classify import Answer, label_limit, labelled
from edge_agent.trainer.evaluate import by_row
from edge_agent.trainer.pairs import TASK as EMBED
from edge_agent.trainer.pairs import Slopes, check_pairs, in_batch, in_pieces
from edge_agent.trainer.sessions import check_runtime
from edge_agent.trainer.step import StepResult, Streamer
from fedge.errors import ConfigError, DataError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
T = TypeVar("T")


class Trainer:
    """Ready to train and to evaluate. Not for use by several threads.

    `pause` is called after every run of a session, 10 to 30 ms apart: it may sleep, or raise to stop. `plan` says
    how a step is carried out in the memory that there is (`edge_agent.planner`); it changes no result but by the
    order of additions, and by rounding where it says so. `folder` is where a plan may keep checkpoints in a file.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        *,
        a_seed: bytes = bytes(16),
        pause: Callable[[], None] | None = None,
        plan: Plan | None = None,
        folder: Path | None = None,
    ) -> None:
        check_runtime(bundle.manifest.runtime_min)
        self.layout, self.manifest = bundle.layout, bundle.manifest
        self._pause, self._plan = pause, plan or Plan()
        self._seed: bytes | None = None
        if threads < 1:  # to the runtime, 0 would mean all processors
            raise ConfigError("thread count must be at least 1", field="threads", value=threads)
        self._streamer = Streamer(bundle, threads, self._plan, folder or Path(tempfile.gettempdir()))
        self.freeze_a(a_seed)

    def freeze_a(self, seed: bytes) -> None:
        """Take A from this public 16-byte seed. Raises DataError for another length."""
        if seed != self._seed:
            self._seed, self._a = seed, self.layout.frozen(seed)

    def steps(
        self, batch: BatchArrays, adapter: Mapping[str, Floats], depth: int = 0
    ) -> Generator[None, None, StepResult]:
        """`loss_and_gradients` in pieces, for a driver of its own."""
        batch = labelled(batch, self.manifest)
        total, fed = label_count(batch), self._fed(adapter)
        if total == 0:
            raise DataError("batch has no label", field="labels", value=0, hint="Leave such batches out")
        self._check(batch)
        if depth == HEAD_ONLY and not self.manifest.dense:
            raise ConfigError("this bundle has no head that trains", field="depth", value="head only")
        lowest = lowest_layer(depth, self.layout.layers)
        parts: Iterable[BatchArrays] = pieces(batch, self._plan.rows)
        loss_sum, sums = 0.0, dict[str, Floats]()
        rows = self._plan.rows or 2 * total  # of pairs with further texts, no more than was planned for
        if self.manifest.task == EMBED and rows < len(batch.ids):
            loss_sum, parts = yield from self._slopes(batch, fed, rows)
        for piece in parts:
            result = yield from self._streamer.step(piece, fed, lowest, total)
            loss_sum += result.loss_sum
            if not result.gradients or not np.isfinite(loss_sum):
                return StepResult(loss_sum, total, {})
            for name, gradient in result.gradients.items():
                sums[name] = sums[name] + gradient if name in sums else gradient
        return StepResult(loss_sum, total, self.layout.taken(sums))

    def _slopes(
        self, batch: BatchArrays, fed: Mapping[str, Floats], rows: int
    ) -> Generator[None, None, tuple[float, list[Slopes]]]:
        """The loss of pairs that go through the layers `rows` texts at a time, and its gradient by their vectors."""
        found, places = list[Floats](), list(in_pieces(batch, rows))
        for at in places:
            found.append((yield from self._streamer.vectors(cut(batch, at), fed)))
        loss = in_batch(np.concatenate(found), batch)
        texts = [cut(batch, at) for at in places]
        slopes = [
            Slopes(t.ids, t.mask, np.full_like(t.labels, -1), loss.gradient[at])
            for t, at in zip(texts, places, strict=True)
        ]
        return float(loss.nll.sum(dtype=np.float64)), slopes

    def loss_and_gradients(
        self, batch: BatchArrays, adapter: Mapping[str, Floats], depth: int = 0
    ) -> StepResult:
        """Loss sum, label count and gradients of the mean loss in the top `depth` layers, 0 = all, and the head.

        `adapter` has every B, and an A that is to take the frozen one's place. Raises DataError.
        """
        return self._drain(self.steps(batch, adapter, depth))

    def row_losses(
        self, batch: BatchArrays, adapter: Mapping[str, Floats]
    ) -> tuple[NDArray[np.float64], Ints]:
        """For each of the B rows: the sum of its losses in nats, and how many labels it has. Raises DataError."""
        batch = labelled(batch, self.manifest)
        self._check(batch)
        nll = self._drain(self._streamer.losses(batch.ids, batch.mask, batch.labels, self._fed(adapter)))
        return by_row(nll, batch.labels)

    def answers(self, batch: BatchArrays, adapter: Mapping[str, Floats]) -> Answer:
        """Losses and logits of a classifier's rows, all of which have a label, or of pairs. Raises DataError."""
        batch = labelled(batch, self.manifest)
        self._check(batch)
        if self.manifest.task != EMBED and not (batch.labels >= 0).all():
            raise DataError("a row has no class", field="label", hint='A row is {"text": …, "label": …}')
        return self._drain(self._streamer.answers(batch, self._fed(adapter)))

    def vectors(self, ids: Inputs, mask: Ints, adapter: Mapping[str, Floats]) -> Floats:
        """What a sentence encoder makes of each of B texts [B, D]. Raises DataError."""
        batch = Piece(ids, mask, np.full((len(ids), 1), -1, np.int64))
        self._check(batch)
        return self._drain(self._streamer.vectors(batch, self._fed(adapter)))

    def _fed(self, adapter: Mapping[str, Floats]) -> dict[str, Floats]:
        return self.layout.fed({**self._a, **adapter})

    def _check(self, batch: BatchArrays) -> None:
        """What would read outside of a table deep in a graph, or wrap around there, is refused here by name."""
        audio = self.manifest.hears
        if audio is not None and batch.ids.shape[1:] != (audio.mels, audio.frames):
            raise DataError(
                "recordings have other features than the model hears",
                field="features",
                value=batch.ids.shape,
                hint=f"It hears {audio.mels} x {audio.frames}",
            )
        longest, vocabulary = batch.mask.shape[1], self.manifest.vocabulary
        if longest > self.manifest.positions_max:
            raise DataError(
                "text is longer than the model has positions",
                field="tokens",
                value=longest,
                hint=f"The model takes {self.manifest.positions_max}",
            )
        if self.manifest.task == EMBED:
            check_pairs(batch)
        limits = [("labels", batch.labels, label_limit(self.manifest))]
        if audio is None:
            limits.insert(0, ("ids", batch.ids.astype(np.int64, copy=False), vocabulary))
        for name, values, limit in limits:
            if values.size and (values.max() >= limit or (name == "ids" and values.min() < 0)):
                raise DataError(
                    "token is not in the vocabulary"
                    if limit == vocabulary
                    else "no such class in this bundle",
                    field=name,
                    value=int(values.max()),
                    hint=f"{limit} tokens" if limit == vocabulary else f"It tells {limit} apart",
                )

    def _drain(self, work: Generator[None, None, T]) -> T:
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            if self._pause is not None:
                self._pause()
