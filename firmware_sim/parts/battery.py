"""Where the current comes from: mains, a battery with a charger at some hours, or a battery under a solar panel.

The panel gives peak * sin(pi * (hour - 6) / 12) from 6 to 18 o'clock and nothing by night: a clear day at the
equinox. The day is cut where the sign of (what comes in - what is drawn) changes; between two cuts the charge moves
one way only, so that clipping the exact integral to empty and full is exact too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final, Literal

from firmware_sim import scenario
from firmware_sim.parts.hours import HOUR, inside, until

Source = Literal["mains", "charging", "battery"]

DAWN: Final = 6.0
DUSK: Final = 18.0
# Below this share of its peak a panel does not charge: the regulator says "battery".
SUN_SHARE_MIN: Final = 0.1
_SUN_UP: Final = DAWN + 12.0 / math.pi * math.asin(SUN_SHARE_MIN)
_SUN_DOWN: Final = DUSK - 12.0 / math.pi * math.asin(SUN_SHARE_MIN)
# A crossing is told when the level is passed by twice this, so that the next look does not find the same one again.
CHARGE_STEP: Final = 1e-6
_NEAR_HOURS: Final = 1e-9  # a cut this near is where we stand: rounding puts it on either side
_CHANGE_SECONDS_MIN: Final = 0.001


class Battery:
    """Charge 0 … 1 of `wh` watt-hours. On mains it is always full."""

    __slots__ = ("_at", "charge", "panel_watts", "supply", "wh")

    def __init__(self, power: scenario.Power, wh: float, panel_watts: float, charge: float) -> None:
        self.supply, self.wh, self.panel_watts = power, wh, panel_watts
        self.charge = 1.0 if power.kind == "mains" else charge
        self._at = 0.0

    @property
    def empty(self) -> bool:
        """Nothing left to run on."""
        return self.charge <= 2 * CHARGE_STEP

    def settle(self, now: float, local_hour: float, watts: float) -> float:
        """Charge at `now`, at this local hour, after `watts` were drawn since the last call."""
        hours = (now - self._at) / HOUR
        if hours <= 0.0:
            return self.charge
        self._at = now
        if self.supply.kind != "mains":
            for start, end in self._pieces((local_hour - hours) % 24.0, hours, watts):
                self.charge = min(1.0, max(0.0, self.charge + self._energy(start, end, watts) / self.wh))
        return self.charge

    def power(self, local_hour: float) -> Source:
        """What a device reports about its supply at this hour."""
        if self.supply.kind == "mains":
            return "mains"
        if self.supply.kind == "solar":
            return "charging" if inside(local_hour, _SUN_UP, _SUN_DOWN) else "battery"
        return "charging" if self._plugged(local_hour) else "battery"

    def next_change(self, now: float, local_hour: float, watts: float, levels: Iterable[float]) -> float:
        """Seconds from `now` until `power` changes or the charge passes one of `levels`; infinite on mains."""
        if self.supply.kind == "mains":
            return math.inf
        self.settle(now, local_hour, watts)
        hours = self._flip_hours(local_hour)
        passed = self._passing_hours(local_hour, hours, watts, sorted(levels))
        return max(_CHANGE_SECONDS_MIN, min(hours, passed) * HOUR)

    def _passing_hours(self, hour: float, hours: float, watts: float, levels: list[float]) -> float:
        charge = self.charge
        for start, end in self._pieces(hour, hours, watts):
            after = min(1.0, max(0.0, charge + self._energy(start, end, watts) / self.wh))
            goal = _first_passed(charge, after, levels)
            if goal is not None:
                return self._root(start, end, watts, (goal - charge) * self.wh) - hour
            charge = after
        return math.inf

    def _flip_hours(self, hour: float) -> float:
        """Hours until `power` changes. A plug without hours, or with all of them, never flips: a day is looked at."""
        if self.supply.kind == "solar":
            return min(until(hour, _SUN_UP), until(hour, _SUN_DOWN))
        start, end = self.supply.plugged_from_hour, self.supply.plugged_to_hour
        if start % 24.0 == end % 24.0:
            return 24.0
        return min(until(hour, start), until(hour, end))

    def _plugged(self, hour: float) -> bool:
        return inside(hour, self.supply.plugged_from_hour, self.supply.plugged_to_hour)

    def _pieces(self, hour: float, hours: float, watts: float) -> Iterator[tuple[float, float]]:
        """(from, to) in hours counted on from `hour`, cut where the sign of the flow can change."""
        cuts = self._cuts(watts)
        start, end = hour, hour + hours
        while start < end:
            ahead = (until(start % 24.0, cut) for cut in cuts)
            stop = min(end, start + min((hours for hours in ahead if hours > _NEAR_HOURS), default=24.0))
            yield start, stop
            start = stop

    def _cuts(self, watts: float) -> tuple[float, ...]:
        if self.supply.kind == "battery":
            return self.supply.plugged_from_hour % 24.0, self.supply.plugged_to_hour % 24.0
        if watts >= self.panel_watts:
            return DAWN, DUSK
        even = 12.0 / math.pi * math.asin(max(0.0, watts) / self.panel_watts)  # from dawn: panel = load
        return DAWN, DAWN + even, DUSK - even, DUSK

    def _energy(self, start: float, end: float, watts: float) -> float:
        """Watt-hours gained from `start` to `end`, which lie in one piece."""
        hours = end - start
        middle = (start + end) / 2.0 % 24.0
        if self.supply.kind == "battery":
            return hours * ((self.supply.charge_watts if self._plugged(middle) else 0.0) - watts)
        if not inside(middle, DAWN, DUSK):
            return -hours * watts
        turn = math.pi / 12.0
        # The mean of a sine over a span is its middle value times sinc: no difference of two near cosines.
        sun = self.panel_watts * math.sin(turn * (middle - DAWN)) * 2.0 / turn * math.sin(turn * hours / 2.0)
        return sun - hours * watts

    def _root(self, start: float, end: float, watts: float, goal: float) -> float:
        """When `goal` watt-hours are gained. The flow keeps its sign in a piece, so halving cannot miss it."""
        low, high = start, end
        while high - low > 1e-9:
            middle = (low + high) / 2.0
            if abs(self._energy(start, middle, watts)) < abs(goal):
                low = middle
            else:
                high = middle
        return high


def _first_passed(charge: float, after: float, levels: list[float]) -> float | None:
    """The charge at which the first level on the way from `charge` to `after` counts as passed."""
    step = 2 * CHARGE_STEP
    if after > charge:
        goals = (min(1.0, level + step) for level in levels if level > charge + CHARGE_STEP)
        return next((goal for goal in goals if goal <= after), None)
    goals = (max(0.0, level - step) for level in reversed(levels) if level < charge - CHARGE_STEP)
    return next((goal for goal in goals if goal >= after), None)
