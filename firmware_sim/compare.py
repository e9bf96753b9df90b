"""Runs of two or more worlds beside each other: figures, their ratios over the same seeds, and how far these lie apart.

A difference counts when every seed says the same: where the ratios of single seeds lie on both sides of 1, it is told
as no clear difference, whatever the median is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedge.errors import DataError, NoInputError, UsageError
from firmware_sim.pages.world_words import (
    energy_kj,
    energy_text,
    hours_text,
    number_text,
    percent_text,
    served,
)
from firmware_sim.study.figures import Reached, at_the_end, first_below, settled_below
from firmware_sim.world.outcome import WorldResult, read_world

SIDES_MAX: Final = 4  # as many as a chart can show
NOTABLE: Final = 0.01  # a smaller difference is none
WAY: Final = 0.9  # of the way to the loss that all reach: the last tenth is noise

Better = Literal["less", "more", ""]  # "" = neither: a fact, not a merit
Value = Callable[[WorldResult], float | None]


class Side(msgspec.Struct, frozen=True):
    """One of the things compared: its name, and its runs, each with another seed."""

    name: str
    runs: tuple[WorldResult, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that two runs can be compared by; `wins` says in words what the better one did."""

    name: str
    value: Value
    better: Better
    text: Callable[[float], str]
    wins: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of two sides: medians over the runs, and other / base over runs of the same seed, median and range.

    None: not measured, or no run of one side has a seed of the other.
    """

    measure: Measure
    base: float | None
    other: float | None
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None
    seeds: int = 0

    @property
    def is_clear(self) -> bool:
        """Every seed says the same, and by enough to matter."""
        if self.lowest is None or self.highest is None:
            return False
        return self.lowest >= 1 + NOTABLE or self.highest <= 1 - NOTABLE

    @property
    def other_is_better(self) -> bool:
        return self.ratio is not None and (
            self.ratio < 1 if self.measure.better == "less" else self.ratio > 1
        )

    @property
    def texts(self) -> tuple[str, str]:
        """Both medians for people."""
        base, other = (
            "–" if value is None else self.measure.text(value) for value in (self.base, self.other)
        )
        return base, other


def measures(target: float | None) -> list[Measure]:
    """What is compared; `target` is the loss up to which time and energy are taken, if there is one."""
    found = [
        Measure("loss at the end", _last_loss, "less", lambda v: f"{v:.3f}", "ended at a lower loss"),
        Measure(
            "devices that took part",
            lambda r: served(r) / r.devices,
            "more",
            percent_text,
            "reached more of the devices",
        ),
        Measure("sums opened", lambda r: float(r.rounds.opened), "more", number_text),
        Measure("yield of finished updates", lambda r: r.rounds.yield_, "more", percent_text),
        Measure("drop", lambda r: r.rounds.drop, "less", percent_text),
        Measure("waste", lambda r: r.rounds.waste, "less", percent_text),
        Measure("fairness (Jain)", lambda r: r.rounds.jain, "more", lambda v: f"{v:.2f}"),
        Measure("energy of work", energy_kj, "less", energy_text),
        Measure("sent, whole fleet", _sent_mb, "less", lambda v: f"{v:,.1f} MB"),
        Measure("hottest board", _hottest, "", lambda v: f"{v:.0f} °C"),
        Measure("throttled, for each device", _throttled, "less", hours_text),
    ]
    if target is not None:
        found[1:1] = [
            Measure(
                f"time to loss {target:.2f}", lambda r: _hours(r, target), "less", hours_text, "was sooner"
            ),
            Measure(
                f"energy to loss {target:.2f}",
                lambda r: _energy(r, target),
                "less",
                energy_text,
                "used less energy",
            ),
        ]
    return found


def common_target(sides: Sequence[Side]) -> float | None:
    """The loss at WAY of the way from the start to where every run ends; None when one has no loss, or none fell."""
    runs = [run for side in sides for run in side.runs]
    ends = [_last_loss(run) for run in runs]
    whole = [end for end in ends if end is not None]
    if not whole or len(whole) < len(ends):
        return None
    first, end = max(run.loss[0].figures["loss"] for run in runs), max(whole)
    return first - WAY * (first - end) if end < first else None


def rows_of(base: Side, other: Side, target: float | None) -> list[Row]:
    """All figures of `other` against `base`."""
    return [_row(measure, base, other) for measure in measures(target)]


def reached(run: WorldResult, target: float) -> Reached | None:
    """When and for how much the run settled at or below the target; the first evaluation there in a very short run."""
    return settled_below(run.loss, target) or first_below(run.loss, target)


def load_side(source: Path) -> Side:
    """The results in a folder: its world.json, or those of the folders in it. Raises NoInputError, DataError."""
    files = (
        [source / "world.json"] if (source / "world.json").is_file() else sorted(source.glob("*/world.json"))
    )
    if not files:
        raise NoInputError(
            f"no world.json in {source}",
            field="path",
            value=str(source),
            hint="`fedge sim world … --out DIR` writes one",
        )
    runs = tuple(map(read_world, files))
    if len({run.scenario for run in runs}) > 1:
        names = sorted({run.scenario for run in runs})
        raise DataError(f"{source} holds results of several scenarios", field="scenario", value=names)
    return Side(source.name or str(source), runs)


def require_sides(count: int) -> None:
    """UsageError for a number of sides that cannot be shown."""
    if not 2 <= count <= SIDES_MAX:
        raise UsageError(f"two to {SIDES_MAX} can be compared", field="runs", value=count)


def told_apart(sides: Sequence[Side]) -> list[Side]:
    """The sides with names that differ."""
    names = [side.name for side in sides]
    return [
        side if names.count(side.name) == 1 else msgspec.structs.replace(side, name=f"{side.name} ({place})")
        for place, side in enumerate(sides, 1)
    ]


# ---------------------------------------------------------------- figures
def _row(measure: Measure, base: Side, other: Side) -> Row:
    ours = {run.seed: measure.value(run) for run in base.runs}
    theirs = {run.seed: measure.value(run) for run in other.runs}
    pairs = [(before, theirs[seed]) for seed, before in ours.items() if seed in theirs]
    ratios = [found / before for before, found in pairs if before and found is not None]
    whole = len(ratios) == len(pairs)  # else a range would be that of the seeds which happen to have one
    return Row(
        measure=measure,
        base=_median(ours.values()),
        other=_median(theirs.values()),
        ratio=_median(ratios) if whole else None,
        lowest=min(ratios, default=None) if whole else None,
        highest=max(ratios, default=None) if whole else None,
        seeds=len(ratios) if whole else 0,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _last_loss(run: WorldResult) -> float | None:
    end = at_the_end(run.loss, "loss")
    return end if run.loss and math.isfinite(end) else None


def _hours(run: WorldResult, target: float) -> float | None:
    found = reached(run, target)
    return None if found is None else found.hour - run.loss[0].hour


def _energy(run: WorldResult, target: float) -> float | None:
    found = reached(run, target)
    return None if found is None else found.energy_kj


def _sent_mb(run: WorldResult) -> float:
    return sum(c.upload_mb_mean * c.devices for c in run.classes.values())


def _hottest(run: WorldResult) -> float | None:
    return max((c.hottest_celsius for c in run.classes.values()), default=None)


def _throttled(run: WorldResult) -> float:
    return sum(c.throttled_hours for c in run.classes.values()) / run.devices
