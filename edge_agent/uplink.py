"""How fast this device really sends: bytes of a burst over the time until the hub's receipt, smoothed.

History beats radio numbers: what counts is what arrives at the hub, through whatever lies between. The receipt follows
a commit, so the figure is a little low, which is the right side for a plan.
"""

from __future__ import annotations

from typing import Final

BURST_BYTES_MIN: Final = 16_384  # less tells of latency, not of rate
_WEIGHT: Final = 0.3  # of the newest burst


class Uplink:
    """`kbit` is the smoothed rate in kbit/s, 0 while nothing is known. Times are monotonic seconds."""

    def __init__(self, kbit: float = 0.0) -> None:
        self.kbit = kbit
        self._began, self._bytes = 0.0, 0

    def sent(self, now: float, size: int) -> None:
        """A part of a burst was given to the link."""
        if not self._bytes:
            self._began = now
        self._bytes += size

    def answered(self, now: float) -> None:
        """The hub has said what it has."""
        size, self._bytes = self._bytes, 0
        if size < BURST_BYTES_MIN or now <= self._began:
            return
        kbit = size * 8 / 1_000 / (now - self._began)
        self.kbit = round(kbit if not self.kbit else self.kbit + _WEIGHT * (kbit - self.kbit), 1)

    def cut(self) -> None:
        """The link went down: this burst tells nothing."""
        self._bytes = 0
