"""A person's own part of an adapter: a few steps on A and B on top of the fleet's, kept only if held-out rows agree.

It never leaves the device. A person who trains alone is as likely to be worse off as better (half of 24 people, with
as many steps), so nothing is kept on faith: candidates after every so many steps, and half-way between the fleet's
adapter and each, are measured on rows that were not trained on, and the fleet's own adapter is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset import Row, batches, evaluation_batches
from edge_agent.jobs import Personalise
from edge_agent.trainer.batch import BatchArrays
from edge_agent.trainer.round import train_round
from edge_agent.trainer.rules import Factors
from edge_agent.trainer.state import TrainState
from edge_agent.trainer.trainer import Trainer
from fedge.errors import ConfigError, DataError
from fedge.rules import Fedit, rule_of

Floats = NDArray[np.float32]

RATE: Final = 0.002  # a quarter of what a fleet takes for both factors: nobody averages the noise here
STEPS: Final = (5, 10)
FLEET: Final = "fleet"
HELD_OUT_ROWS: Final = 8  # they shorten the tail of those who lose; more rows cost more than they tell


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may be kept: `name` says how it came about; `loss` in nats per held-out token."""

    name: str
    tensors: Mapping[str, Floats]
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was kept: its A, B and dense changes; `tried` has every candidate's loss by name."""

    kept: Candidate
    tried: dict[str, float]


def personalise(
    trainer: Trainer,
    adapter: Mapping[str, Floats],
    batches: Iterable[BatchArrays],
    held_out: Sequence[BatchArrays],
    *,
    steps: Sequence[int] = STEPS,
    rate: float = RATE,
    weight_decay: float = 0.01,
    others: Mapping[str, Mapping[str, Floats]] | None = None,
) -> Choice:
    """The best on `held_out` of: `adapter` (every A, B and dense change), what `steps` steps make of it, `others`.

    `batches` has at least as many as the longest. At equal loss what is nearer to the fleet's adapter is kept.
    Raises ConfigError for steps that do not grow, DataError without held-out labels.
    """
    if not steps or any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
        raise ConfigError("numbers of steps must grow", field="steps", value=tuple(steps))
    rule = Fedit(trainer.layout, bytes(16))
    start = rule.from_factors(adapter)
    local = Factors(rule, start, rule.both)
    found: dict[int, Floats] = {}

    def keep(state: TrainState) -> None:
        if state.progress.optimizer_steps in steps:
            found[state.progress.optimizer_steps] = state.vector.copy()

    train_round(
        trainer,
        local.start,
        batches,
        a_seed=bytes(16),
        lr=rate,
        weight_decay=weight_decay,
        rule=local,
        keep=keep,
    )
    vectors = {FLEET: local.start}
    for count, vector in sorted(found.items()):
        vectors[f"half of {count} steps"] = (local.start + vector) / np.float32(2)
        vectors[f"{count} steps"] = vector
    menu = {name: local.feeds(vector) for name, vector in vectors.items()} | dict(others or {})
    tried = [Candidate(name, fed, mean_loss(trainer, fed, held_out)) for name, fed in menu.items()]
    kept = min(tried, key=lambda one: one.loss)  # the first of equals: the menu begins with the fleet's
    return Choice(kept, {one.name: one.loss for one in tried})


def on_rows(
    trainer: Trainer,
    state: Floats,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    job: Personalise,
    pad_id: int,
) -> Choice:
    """`personalise` from an adapter file of the rule `fedit`, on the batches that a Personalise job names."""
    size = job.training.batch_rows
    endless = batches(rows, size=size, seed=job.data_seed, pad_id=pad_id)
    measured = [batch for _, batch in evaluation_batches(held_out, size=size, pad_id=pad_id)]
    adapter = rule_of("fedit", trainer.layout, bytes(16), numbers=state.size).tensors(state)
    return personalise(
        trainer,
        adapter,
        islice(endless, max(job.steps)),
        measured,
        steps=job.steps,
        rate=job.training.rate,
        weight_decay=job.training.weight_decay,
    )


def adapter_file(trainer: Trainer, tensors: Mapping[str, Floats]) -> Floats:
    """An adapter file of the rule `fedit`: B, what is dense, A."""
    return rule_of("fedit", trainer.layout, bytes(16)).from_factors(tensors)


def mean_loss(trainer: Trainer, adapter: Mapping[str, Floats], rows: Sequence[BatchArrays]) -> float:
    """Nats per token over all rows; infinite where it is no number. Raises DataError when nothing has a label."""
    nll, labels = 0.0, 0
    for batch in rows:
        sums, counts = trainer.row_losses(batch, adapter)
        nll, labels = nll + float(sums.sum()), labels + int(counts.sum())
    if not labels:
        raise DataError("no held-out row has a label", field="held_out", value=len(rows))
    return nll / labels if np.isfinite(nll) else float("inf")
