"""Training on the device: numpy and ONNX Runtime, a 4-bit base that is only read, and the B of an adapter.

A round under the rule `ffa`: A is frozen from the campaign's public seed, B moves by AdamW from the adapter that the
hub sent, with fresh optimiser state, and the difference is the delta. Sums travel, never means: a loss comes with
its label count, and a batch without labels is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.trainer.evaluate import by_row
from edge_agent.trainer.optimizer import AdamW
from edge_agent.trainer.sessions import check_runtime
from edge_agent.trainer.step import StepResult, Streamer, require_finite
from fedge.errors import ConfigError, DataError
from fedge.lora import AdapterLayout

__all__ = ["AdamW", "BatchArrays", "RoundOutcome", "StepResult", "Trainer", "train_round"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
T = TypeVar("T")


class BatchArrays(Protocol):
    """What a batch must have: int64 [B, S] each; `labels` shifted, negative where nothing is learnt."""

    @property
    def ids(self) -> Ints: ...
    @property
    def mask(self) -> Ints: ...
    @property
    def labels(self) -> Ints: ...


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a round of local training gives: `delta` in layout order; `loss_sum` in nats over `labels` tokens."""

    delta: Floats
    loss_sum: float
    labels: int
    rows: int
    steps: int
    skipped: int  # batches without a label


class Trainer:
    """An open bundle, ready to train and to evaluate. Not for use by several threads.

    `pause` is called after every run of a session, 10 to 30 ms apart: it may sleep, or raise to stop.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 1,
        *,
        a_seed: bytes = bytes(16),
        pause: Callable[[], None] | None = None,
    ) -> None:
        check_runtime(bundle.manifest.runtime_min)
        self.layout = bundle.layout
        self._pause = pause
        self._seed: bytes | None = None
        if threads < 1:  # to the runtime, 0 would mean all processors
            raise ConfigError("thread count must be at least 1", field="threads", value=threads)
        self._streamer = Streamer(bundle, threads)
        self.freeze_a(a_seed)

    def freeze_a(self, seed: bytes) -> None:
        """Take A from this public 16-byte seed. Raises DataError for another length."""
        if seed != self._seed:
            self._seed, self._a = seed, self.layout.frozen(seed)

    def reserve(self, rows: int, tokens: int) -> None:
        """Takes the memory of a step on `rows` x `tokens` now, so that no later batch up to that size takes more."""
        zero = {name: np.zeros(shape, np.float32) for name, shape in self.layout.b_shapes.items()}
        self._streamer.reserve(rows, tokens, {**self._a, **zero})

    def steps(
        self, batch: BatchArrays, b: Mapping[str, Floats], depth: int = 0
    ) -> Generator[None, None, StepResult]:
        """`loss_and_gradients` in pieces, for a driver of its own."""
        return self._streamer.step(batch.ids, batch.mask, batch.labels, {**self._a, **b}, depth)

    def loss_and_gradients(self, batch: BatchArrays, b: Mapping[str, Floats], depth: int = 0) -> StepResult:
        """Loss sum, label count and gradients of the mean loss by the B of the top `depth` layers, 0 = all.

        Raises DataError, ConfigError.
        """
        return self._drain(self.steps(batch, b, depth))

    def row_losses(self, batch: BatchArrays, b: Mapping[str, Floats]) -> tuple[NDArray[np.float64], Ints]:
        """For each of the B rows: the sum of its losses in nats, and how many labels it has."""
        nll = self._drain(self._streamer.losses(batch.ids, batch.mask, batch.labels, {**self._a, **b}))
        return by_row(nll, batch.labels)

    def _drain(self, work: Generator[None, None, T]) -> T:
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            if self._pause is not None:
                self._pause()


def train_round(
    trainer: Trainer,
    b_vector: Floats,
    batches: Iterable[BatchArrays],
    *,
    a_seed: bytes,
    lr: float,
    weight_decay: float = 0.01,
    depth: int = 0,
    after_step: Callable[[int, StepResult], None] | None = None,
) -> RoundOutcome:
    """One step for each of `batches`, from `b_vector`, which is left as it is. Rule `ffa`: only B moves.

    With a `depth`, only the B of so many layers from the top; a step is cheaper by the backward pass below them.
    Raises DataError when no batch has a label, ConfigError when loss or delta is not finite.
    """
    trainer.freeze_a(a_seed)
    vector = b_vector.astype(np.float32)
    moving, names = _top(trainer.layout, vector, depth)
    optimizer = AdamW(moving.size, rate=lr, weight_decay=weight_decay)
    loss_sum, labels, rows, steps, skipped = 0.0, 0, 0, 0, 0
    for batch in batches:
        if not (batch.labels >= 0).any():
            skipped += 1
            continue
        result = trainer.loss_and_gradients(batch, trainer.layout.split(vector), depth)
        optimizer.step(moving, np.concatenate([result.gradients[name].reshape(-1) for name in names]))
        loss_sum, labels = loss_sum + result.loss_sum, labels + result.labels
        rows, steps = rows + len(batch.ids), steps + 1
        if after_step is not None:
            after_step(steps, result)
    if steps == 0:
        raise DataError(
            "no batch has a label", field="labels", value=0, hint="This device sits the round out"
        )
    delta = vector - b_vector
    require_finite("delta", float(np.abs(delta).max()))
    return RoundOutcome(delta, loss_sum, labels, rows, steps, skipped)


def _top(layout: AdapterLayout, vector: Floats, depth: int) -> tuple[Floats, list[str]]:
    """The part of `vector` that belongs to the top `depth` layers, 0 = all, as a view, and the names of its B."""
    layers = min(depth or layout.layers, layout.layers)
    numbers = layout.numbers // layout.layers * layers  # every layer has as many
    return vector[layout.numbers - numbers :], list(layout.b_shapes)[-layers * len(layout.modules) :]
