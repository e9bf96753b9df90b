"""What would bring in more of a fleet that lives like phones: cases of the reach study, one knob turned at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import msgspec

from fedge import formation
from fedge.messages import Ready
from firmware_sim.parts.draw import DeviceParts
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.scenario import Scenario

QUARTERS: Final = 4  # of a day: a device's habit is the quarter of UTC in which it is on most
_SEEN_DAYS: Final = 7
_LOOKS_A_DAY: Final = 48
_ALWAYS_ON: Final = 0.85  # such a device has no habit worth a bloc of its own kind


@dataclass(frozen=True, slots=True)
class Case:
    """`knobs` replace fields of the scenario's campaign; `habit`: blocs are formed by habit before all else."""

    name: str
    knobs: dict[str, float | int | bool] = field(default_factory=dict)
    time_zones: int = 24
    habit: bool = False

    def scenario(self, study: Scenario) -> Scenario:
        """The study's scenario with this case's knobs."""
        groups = tuple(
            msgspec.structs.replace(
                group, presence=msgspec.structs.replace(group.presence, time_zones=self.time_zones)
            )
            for group in study.groups
        )
        campaign = msgspec.structs.replace(study.campaign, **self.knobs)
        return msgspec.structs.replace(study, groups=groups, campaign=campaign)


CASES: Final = (
    Case("as shipped"),
    Case("window 30 min", {"window_seconds": 1_800}),
    Case("window 2 h", {"window_seconds": 7_200}),
    Case("window 8 h", {"window_seconds": 28_800}),
    Case("blocs formed at once", {"form_at_share": 0.0, "form_seconds": 60.0}),
    Case("newcomers' blocs after 10 min", {"form_seconds": 600.0}),
    Case("newcomers' blocs after 2 h", {"form_seconds": 7_200.0}),
    Case("no quota", {"quota": 0.0}),
    Case("quota 1.5", {"quota": 1.5}),
    Case("formed when 60 % are there", {"form_at_share": 0.6}),
    Case("formed by habit", habit=True),
    Case("one time zone, from noon", {"start_hour": 12.0}, time_zones=1),
    Case("one time zone, from 23:00", {"start_hour": 23.0}, time_zones=1),
    Case("steps not normalised", {"normalise_steps": False}),
    Case("server rate 1", {"server_rate": 1.0}),
)


def habits(fleet: Sequence[DeviceParts]) -> dict[str, int]:
    """The quarter of the UTC day in which each device is on most; QUARTERS for those that are nearly always on.

    Looked at over a week of the device's own presence, drawn anew: what its agent's history would tell.
    """
    return {f"d{parts.number:06d}": _habit(parts) for parts in fleet}


def _habit(parts: DeviceParts) -> int:
    seconds = [0.0] * QUARTERS
    now, on = 0.0, parts.presence.first(0.0)
    step = DAY / _LOOKS_A_DAY
    until, look = now + parts.presence.next(now, on), 0.0
    while look < _SEEN_DAYS * DAY:
        while until <= look:
            now, on = until, not on
            until = now + parts.presence.next(now, on)
        seconds[int(look / HOUR % 24 * QUARTERS / 24)] += step if on else 0.0
        look += step
    if sum(seconds) >= _ALWAYS_ON * _SEEN_DAYS * DAY:
        return QUARTERS
    return seconds.index(max(seconds))


@contextmanager
def formed_by_habit(habit: dict[str, int]) -> Iterator[None]:
    """Within: blocs are sorted by habit first. An experiment, not the protocol: no READY tells a habit yet."""
    shipped = formation.sort_key

    def sort_key(ready: Ready, digest: bytes, beacon: bytes, adapter_bytes: int) -> formation.Key:
        first, second, third, tie = shipped(ready, digest, beacon, adapter_bytes)
        return habit[ready.device] * 16 + first, second, third, tie

    formation.sort_key = sort_key
    try:
        yield
    finally:
        formation.sort_key = shipped
