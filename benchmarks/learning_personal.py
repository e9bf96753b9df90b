"""Is a person better off with the fleet? The fleet's adapter, personal steps on it, and training alone, one by one.

Everybody has the agent's menu: the fleet's adapter, 5, 10 or 20 own steps on top, the adapter that as many own steps
make alone as they spent in the fleet and after it, and the mean of that and the best of the others. The choice is made
on validation messages and measured on held-out ones, which no choice has seen. `few` are people never seen who have 40
messages in all, 8 of them to choose by.
"""

from __future__ import annotations

import base64
import statistics
from itertools import islice
from typing import Any, Final

import numpy as np
from kept import Kept
from learning_rules import CASES, train_case, training_of
from numpy.typing import NDArray
from people import Bench
from report import Row, progress

from edge_agent.dataset import Batch, batches, evaluation_batches
from edge_agent.dataset import Row as DataRow
from edge_agent.personal import (
    ALONE_TIMES,
    Tensors,
    choose,
    mean_loss,
    own_rate,
    own_steps,
)
from edge_agent.planner import Plan
from edge_agent.round import data_seed
from edge_agent.trainer import Trainer
from edge_agent.trial import HELD_OUT_EVERY
from fedge.messages import Training
from fedge.rules import rule_of

FEW: Final = 40
_ALONE_MARKS: Final = (10, 20, 40)
_EVALUATION_ROWS: Final = 12
_OWN_ROUND: Final = 1_000  # orders the rows of personal steps: no round of a campaign has this number


def personal_rows(bench: Bench, kept: Kept, seed: int) -> list[Row]:
    """The rows about people, those who took part and those never seen."""
    run = train_case(bench, kept, CASES[0], seed)
    state = np.frombuffer(base64.b64decode(run["adapter"]), "<f4").astype(np.float32)
    desk = Desk(bench, training_of("ffa", seed), state)
    found: dict[str, list[dict[str, float]]] = {}
    for group, people in bench.groups.items():
        found[group] = [_person(desk, kept, name, seed, few=False) for name in people]
    found["few"] = [_person(desk, kept, name, seed, few=True) for name in bench.groups["never seen"]]
    rows = [
        row for group, people in found.items() for row in _table(group, people, bench.scale.own_steps[-1])
    ]
    took_part = found["took part"]
    gains = [one["alone"] - one["chosen"] for one in took_part]
    few = [one["alone"] - one["chosen"] for one in found["few"]]
    return [
        *rows,
        Row.of(
            "personal_gain_nats", "chosen over alone, mean", [statistics.fmean(gains)], "nats", goal=">= 0.02"
        ),
        Row.of(
            "personal_better_off_share",
            "chosen over alone",
            [sum(gain > 0 for gain in gains) / len(gains)],
            "ratio",
            goal=">= 0.7",
        ),
        Row.of("personal_worst_nats", "chosen over alone", [-min(gains)], "nats", goal="<= 0.05"),
        Row.of("personal_gain_nats", "few messages, mean", [statistics.fmean(few)], "nats", goal=">= 0.1"),
    ]


class Desk:
    """The bundle open once, and the fleet's adapter."""

    def __init__(self, bench: Bench, training: Training, state: NDArray[np.float32]) -> None:
        self.bench, self.training = bench, training
        # The same bits with and without kept products, in less time.
        self.trainer = Trainer(
            bench.trained, a_seed=training.a_seed, plan=Plan(keep=bench.trained.manifest.layers)
        )
        self.judge = Trainer(bench.bundle, a_seed=training.a_seed)
        self.rule = rule_of("ffa", bench.bundle.layout, training.a_seed)
        self.fleet: Tensors = self.rule.tensors(state)

    def rows(self, person: str, name: str) -> tuple[DataRow, ...]:
        """Rows of one of a person's files."""
        return self.bench.rows(person, name, self.training)

    def training_batches(
        self, rows: tuple[DataRow, ...], person: str, number: int, count: int
    ) -> list[Batch]:
        """`count` batches in the order of a round of that number."""
        endless = batches(
            rows,
            size=self.training.batch_rows,
            seed=data_seed(self.training, person, number),
            pad_id=self.bench.bundle.manifest.pad_id,
        )
        return list(islice(endless, count))

    def measuring(self, rows: tuple[DataRow, ...]) -> list[Batch]:
        """All rows once."""
        pad = self.bench.bundle.manifest.pad_id
        return [batch for _, batch in evaluation_batches(rows, size=_EVALUATION_ROWS, pad_id=pad)]


def _person(desk: Desk, kept: Kept, person: str, seed: int, *, few: bool) -> dict[str, float]:
    scale, task = desk.bench.scale, desk.bench.bundle.manifest.task
    alone_steps = scale.rounds * scale.steps + scale.own_steps[-1]
    marks = (*(mark for mark in _ALONE_MARKS if mark < alone_steps), alone_steps)

    def make() -> dict[str, Any]:
        rows, validation = desk.rows(person, "train"), desk.rows(person, "validation")
        if few:
            rows, validation = rows[: FEW - FEW // HELD_OUT_EVERY], validation[: FEW // HELD_OUT_EVERY]
        own = own_steps(
            desk.trainer,
            desk.fleet,
            desk.training_batches(rows, person, _OWN_ROUND, scale.own_steps[-1]),
            steps=scale.own_steps,
            rate=own_rate(task),
        )
        alone = own_steps(
            desk.trainer,
            None,
            desk.training_batches(rows, person, 1, alone_steps),
            steps=marks,
            rate=own_rate(task) * ALONE_TIMES,
        )
        choice = choose(desk.trainer, desk.fleet, own, alone, desk.measuring(validation))
        stopped = min(marks, key=lambda mark: choice.tried[f"{mark} steps alone"])
        progress(f"{person}{' (few)' if few else ''}: {choice.kept.name}")
        test = desk.measuring(desk.rows(person, "heldout"))
        measured = {
            "zero": desk.rule.tensors(desk.rule.initial()),
            "fleet": desk.fleet,
            "own": own[scale.own_steps[-1]],
            "alone": alone[alone_steps],
            "stopped": alone[stopped],
            "chosen": choice.kept.tensors,
        }
        losses = {name: mean_loss(desk.judge, tensors, test) for name, tensors in measured.items()}
        return {**losses, "kept": choice.kept.name}

    facts = {
        "person": person,
        "few": few,
        "alone_steps": marks,
        "rates": (own_rate(task), ALONE_TIMES),
        "training": desk.training,
        "validation": desk.bench.digest("validation"),
        **desk.bench.facts,
    }
    return kept.result(f"person {person} {'few' if few else 'all'} {seed}", facts, make)


def _table(group: str, people: list[dict[str, float]], own_steps: int) -> list[Row]:
    names = {
        "zero": "zero-shot",
        "fleet": "fleet",
        "own": f"fleet and {own_steps} own steps",
        "alone": "alone, as many steps",
        "stopped": "alone, steps by the same choice",
        "chosen": "chosen",
    }
    return [
        Row.of("person_heldout_loss_nats", f"{title}, {group}", [one[name] for one in people], "nats")
        for name, title in names.items()
    ]
