"""The way to the hub: how long a transfer takes, how late a message is, how many are lost.

A device's rate is log-normal over the fleet and moves in time as a log-normal AR(1) process (an Ornstein-Uhlenbeck
process of the logarithm), which is drawn in closed form at each transfer: no steps in between. `trace` replays a
series of measured rates instead, from a place of the device's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from firmware_sim.parts import fitted
from firmware_sim.world.streams import Stream

KBIT_MIN: Final = 8.0  # what even the worst moment gives: a transfer ends


@dataclass(frozen=True, slots=True)
class LinkClass:
    """One kind of link. Rates in kbit/s; spreads are sigmas of the logarithm."""

    down_kbit: float  # median over devices
    up_kbit: float
    between: float  # spread over devices
    within: float  # spread over time at one device
    hold_seconds: float  # after this the rate has forgotten itself to 1/e
    latency: float  # seconds, one way, median
    jitter: float  # spread of one message's latency
    loss: float  # of a message


LINKS: Final[dict[str, LinkClass]] = {
    # Round figures of home and office lines; drift over time as little as a cable's, loss none.
    "ethernet": LinkClass(100_000.0, 40_000.0, 0.5, 0.1, 600.0, 0.008, 0.2, 0.0),
    # A line as above behind a shared radio, which drifts as video sessions do.
    "wifi": LinkClass(
        30_000.0, 12_000.0, 0.8, fitted.VIDEO_WITHIN, fitted.VIDEO_HOLD_SECONDS, 0.015, 0.5, 0.001
    ),
    # Capacities of phones; a moving radio drifts like HSDPA.
    "lte": LinkClass(
        fitted.PHONE_KBIT,
        2_300.0,
        fitted.PHONE_BETWEEN,
        fitted.HSDPA_WITHIN,
        fitted.HSDPA_HOLD_SECONDS,
        0.035,
        0.5,
        0.003,
    ),
    "3g": LinkClass(
        fitted.HSDPA_KBIT,
        380.0,
        fitted.HSDPA_BETWEEN,
        fitted.HSDPA_WITHIN,
        fitted.HSDPA_HOLD_SECONDS,
        0.080,
        0.6,
        0.01,
    ),
    # A geostationary dish: 36,000 km twice is 240 ms.
    "satellite": LinkClass(5_000.0, 1_000.0, 0.4, 0.4, 120.0, 0.300, 0.2, 0.01),
}
UP_SHARE: Final = 0.35  # of a measured downlink; mobile networks give uploads about a third


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A measured rate over time, replayed for ever: `ends[i]` seconds, by which `megabits[i]` have passed.

    Shared by all devices that replay it; the rate is constant between two ends.
    """

    ends: NDArray[np.float64]
    megabits: NDArray[np.float64]
    name: str = ""

    def seconds(self, at: float, megabits: float) -> float:
        """How long `megabits` take from `at` on."""
        period, total = float(self.ends[-1]), float(self.megabits[-1])
        at %= period
        goal = float(np.interp(at, self.ends, self.megabits)) + megabits
        laps, rest = divmod(goal, total)
        return laps * period + float(np.interp(rest, self.megabits, self.ends)) - at

    @property
    def mean_kbit(self) -> float:
        return 1_000.0 * float(self.megabits[-1] / self.ends[-1])


def series_of(t: NDArray[np.float64], mbps: NDArray[np.float64], name: str = "") -> Series:
    """The rate `mbps[i]` from `t[i]` to `t[i + 1]`, ascending; the last one lasts as long as the middle one of all."""
    last = float(np.median(np.diff(t))) if len(t) > 1 else 1.0
    lengths = np.diff(t, append=t[-1] + last)
    zero = np.zeros(1)
    return Series(
        np.concatenate((zero, np.cumsum(lengths))), np.concatenate((zero, np.cumsum(lengths * mbps))), name
    )


def constant(kbit: float) -> Series:
    """A rate that never changes."""
    return series_of(np.zeros(1), np.full(1, kbit / 1_000.0), "constant")


class Link:
    """One device's link. Two draws for each transfer, one for each latency, from its own stream."""

    __slots__ = ("_at", "_deviation", "_scale", "_series", "_stream", "kind", "loss")

    def __init__(self, kind: str, stream: Stream, loss: float = 0.0, series: Series | None = None) -> None:
        """`loss` comes on top of the kind's own; `series` is what `trace` replays (without one: as wifi)."""
        self.kind, self._stream, self._series = kind, stream, series
        own = self._class
        self.loss = 1.0 - (1.0 - own.loss) * (1.0 - loss)
        self._scale = math.exp(own.between * stream.normal())
        self._deviation = stream.normal()
        self._at = stream.uniform(0.0, float(series.ends[-1])) if series is not None else 0.0

    @property
    def _class(self) -> LinkClass:
        return LINKS["wifi" if self.kind == "trace" else self.kind]

    @property
    def upload_kbit(self) -> float:
        """What the device's own history of uploads says: its median rate."""
        if self._series is not None:
            return max(KBIT_MIN, UP_SHARE * self._series.mean_kbit)
        return max(KBIT_MIN, self._scale * self._class.up_kbit)

    def transfer_seconds(self, now: float, size: int, up: bool) -> float:
        """Seconds that `size` bytes take from `now` on, without the latency."""
        if self._series is not None:
            return self._series.seconds(now + self._at, size * 8e-6 / (UP_SHARE if up else 1.0))
        own = self._class
        self._drift(now, own.hold_seconds)
        median = own.up_kbit if up else own.down_kbit
        rate = max(KBIT_MIN, median * self._scale * math.exp(own.within * self._deviation))
        return size * 8e-3 / rate

    def latency(self) -> float:
        """Seconds until a small message is at the other side."""
        own = self._class
        return own.latency * math.exp(own.jitter * self._stream.normal())

    def _drift(self, now: float, hold_seconds: float) -> None:
        """The exact step of an Ornstein-Uhlenbeck process over the time since the last transfer."""
        keep = math.exp(-max(0.0, now - self._at) / hold_seconds)
        self._deviation = keep * self._deviation + math.sqrt(1.0 - keep * keep) * self._stream.normal()
        self._at = max(self._at, now)
