"""What is compared of two runs of the study, ours in a world and a lawless one beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from firmware_sim.study.lawless import LawlessRun
from firmware_sim.world.outcome import Point, Rounds, WorldResult

TARGET: Final = 0.45  # loss of the task `mlp`: 3.2 before training, 0.34 at the end of a long run
DEEP: Final = 0.38
EVALUATIONS: Final = 3  # in a row, whose mean must be below the target
SLOWEST: Final = "zero2w"


@dataclass(frozen=True, slots=True)
class Reached:
    """When a run's loss was at its target, and the energy that it had spent by then."""

    hour: float
    energy_kj: float


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. `rounds` are shares and counts under the names of a world's result."""

    target: Reached | None
    deep: Reached | None
    rounds: Rounds
    slowest: float  # opened rounds of a Zero 2 W over the mean of all devices
    rare: float  # accuracy on the classes that live on slow boards
    starving: float = 0.0  # hours in which the campaign was stopped because too few blocs were live


def of_world(result: WorldResult, starts: float = 0.0) -> Figures:
    """Ours: a target is reached when EVALUATIONS in a row say so. Hours count from the campaign's start, `starts`."""
    classes = result.classes
    devices = sum(one.devices for one in classes.values())
    mean = sum(one.devices * one.rounds_mean for one in classes.values()) / devices
    slowest = classes[SLOWEST].rounds_mean / mean if mean and SLOWEST in classes else 0.0
    loss = [msgspec.structs.replace(point, hour=point.hour - starts) for point in result.loss]
    rare = at_the_end(loss, "rare_accuracy")
    target, deep = settled_below(loss, TARGET), settled_below(loss, DEEP)
    return Figures(target, deep, result.rounds, slowest, rare, result.starving_hours)


def of_lawless(run: LawlessRun) -> Figures:
    """Theirs: a target is reached at the first hit."""
    target, deep = first_below(run.loss, TARGET), first_below(run.loss, DEEP)
    rare = at_the_end(run.loss, "rare_accuracy")
    return Figures(target, deep, run.rounds, run.participation(SLOWEST), rare)


def first_below(points: Sequence[Point], target: float, figure: str = "loss") -> Reached | None:
    """The first evaluation at or below the target: how lawless schedulers are dated, which favours them."""
    found = (Reached(point.hour, point.energy_kj) for point in points if point.figures[figure] <= target)
    return next(found, None)


def settled_below(points: Sequence[Point], target: float, figure: str = "loss") -> Reached | None:
    """The last of the first EVALUATIONS in a row whose mean is at or below the target: how ours is dated."""
    for end in range(EVALUATIONS, len(points) + 1):
        run = points[end - EVALUATIONS : end]
        if sum(point.figures[figure] for point in run) <= EVALUATIONS * target:
            return Reached(run[-1].hour, run[-1].energy_kj)
    return None


def at_the_end(points: Sequence[Point], figure: str) -> float:
    """Mean of the last EVALUATIONS evaluations; 0 when there was none."""
    last = [point.figures[figure] for point in points[-EVALUATIONS:]]
    return sum(last) / len(last) if last else 0.0
