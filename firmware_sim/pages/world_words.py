"""A world's figures in the words and units that people read: the headline, energies, shares, lengths of time.

Missing figures are told as missing; a share of nothing is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from firmware_sim.world.outcome import Point, WorldResult


@dataclass(frozen=True, slots=True)
class Course:
    """The loss of a campaign from its first to its last evaluation, the hours between them, and the energy spent."""

    first: float
    last: float
    hours: float
    energy_kj: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.last)


def course_of(points: Sequence[Point]) -> Course | None:
    """None without two evaluations."""
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    return Course(first.figures["loss"], last.figures["loss"], last.hour - first.hour, last.energy_kj)


def served(result: WorldResult) -> int:
    """Devices with at least one opened round."""
    return sum(figures.served for figures in result.classes.values())


def energy_kj(result: WorldResult) -> float:
    """Of the fleet, for training and sending."""
    return sum(figures.energy_kj_mean * figures.devices for figures in result.classes.values())


def headline(result: WorldResult) -> str:
    """What happened, in a sentence."""
    took = f"{served(result):,} of {count_text(result.devices, 'device')} took part"
    course = course_of(result.loss)
    if not result.rounds.opened:
        return f"No sum was opened: {took}"
    if course is None:
        return f"{took}; the loss was not measured"
    if course.diverged:
        return f"{took}; training diverged"
    fell = "" if course.last < course.first else "did not fall: "
    span = f"in {hours_text(course.hours)} for {energy_text(course.energy_kj)}"
    return f"{took}; loss {fell}{course.first:.2f} → {course.last:.2f} {span}"


def energy_text(kilojoules: float) -> str:
    """In mWh, Wh or kWh."""
    watt_hours = kilojoules / 3.6
    if 0 < watt_hours < 0.095:
        return f"{watt_hours * 1_000:.0f} mWh"
    if watt_hours < 9.95:
        return f"{watt_hours:.1f} Wh"
    return f"{watt_hours:,.0f} Wh" if watt_hours < 1_000 else f"{watt_hours / 1_000:,.1f} kWh"


def celsius_text(celsius: float) -> str:
    """A temperature while training; 0 where nothing trained."""
    return f"{celsius:.0f} °C" if celsius else "–"


def hours_text(hours: float) -> str:
    """In minutes, hours, or from three days on in days."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    if hours < 72:
        return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
    return f"{hours / 24:.1f} days"


def percent_text(share: float | None) -> str:
    """A share; one that is nearly all or nearly nothing keeps a decimal."""
    if share is None or not math.isfinite(share):
        return "–"
    near = 0 < share < 0.095 or 0.905 <= share < 1
    return f"{100 * share:.1f} %" if near else f"{100 * share:.0f} %"


def number_text(value: float | None, decimals: int = 0) -> str:
    """A figure; a missing one is a dash, one that left the numbers is told so."""
    if value is None:
        return "–"
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "diverged"


def count_text(count: int, one: str, many: str = "") -> str:
    """1 bloc, 2 blocs."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def share_of(part: float, whole: float) -> float | None:
    """part / whole; None when there is no whole."""
    return part / whole if whole else None
