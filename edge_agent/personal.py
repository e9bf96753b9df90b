"""A person's own part of an adapter: a few steps on A and B on top of the fleet's, kept only if held-out rows agree.

It never leaves the device. A person who trains alone is as likely to be worse off as better, so nothing is kept on
faith: the fleet's own adapter, what own steps make of it, one that was trained alone, and the mean of the two are
measured on rows that were not trained on. The mean is often the best: two adapters that saw other batches have made
other errors, and the mean of their products has less of both (model soups, Wortsman et al. 2022, arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset import Batch, Row, batches, evaluation_batches
from edge_agent.jobs import Personalise
from edge_agent.trainer.batch import BatchArrays
from edge_agent.trainer.round import train_round
from edge_agent.trainer.rules import Factors
from edge_agent.trainer.state import TrainState
from edge_agent.trainer.step import StepResult
from edge_agent.trainer.trainer import Trainer
from fedge.errors import ConfigError, DataError
from fedge.lora import DENSE, AdapterLayout
from fedge.rules import Fedit, rule_of, usual_rate

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]
AfterStep = Callable[[int, StepResult], None]

STEPS: Final = (5, 10, 20)
ALONE_STEPS: Final = (20, 40)
FLEET: Final = "fleet"
# Of a fleet's rate for both factors. Nobody averages the noise of a person's four rows, and the fleet's adapter is
# near its goal already: twice the rate loses in the first ten steps what the next ten win. From the base model it is
# farther.
_OWN_RATE: Final = 1 / 8
ALONE_TIMES: Final = 4  # that rate, from the base model
_DECAY: Final = 0.01
_SEED: Final = bytes(16)  # of A, which is trained as well, so that no other side needs to know it


def own_rate(task: str) -> float:
    """The learning rate of steps on top of the fleet's adapter, for a task of `fedge.release.TASKS`."""
    return usual_rate("fedit", task) * _OWN_RATE


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may be kept: `name` says how it came about; `loss` in nats per held-out label."""

    name: str
    tensors: Tensors
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was kept: its A, B and dense changes; `tried` has every candidate's loss by name."""

    kept: Candidate
    tried: dict[str, float]


def choose(
    trainer: Trainer,
    fleet: Tensors,
    own: Mapping[int, Tensors],
    alone: Mapping[int, Tensors],
    held_out: Sequence[BatchArrays],
) -> Choice:
    """The best on `held_out` of the fleet's adapter, `own` and `alone` by number of steps, and the mean of the best of
    those that began with the fleet's and the best alone.

    At equal loss the first of these is kept. Raises DataError without held-out labels.
    """

    def measured(name: str, tensors: Tensors) -> Candidate:
        return Candidate(name, tensors, mean_loss(trainer, tensors, held_out))

    def best(of: Sequence[Candidate]) -> Candidate:
        return min(of, key=lambda one: one.loss)  # the first of equals

    tried = [measured(FLEET, fleet), *(measured(f"{n} steps", tensors) for n, tensors in own.items())]
    if alone:
        apart = [measured(f"{n} steps alone", tensors) for n, tensors in alone.items()]
        pair = best(tried), best(apart)
        mean = mean_of(trainer.layout, pair[0].tensors, pair[1].tensors)
        tried += [*apart, measured(f"mean of {pair[0].name} and {pair[1].name}", mean)]
    return Choice(best(tried), {one.name: one.loss for one in tried})


