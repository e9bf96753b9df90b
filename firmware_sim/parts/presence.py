"""When a device is switched on and linked: drawn at each flip, in closed form, from the device's own stream.

`sessions` is a stationary alternating renewal process: at the start of the world the share of devices that is on, and
what is left of their sessions, are those of a fleet that has run for ever (the length of the session that a moment
falls into is again log-normal, its mean of the logarithm higher by sigma squared; the rest of it is uniform in it).
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final, Protocol

from fedge.errors import ConfigError
from firmware_sim import scenario
from firmware_sim.parts import fitted
from firmware_sim.parts.hours import DAY, HOUR, inside, local_hour, span, until
from firmware_sim.world.streams import Stream

RESTART_HOURS: Final = 48.0  # mean time between restarts of a device that is always on
RESTART_SECONDS: Final = 90.0  # median of a restart
STAY_SPREAD: Final = 0.5  # sigma of the logarithm of a device's error about how long it stays
FLIP_SECONDS_MIN: Final = 10.0  # of one state
FLIP_SECONDS_MAX: Final = 100 * 366 * DAY  # for ever
_JITTER_HOURS: Final = 0.5  # by which the edge of a night or a day moves, either way


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Recorded intervals that are on, in seconds, ordered and apart; repeated after `period`. 16 bytes for each."""

    period: float
    starts: array[float]
    ends: array[float]

    @property
    def share(self) -> float:
        """Of the time that is on."""
        return (sum(self.ends) - sum(self.starts)) / self.period


class Presence(Protocol):
    """The engine asks `first` once, then `next` at each flip."""

    @property
    def share(self) -> float:
        """Share of the time that this device is on in the long run."""

    def first(self, now: float) -> bool:
        """Whether the device is on at the world's start."""

    def next(self, now: float, on: bool) -> float:
        """Seconds until it flips, having just become (or begun) `on`."""

    def expected_stay(self, now: float) -> float:
        """How long the device itself expects to stay on: the truth times a log-normal error, one for each session."""


class _Drawn:
    """What all kinds share: a stream, when the present state ends, and the error of the expected stay."""

    __slots__ = ("_error", "_stream", "_until", "plan")

    def __init__(self, plan: scenario.Presence, stream: Stream) -> None:
        self.plan, self._stream = plan, stream
        self._until, self._error = 0.0, 1.0

    def expected_stay(self, now: float) -> float:
        return max(0.0, self._until - now) * self._error

    def _lasts(self, now: float, seconds: float) -> float:
        seconds = min(FLIP_SECONDS_MAX, max(FLIP_SECONDS_MIN, seconds))
        self._until = now + seconds
        self._error = self._stream.lognormal(1.0, STAY_SPREAD)
        return seconds


class Always(_Drawn):
    """On, except for restarts."""

    __slots__ = ()

    @property
    def share(self) -> float:
        return 1.0 - RESTART_SECONDS / (RESTART_HOURS * HOUR)

    def first(self, now: float) -> bool:
        return True

    def next(self, now: float, on: bool) -> float:
        if on:
            return self._lasts(now, self._stream.exponential(RESTART_HOURS * HOUR))
        return self._lasts(now, self._stream.lognormal(RESTART_SECONDS, 0.5))


class Renewal(_Drawn):
    """On and off for log-normal times. `keep` cuts each session short and gives the rest to the pause after it.

    A part of the spread lies between devices: each has medians of its own, and one that stays long pauses long.
    """

    __slots__ = ("_cut", "_off_seconds", "_on_seconds", "_rest")

    def __init__(self, plan: scenario.Presence, stream: Stream) -> None:
        super().__init__(plan, stream)
        self._cut = self._rest = 0.0
        tempo, own = stream.normal(), stream.normal()
        slow = fitted.TEMPO * tempo + math.sqrt(1.0 - fitted.TEMPO**2) * own
        between = plan.spread * math.sqrt(fitted.BETWEEN)
        self._on_seconds = plan.on_hours * HOUR * math.exp(between * tempo)
        self._off_seconds = plan.off_hours * HOUR * math.exp(fitted.PAUSE_SPREAD * between * slow)

    @property
    def share(self) -> float:
        return self.plan.keep * self._whole_share

    @property
    def _whole_share(self) -> float:
        on = self._on_seconds * math.exp(self._sigma(True) ** 2 / 2.0)
        return on / (on + self._off_seconds * math.exp(self._sigma(False) ** 2 / 2.0))

    def first(self, now: float) -> bool:
        if not self._stream.chance(self._whole_share):
            self._rest = self._around(False) * self._stream.uniform()
            return False
        session = self._around(True)
        kept, at = self.plan.keep * session, session * self._stream.uniform()
        if at < kept:
            self._rest, self._cut = kept - at, session - kept
            return True
        self._rest = session - at + self._length(False)
        return False

    def next(self, now: float, on: bool) -> float:
        rest, self._rest = self._rest, 0.0
        if rest > 0.0:
            return self._lasts(now, rest)
        if not on:
            return self._lasts(now, self._cut + self._length(False))
        session = self._length(True)
        self._cut = (1.0 - self.plan.keep) * session
        return self._lasts(now, session - self._cut)

    def _sigma(self, on: bool) -> float:
        """What is left of the spread at one device; pauses spread less than sessions."""
        return self.plan.spread * math.sqrt(1.0 - fitted.BETWEEN) * (1.0 if on else fitted.PAUSE_SPREAD)

    def _length(self, on: bool) -> float:
        return self._stream.lognormal(self._on_seconds if on else self._off_seconds, self._sigma(on))

    def _around(self, on: bool) -> float:
        """Length of the session, or pause, that a moment falls into."""
        return self._length(on) * math.exp(self._sigma(on) ** 2)


