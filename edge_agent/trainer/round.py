"""A round of local training: a vector, the batches that move it, and the difference that is the delta.

What the vector means is its rule's affair (`Rule`); under `ffa`, the default, A is frozen from the campaign's public
seed and the vector is every B. Sums travel, never means: a loss comes with its label count, and a batch without
labels is skipped and counted. A step whose loss or gradient is no finite number moves nothing and is counted, too;
after three of them in a row the round ends, because a model that has left the numbers does not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.depth import lowest_layer
from edge_agent.trainer.batch import BatchArrays
from edge_agent.trainer.classify import by_class
from edge_agent.trainer.optimizer import Kind, Optimizer, clip, make_optimizer
from edge_agent.trainer.schedule import Schedule
from edge_agent.trainer.state import Progress, TrainState
from edge_agent.trainer.step import StepResult
from edge_agent.trainer.trainer import Trainer
from fedge.errors import ConfigError, DataError
from fedge.lora import AdapterLayout

Floats = NDArray[np.float32]
NOT_FINITE_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What a round of local training gives: `delta` in the vector's order; `loss_sum` in nats over `labels` tokens."""

    delta: Floats
    loss_sum: float
    labels: int
    rows: int
    steps: int  # batches whose gradients were used
    skipped: int  # batches without a label
    not_finite: int = 0  # batches whose loss or gradient was no number


class Rule(Protocol):
    """What the trained vector is, and what the graphs read instead of it."""

    def moving(self, depth: int) -> slice:
        """The part of the vector that moves when the top `depth` layers train, 0 = all."""
        ...

    def feeds(self, vector: Floats) -> Mapping[str, Floats]:
        """Every B by name, and each A that is not the campaign's frozen one."""
        ...

    def gradient(self, gradients: Mapping[str, Floats], depth: int) -> Floats:
        """The gradient by the moving part, from those by A and B of the layers that train."""
        ...