def own_steps(
    trainer: Trainer,
    start: Tensors | None,
    batches: Iterable[BatchArrays],
    *,
    steps: Sequence[int],
    rate: float,
    weight_decay: float = _DECAY,
    after_step: AfterStep | None = None,
) -> dict[int, Tensors]:
    """What A, B and the dense part are after each of `steps` steps from `start`, None = the base model.

    `batches` has at least as many as the longest. Raises ConfigError for steps that do not grow.
    """
    if not steps or any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
        raise ConfigError("numbers of steps must grow", field="steps", value=tuple(steps))
    rule = Fedit(trainer.layout, _SEED)
    local = Factors(rule, rule.initial() if start is None else rule.from_factors(start), rule.both)
    found: dict[int, Tensors] = {}

    def keep(state: TrainState) -> None:
        if state.progress.optimizer_steps in steps:
            found[state.progress.optimizer_steps] = local.feeds(state.vector.copy())

    train_round(
        trainer,
        local.start,
        islice(batches, steps[-1]),
        a_seed=_SEED,
        lr=rate,
        weight_decay=weight_decay,
        rule=local,
        keep=keep,
        after_step=after_step,
    )
    return found


def on_rows(
    trainer: Trainer,
    state: Floats,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    job: Personalise,
    pad_id: int,
    after_step: AfterStep | None = None,
) -> Choice:
    """`choose` from an adapter file of the rule `fedit`, on the batches that a Personalise job names.

    `after_step` is told the number of steps done, over both trainings.
    """
    training = job.training

    def train(
        start: Tensors | None, steps: Sequence[int], rate: float, seed: int, before: int
    ) -> dict[int, Tensors]:
        order: Iterable[Batch] = batches(rows, size=training.batch_rows, seed=seed, pad_id=pad_id)
        return own_steps(
            trainer,
            start,
            order,
            steps=steps,
            rate=rate,
            weight_decay=training.weight_decay,
            after_step=after_step and (lambda done, step: after_step(before + done, step)),
        )

    fleet = rule_of("fedit", trainer.layout, _SEED, numbers=state.size).tensors(state)
    own = train(fleet, job.steps, training.rate, job.data_seed, 0)
    alone: dict[int, Tensors] = {}
    if job.alone_steps:  # in another order, so that the two err in other ways
        alone = train(None, job.alone_steps, training.rate * ALONE_TIMES, job.data_seed + 1, job.steps[-1])
    measured = [batch for _, batch in evaluation_batches(held_out, size=training.batch_rows, pad_id=pad_id)]
    return choose(trainer, fleet, own, alone, measured)


def mean_of(layout: AdapterLayout, one: Tensors, other: Tensors) -> dict[str, Floats]:
    """The mean of two adapters: of their products B A, the best rank of it that fits, and of what is dense.

    The mean of A and the mean of B would be another function, far from both.
    """
    half = np.float32(0.5)
    found = {name: half * (tensor + other[name]) for name, tensor in one.items() if name.startswith(DENSE)}
    for slot in layout.slots:
        b, a = (
            np.hstack([tensors[f"{slot.name}.B"] for tensors in (one, other)]) * half,
            np.vstack([tensors[f"{slot.name}.A"] for tensors in (one, other)]),
        )
        q_b, r_b = np.linalg.qr(b.astype(np.float64))
        q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
        u, s, v = np.linalg.svd(r_b @ r_a.T)
        found[f"{slot.name}.B"] = ((q_b @ u[:, : slot.r]) * s[: slot.r]).astype(np.float32)
        found[f"{slot.name}.A"] = (v[: slot.r] @ q_a.T).astype(np.float32)
    return found


def adapter_file(trainer: Trainer, tensors: Tensors) -> Floats:
    """An adapter file of the rule `fedit`: B, what is dense, A."""
    return rule_of("fedit", trainer.layout, _SEED).from_factors(tensors)


def mean_loss(trainer: Trainer, adapter: Tensors, rows: Sequence[BatchArrays]) -> float:
    """Nats per label over all rows; infinite where it is no number. Raises DataError when nothing has a label."""
    nll, labels = 0.0, 0
    for batch in rows:
        sums, counts = trainer.row_losses(batch, adapter)
        nll, labels = nll + float(sums.sum()), labels + int(counts.sum())
    if not labels:
        raise DataError("no held-out row has a label", field="held_out", value=len(rows))
    return nll / labels if np.isfinite(nll) else float("inf")
