"""The time of day, which a board without a battery does not know when it wakes up.

The rule: a clock below the *floor* is not believed and nothing is done until it is right. The floor is the beginning
of this device's certificate or the latest believed time, kept on the disk. A clock past the certificate's end may be
as wrong, so it never moves the floor: one bad answer of a time server must not lock a device out when it is corrected.
Durations never come from here; they are monotonic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedge.errors import StorageError
from fedge.io import durable
from fedge.limits import CLOCK_SKEW_SECONDS_MAX

_SAVE_SECONDS: Final = 600.0


class Clock:
    """Unix time that never goes back. `valid` is the span of the device's certificate."""

    def __init__(self, path: Path, valid: tuple[float, float], wall: Callable[[], float] = time.time) -> None:
        self._path, self._until, self._wall = path, valid[1], wall
        self._saved = max(valid[0], self._load())
        self._last = 0.0

    def is_set(self) -> bool:
        """Whether the wall clock can be right."""
        return self._wall() >= self._saved - CLOCK_SKEW_SECONDS_MAX

    def now(self) -> float:
        """The time, no earlier than any time told before."""
        self._last = max(self._last, self._wall())
        return self._last

    def keep(self, *, every_seconds: float = _SAVE_SECONDS) -> None:
        """Moves the floor on the disk, now and then; a full disk only leaves it where it is."""
        now = self._wall()
        if self._saved + every_seconds <= now <= self._until:
            try:
                durable.write_bytes(self._path, f"{int(now)}\n".encode())
            except StorageError:
                return
            self._saved = now

    def _load(self) -> float:
        try:
            return float(self._path.read_text("ascii"))
        except (OSError, ValueError):
            return 0.0