@dataclass(frozen=True, slots=True)
class FrozenA:
    """`ffa` (Sun et al. 2024, arXiv 2403.12313): A stays, the vector is every B and what is trained in full."""

    layout: AdapterLayout

    def moving(self, depth: int) -> slice:
        """The tail of the vector: B of the top layers, then the dense part."""
        names = self._trained(depth)
        below = [int(np.prod(shape)) for name, shape in self.layout.shapes.items() if name not in names]
        return slice(sum(below), self.layout.numbers)

    def feeds(self, vector: Floats) -> Mapping[str, Floats]:
        """Views of the vector."""
        return self.layout.split(vector)

    def gradient(self, gradients: Mapping[str, Floats], depth: int) -> Floats:
        """Those by B and the dense part, in order."""
        return np.concatenate([gradients[name].reshape(-1) for name in self._trained(depth)])

    def _trained(self, depth: int) -> list[str]:
        low = tuple(f"L{i}/" for i in range(lowest_layer(depth, self.layout.layers)))
        return [name for name in self.layout.shapes if not name.startswith(low)]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the vector moves, beyond rate and decay. `accumulate` batches make one step; `clip_norm` 0 = no bound."""

    optimizer: Kind = "adamw"
    momentum: float = 0.0
    schedule: Schedule | None = None  # None: the same rate throughout
    clip_norm: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ConfigError("a step takes at least one batch", field="accumulate", value=self.accumulate)


def train_round(
    trainer: Trainer,
    b_vector: Floats,
    batches: Iterable[BatchArrays],
    *,
    a_seed: bytes,
    lr: float,
    weight_decay: float = 0.01,
    depth: int = 0,
    recipe: Recipe | None = None,
    rule: Rule | None = None,
    after_step: Callable[[int, StepResult], None] | None = None,
    resume: TrainState | None = None,
    keep: Callable[[TrainState], None] | None = None,
) -> RoundOutcome:
    """Train on `batches` from `b_vector`, which is left as it is.

    With a `depth`, only the top layers move; a step is cheaper by the backward pass below them. With `HEAD_ONLY` for a
    depth, a classifier's head moves alone, and each row is encoded once. `after_step` is told
    the number and result of each good batch. `keep` is given, after every step of the optimiser, what a later call
    takes as `resume`; such a call must be given the batches from `resume.progress.cursor` on, and ends with the same
    bits. Raises DataError when no batch has a label, ConfigError when training has left the finite numbers.
    """
    trainer.freeze_a(a_seed)
    run = _Run(
        trainer, b_vector, rule or FrozenA(trainer.layout), recipe or Recipe(), lr, weight_decay, depth
    )
    if resume is not None:
        run.resume(resume)
    for group in _groups(map(by_class, batches), run.recipe.accumulate):
        if run.step(group, after_step) and keep is not None:
            keep(run.state())
    return run.outcome(b_vector)


class _Run:
    """The moving vector, its optimiser and the sums so far."""

    def __init__(
        self,
        trainer: Trainer,
        start: Floats,
        rule: Rule,
        recipe: Recipe,
        rate: float,
        weight_decay: float,
        depth: int,
    ) -> None:
        self.recipe = recipe
        self._trainer, self._rule, self._depth = trainer, rule, depth
        self._vector = start.astype(np.float32)
        self._moving = self._vector[rule.moving(depth)]
        self._schedule = recipe.schedule or Schedule(rate)
        self._optimizer: Optimizer = make_optimizer(
            recipe.optimizer,
            self._moving.size,
            rate=rate,
            weight_decay=weight_decay,
            momentum=recipe.momentum,
        )
        self._progress = Progress()

    def resume(self, state: TrainState) -> None:
        if state.vector.shape != self._vector.shape:
            raise DataError("saved vector is of another run", field="numbers", value=state.vector.shape)
        self._vector[:] = state.vector
        self._optimizer.resume(state.progress.optimizer_steps, state.moments)
        self._progress = state.progress

    def state(self) -> TrainState:
        return TrainState(b"", self._progress, self._vector, self._optimizer.moments)

    def step(self, group: list[BatchArrays], after: Callable[[int, StepResult], None] | None) -> bool:
        """One step of the optimiser over the batches of `group`; whether it was taken."""
        self._count(cursor=len(group))
        feeds = self._rule.feeds(self._vector)
        results: list[StepResult] = []
        rows = 0
        for batch in group:
            if not (batch.labels >= 0).any():
                self._count(skipped=1)
                continue
            result = self._trainer.loss_and_gradients(batch, feeds, self._depth)
            if not result.gradients:
                return self._not_finite("loss", result.loss_sum)
            results.append(result)
            rows += len(batch.ids)
        if not results:
            return False
        gradient = self._mean(results)
        norm = clip(gradient, self.recipe.clip_norm)
        if not np.isfinite(norm):
            return self._not_finite("gradient", norm)
        self._optimizer.step(self._moving, gradient, self._schedule.rate(self._optimizer.steps + 1))
        self._progress = msgspec.structs.replace(
            self._progress, in_a_row=0, optimizer_steps=self._optimizer.steps
        )
        self._count(rows=rows)
        for result in results:
            self._count(steps=1, loss_sum=result.loss_sum, labels=result.labels)
            if after is not None:
                after(self._progress.steps, result)
        return True

    def _mean(self, results: list[StepResult]) -> Floats:
        """The gradient of the mean loss over all labels of the group."""
        total = sum(result.labels for result in results)
        parts = (self._rule.gradient(result.gradients, self._depth) for result in results)
        gradient = next(parts)
        if len(results) == 1:
            return gradient
        gradient = gradient * np.float32(results[0].labels / total)
        for part, result in zip(parts, results[1:], strict=True):
            gradient += part * np.float32(result.labels / total)
        return gradient

    def _not_finite(self, what: str, value: float) -> bool:
        self._count(not_finite=1, in_a_row=1)
        if self._progress.in_a_row >= NOT_FINITE_MAX:
            raise diverged(what, value, f"{NOT_FINITE_MAX} steps in a row")
        return False

    def _count(self, **more: float) -> None:
        added = {name: getattr(self._progress, name) + value for name, value in more.items()}
        self._progress = msgspec.structs.replace(self._progress, **added)

    def outcome(self, start: Floats) -> RoundOutcome:
        """Raises when nothing was learnt, or what was learnt is no number."""
        done = self._progress
        if done.steps == 0 and done.not_finite:
            raise diverged("loss", float("nan"), f"all {done.not_finite} steps")
        if done.steps == 0:
            raise DataError(
                "no batch has a label", field="labels", value=0, hint="This device sits the round out"
            )
        delta = self._vector - start
        largest = float(np.abs(delta).max())
        if not np.isfinite(largest):
            raise diverged("delta", largest, f"{done.steps} steps")
        return RoundOutcome(
            delta, done.loss_sum, done.labels, done.rows, done.steps, done.skipped, done.not_finite
        )


def diverged(what: str, value: float, steps: str) -> ConfigError:
    """That training has left the finite numbers."""
    return ConfigError(
        f"training diverged: {steps} without a finite result",
        field=what,
        value=value,
        hint="Lower the learning rate of the campaign",
    )


def _groups(batches: Iterable[BatchArrays], size: int) -> Iterator[list[BatchArrays]]:
    group: list[BatchArrays] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
