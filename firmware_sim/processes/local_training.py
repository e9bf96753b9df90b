"""Devices' local work without devices: the shipped trainer on the very batches that an agent would use.

A pool of processes, each with the bundle open once, computes a device's gradient or its whole round. Whoever asks gets
the same numbers from one process or from many: a result depends on bundle, data, adapter, device and round alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent import planner
from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import Batch, Encode, Row, batches, load_dataset, load_encoder
from edge_agent.resources import free_memory_mb
from edge_agent.round import data_seed
from edge_agent.trainer import Trainer
from edge_agent.trainer.rules import train_by_rule
from fedge.errors import UnavailableError
from fedge.messages import Training
from fedge.release import Manifest

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who trains, with what and how long. `people`: each device's training file, in the order of the blocs.

    `depth`: how many layers, from the top, move; 0 = all.
    """

    bundle: Path
    people: Mapping[str, Path]
    training: Training
    rounds: int
    steps: int
    depth: int = 0


@dataclass(frozen=True, slots=True)
class LocalWork:
    """A gradient of the mean loss, or a delta; and the loss met on the way, in nats over `labels` tokens."""

    vector: Vector
    loss_sum: float
    labels: int
    rows: int


class Devices:
    """All devices of a plan, worked by a pool of processes. Make it with `open_devices`."""

    def __init__(self, pool: ProcessPoolExecutor, plan: Plan) -> None:
        self._pool, self._plan = pool, plan

    def gradients(self, number: int, offset: int, vector: Vector) -> list[LocalWork]:
        """Each device's gradient at the adapter `vector`, on its batch `offset` (from 0) of round `number`."""
        return list(self._pool.map(partial(_gradient, number, offset, vector), self._plan.people))

    def deltas(self, number: int, vector: Vector) -> list[LocalWork]:
        """What each device sends of the whole round `number`, by the rule, from the adapter file `vector`."""
        return list(self._pool.map(partial(_delta, number, vector), self._plan.people))


@contextmanager
def open_devices(plan: Plan, processes: int) -> Iterator[Devices]:
    """The devices of `plan`, worked by `processes` processes of one thread, which have ended when the block has.

    What is wrong with bundle, data or training is raised by the first call that meets it.
    """
    with ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(plan, free_memory_mb() * 10**6 // processes),
    ) as pool:
        try:
            yield Devices(pool, plan)
        finally:
            pool.shutdown(cancel_futures=True)  # and waits: none outlives the block


# ------------------------------------------------------------ in a process of the pool
@dataclass(slots=True)
class _Desk:
    """What a process keeps open from one piece of work to the next."""

    plan: Plan
    bundle: Bundle
    encode: Encode
    trainer: Trainer
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)


_plans: list[tuple[Plan, int]] = []  # with the bytes that a process may take
_desks: list[_Desk] = []


def _begin(plan: Plan, memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    _plans.append((plan, memory_bytes))


def _desk() -> _Desk:
    """Opened by the first piece of work and not before: what an initialiser raises would never be told."""
    if not _desks:
        plan, memory_bytes = _plans[0]
        bundle = open_bundle(plan.bundle)
        step = _same_bits(bundle.manifest, plan.training, memory_bytes)
        trainer = Trainer(bundle, a_seed=plan.training.a_seed, plan=step)
        _desks.append(_Desk(plan, bundle, load_encoder(bundle.tokenizer), trainer))
    return _desks[0]


def _same_bits(manifest: Manifest, training: Training, memory_bytes: int) -> planner.Plan:
    """The fastest way through a step that fits, of those that change no bit; the plain way when none does."""
    try:
        chosen = planner.plan(manifest, training, memory_bytes)
    except UnavailableError:
        return planner.Plan()
    return chosen if chosen.exact else planner.Plan()


def _batches(device: str, number: int) -> Iterator[Batch]:
    desk = _desk()
    training, manifest = desk.plan.training, desk.bundle.manifest
    if device not in desk.rows:
        desk.rows[device] = load_dataset(
            desk.plan.people[device],
            training.template,
            desk.encode,
            eos_id=manifest.eos_id,
            window=training.window_tokens,
        ).rows
    return batches(
        desk.rows[device],
        size=training.batch_rows,
        seed=data_seed(training, device, number),
        pad_id=manifest.pad_id,
    )


def _gradient(number: int, offset: int, vector: Vector, device: str) -> LocalWork:
    trainer = _desk().trainer
    batch = next(islice(_batches(device, number), offset, None))
    step = trainer.loss_and_gradients(batch, trainer.layout.split(vector))
    gradient = trainer.layout.join({name: step.gradients[name] for name in trainer.layout.shapes})
    return LocalWork(gradient, step.loss_sum, step.labels, len(batch.ids))


def _delta(number: int, vector: Vector, device: str) -> LocalWork:
    desk = _desk()
    training = desk.plan.training
    done = train_by_rule(
        desk.trainer,
        vector,
        islice(_batches(device, number), desk.plan.steps),
        training,
        round_number=number,
        depth=desk.plan.depth,
    )
    return LocalWork(done.delta, done.loss_sum, done.labels, done.rows)
