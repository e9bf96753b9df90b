"""Virtual time: one heap of events, and a check-sum by which two runs are known to be the same.

An event is (time, sequence, number, kind, argument, generation): the sequence number breaks ties, so the order is that
of asking and of nothing else. Nobody searches the heap for what is no longer wanted; whoever asked for an event
compares its generation when it comes, and lets it pass when that is over.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Final

# Unix time at which every world begins; midnight there, on a clock of time zone 0.
START: Final = 1_800_000_000.0
_FOLD: Final = 1_024  # events between two folds into the check-sum
_TRACE: Final = struct.Struct("<dqqq")

# ---- kinds of events, the index of their handler
TIMER, TO_HUB, TO_DEVICE, WORKED, FLIPS, LOOK, LINKS, WILL, HUB_TIMER, ACTION, BOOTS, FANS_OUT = range(12)
FETCHED, RETURNS, OWNER, RECOVERS, SAMPLE, HUB_UP, BROKER_UP, KINDS = range(12, 20)

Entry = tuple[float, int, int, int, Any, int]
Handler = Callable[[int, Any, int, int], None]  # number, argument, generation, sequence


class Clock:
    """The time, seconds since the world's start, and everything that is still to come."""

    __slots__ = ("_crc", "end", "entries", "events", "now", "sequence")

    def __init__(self, end: float) -> None:
        """`end`: what is asked for later than this never comes, and takes no memory."""
        self.now, self.end = 0.0, end
        self.events = 0
        self.sequence = 0
        self.entries: list[Entry] = []
        self._crc = 0

    def ask(self, time: float, number: int, kind: int, argument: object, generation: int) -> int:
        """Asks for an event; its sequence number."""
        self.sequence = sequence = self.sequence + 1
        if time <= self.end:
            heappush(self.entries, (time, sequence, number, kind, argument, generation))
        return sequence

    def keep(self, wanted: Callable[[Entry], bool]) -> None:
        """Forgets what is not wanted any more. The order of the rest is what it was."""
        self.entries[:] = filter(wanted, self.entries)
        heapify(self.entries)

    def advance(self, until: float, handlers: Sequence[Handler]) -> None:
        """Lets time pass. `handlers` by kind; events after `until` stay for the next call."""
        entries, pop, fold = self.entries, heappop, _FOLD - 1
        while entries and entries[0][0] <= until:
            time, sequence, number, kind, argument, generation = pop(entries)
            self.now = time
            self.events = events = self.events + 1
            if not events & fold:
                self._crc = zlib.crc32(_TRACE.pack(time, number, kind, sequence), self._crc)
            handlers[kind](number, argument, generation, sequence)
        self.now = until

    @property
    def crc(self) -> str:
        """Over every 1,024th event so far, the number of events and that of askings."""
        end = _TRACE.pack(self.now, self.events, 0, self.sequence)
        return f"{zlib.crc32(end, self._crc):08x}"