class Windowed(_Drawn):
    """On in a window of the day whose edges move a little each time; `night` has sessions outside it as well."""

    __slots__ = ("_edge", "_inside", "_zone")

    def __init__(self, plan: scenario.Presence, stream: Stream, time_zone: float) -> None:
        super().__init__(plan, stream)
        self._zone, self._edge, self._inside = time_zone, 0.0, False

    @property
    def share(self) -> float:
        window = span(self.plan.from_hour, self.plan.to_hour) / 24.0
        outside = self._sessions_share * (1.0 - window) if self.plan.kind == "night" else 0.0
        return self.plan.keep * window + outside

    @property
    def _sessions_share(self) -> float:
        return self.plan.keep * self.plan.on_hours / (self.plan.on_hours + self.plan.off_hours)

    def first(self, now: float) -> bool:
        plan = self.plan
        self._inside = inside(local_hour(now, self._zone), plan.from_hour, plan.to_hour)
        self._edge = self._next_edge(now)
        if self._edge <= now:  # moved to before the world's start
            self._cross()
        if self._inside or plan.kind == "day":
            return self._inside
        return self._stream.chance(self._sessions_share)

    def next(self, now: float, on: bool) -> float:
        if now >= self._edge:
            self._cross()
        if self._inside:
            return self._in_window(now, on)
        if self.plan.kind == "day":
            return self._lasts(now, self._edge - now)
        median = (self.plan.on_hours if on else self.plan.off_hours) * HOUR
        length = self._stream.lognormal(median, self.plan.spread) * (self.plan.keep if on else 1.0)
        if now + length < self._edge:
            return self._lasts(now, length)
        if not on:
            return self._lasts(now, self._edge - now)
        self._cross()  # a session that reaches the night goes on through it
        return self._in_window(now, on)

    def _in_window(self, now: float, on: bool) -> float:
        if on:
            return self._lasts(now, self.plan.keep * (self._edge - now))
        self._cross()  # what `keep` took from the window: off until it ends, and for a pause
        if self.plan.kind == "day":
            return self._lasts(now, self._edge - now)
        pause = self._stream.lognormal(self.plan.off_hours * HOUR, self.plan.spread)
        return self._lasts(now, min(self._edge, self._until + pause) - now)

    def _cross(self) -> None:
        self._inside = not self._inside
        self._edge = self._next_edge(self._edge)

    def _next_edge(self, now: float) -> float:
        """The edge that follows `now`, moved by a draw: by less than a quarter of the shorter side, so none is lost."""
        goal = self.plan.to_hour if self._inside else self.plan.from_hour
        width = span(self.plan.from_hour, self.plan.to_hour)
        if width in (0.0, 24.0):
            return now + FLIP_SECONDS_MAX
        move = min(_JITTER_HOURS, width / 4.0, (24.0 - width) / 4.0)
        ahead = until(local_hour(now, self._zone), goal) + self._stream.uniform(-move, move)
        return now + ahead * HOUR


class Replayed(_Drawn):
    """Sessions of a trace, repeated for ever, begun on a day of the device's own."""

    __slots__ = ("_offset", "_sessions")

    def __init__(self, plan: scenario.Presence, stream: Stream, sessions: Sessions, time_zone: float) -> None:
        super().__init__(plan, stream)
        self._sessions = sessions
        days = max(1, int(sessions.period // DAY))
        self._offset = stream.integer(days) * DAY + time_zone * HOUR

    @property
    def share(self) -> float:
        return self.plan.keep * self._sessions.share

    def first(self, now: float) -> bool:
        at, index = self._place(now)
        return index >= 0 and at < self._kept_end(index)

    def next(self, now: float, on: bool) -> float:
        at, index = self._place(now)
        if on and index >= 0:
            return self._lasts(now, self._kept_end(index) - at)
        laps, following = divmod(index + 1, len(self._sessions.starts))
        return self._lasts(now, laps * self._sessions.period + self._sessions.starts[following] - at)

    def _place(self, now: float) -> tuple[float, int]:
        """Where in the trace, and the index of the session that began last (-1: none yet in this lap)."""
        at = (now + self._offset) % self._sessions.period
        return at, bisect_right(self._sessions.starts, at) - 1

    def _kept_end(self, index: int) -> float:
        start, end = self._sessions.starts[index], self._sessions.ends[index]
        return start + self.plan.keep * (end - start)


def presence(
    plan: scenario.Presence, stream: Stream, time_zone: float, sessions: Sessions | None = None
) -> Presence:
    """The part that a scenario asks for. `sessions` is what a `trace` replays."""
    if plan.kind == "always":
        return Always(plan, stream)
    if plan.kind == "sessions":
        return Renewal(plan, stream)
    if plan.kind == "trace":
        if sessions is None:
            raise ConfigError(
                "presence of kind `trace` needs traces",
                field="presence.kind",
                value=plan.kind,
                hint="add --traces PATH",
            )
        return Replayed(plan, stream, sessions, time_zone)
    return Windowed(plan, stream, time_zone)
