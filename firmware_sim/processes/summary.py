"""A run in two groups, those who took part and those never seen, and the units that people read figures in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from firmware_sim.processes.evaluation import Spread, spread
from firmware_sim.processes.result import Figure, Person, Result, finite


@dataclass(frozen=True, slots=True)
class Group:
    """People of one kind: their loss per token before and after, and how they differ. No spread without figures."""

    name: str
    people: tuple[Person, ...]
    before: Figure
    after: Figure
    reference: Figure
    spread: Spread | None


def groups_of(result: Result) -> tuple[Group, Group]:
    """Those who took part, and those never seen."""
    loss = result.loss
    took, rest = [
        tuple(person for person in result.people if person.took_part is flag) for flag in (True, False)
    ]
    return (
        Group("took part", took, loss.zero_shot, loss.took_part, loss.pooled_reference, _spread(took)),
        Group(
            "never seen",
            rest,
            loss.zero_shot_never_seen,
            loss.never_seen,
            loss.pooled_reference_never_seen,
            _spread(rest),
        ),
    )


def size_text(count: int | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return "not measured"
    return f"{count / 1e6:,.2f} MB" if count >= 1_000_000 else f"{count / 1e3:,.1f} KB"


def megabytes_text(value: float | None) -> str:
    """Millions of bytes."""
    return "not measured" if value is None else f"{value:,.0f} MB"


def seconds_text(value: float | None) -> str:
    """A length of time."""
    if value is None:
        return "–"
    return f"{value:,.1f} s" if value < 120 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def _spread(people: Sequence[Person]) -> Spread | None:
    pairs = [(finite(person.before), finite(person.after)) for person in people]
    whole = [(before, after) for before, after in pairs if before is not None and after is not None]
    return spread(whole) if whole else None
