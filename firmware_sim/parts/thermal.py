"""Heat of a board: one resistance, one capacity, and a clock that goes down in steps above the limit.

T' = (ambient + idle + rise * load * speed^2 - T) / tau: the voltage goes down with the clock. `speed` is 1 below the
limit and a tenth less for every half degree above it (Pi firmware throttles "progressively" between 80 and 85
degrees), so between two steps the solution is an exponential. Where one step heats and the next one cools, the board
stays between them, at each for as much of the time as heat and cooling need to balance (Filippov's solution of a
switched system); its mean speed follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

STEPS: Final = 9  # down to a tenth of the clock
STEP_KELVIN: Final = 0.5
SPEEDS: Final = tuple(1.0 - 0.1 * step for step in range(STEPS + 1))


def ambient_celsius(coldest: float, warmest: float, hour: float) -> float:
    """Air by the local hour: coldest at 04:00, warmest at 16:00."""
    return (coldest + warmest) / 2.0 - (warmest - coldest) / 2.0 * math.cos(math.pi * (hour - 4.0) / 12.0)


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of time without a step: from `start` towards `goal`, which only an endless one reaches."""

    seconds: float
    speed: float  # the mean one where the clock goes up and down
    start: float
    goal: float


class Thermal:
    """One board's temperature; it starts at rest in `ambient`."""

    __slots__ = ("_at", "celsius", "idle", "rise", "tau", "throttle_celsius")

    def __init__(
        self, tau: float, rise: float, throttle_celsius: float, idle: float = 0.0, ambient: float = 20.0
    ) -> None:
        self.tau, self.rise, self.throttle_celsius, self.idle = tau, rise, throttle_celsius, idle
        self.celsius = ambient + idle
        self._at = 0.0

    @property
    def hot(self) -> bool:
        """Throttled at this temperature."""
        return self.celsius >= self.throttle_celsius

    def settle(self, now: float, ambient: float, load: float) -> float:
        """Temperature at `now`, after `load` (0 … 1 of full load) since the last call."""
        left = now - self._at
        if left <= 0.0:
            return self.celsius
        self._at = now
        goal = ambient + self.idle + self.rise * load
        if (
            self.celsius < self.throttle_celsius and goal <= self.throttle_celsius
        ):  # the usual case, a hundredth of the work
            self.celsius = goal + (self.celsius - goal) * math.exp(-left / self.tau)
            return self.celsius
        for part in self._course(ambient, load):
            if part.seconds >= left:
                self.celsius = part.goal + (part.start - part.goal) * math.exp(-left / self.tau)
                break
            left -= part.seconds
        return self.celsius

    def work(self, now: float, ambient: float, seconds: float) -> tuple[float, float]:
        """How long work of `seconds` at full speed takes from `now` on, and how much of that below full speed.

        Under full load; idle until then.
        """
        self.settle(now, ambient, 0.0)
        if self.celsius < self.throttle_celsius and ambient + self.idle + self.rise <= self.throttle_celsius:
            return seconds, 0.0
        wall = throttled = 0.0
        for part in self._course(ambient, 1.0):
            length = min(part.seconds, seconds / part.speed)
            wall += length
            throttled += length if part.speed < 1.0 else 0.0
            seconds -= length * part.speed
            if length < part.seconds:
                break
        return wall, throttled

    def _course(self, ambient: float, load: float) -> Iterator[_Part]:
        """What happens from the last settled moment on while nothing changes; the last part has no end."""
        cold, heat, celsius = ambient + self.idle, self.rise * load, self.celsius
        goals = [cold + heat * speed * speed for speed in SPEEDS]
        step = self._step(goals)
        while True:
            goal = goals[step]
            if goal > self._edge(step) and step < STEPS:
                edge, way = self._edge(step), 1
            elif goal < self._edge(step - 1) and step > 0:
                edge, way = self._edge(step - 1), -1
            else:
                yield _Part(math.inf, SPEEDS[step], celsius, goal)
                return
            reach = self.tau * math.log((goal - celsius) / (goal - edge))
            yield _Part(max(0.0, reach), SPEEDS[step], celsius, goal)
            celsius, step = edge, step + way
            if (goals[step] - edge) * way <= 0.0:  # driven back: it stays at the edge
                part = (edge - goals[step]) / (goals[step - way] - goals[step])
                speed = SPEEDS[step] + part * (SPEEDS[step - way] - SPEEDS[step])
                yield _Part(math.inf, speed, edge, edge)
                return

    def _step(self, goals: list[float]) -> int:
        """How many steps the clock is down. On an edge: the side into which the temperature moves, else the lower."""
        above = (self.celsius - self.throttle_celsius) / STEP_KELVIN
        below = round(above)
        if abs(above - below) > 1e-9 or not 0 <= below < STEPS:
            return min(STEPS, max(0, math.ceil(above)))
        return below + 1 if goals[below + 1] > self._edge(below) else below

    def _edge(self, step: int) -> float:
        """The highest temperature at which the clock is `step` steps down; without any, the limit."""
        return self.throttle_celsius + STEP_KELVIN * step
