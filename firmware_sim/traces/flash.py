"""FLASH's `state_traces.json`: a log of a phone's events, turned into the times at which it may train.

As in FLASH and in Google's system (Bonawitz et al. 2019, section 3): charging, on Wi-Fi, and not in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

_TIME: Final = "%Y-%m-%d %H:%M:%S"
# What an event says about (in use, charging, on Wi-Fi); battery levels say nothing.
_SAYS: Final[dict[str, tuple[str, bool]]] = {
    "screen_on": ("dark", False),
    "screen_off": ("dark", True),
    "screen_unlock": ("locked", False),
    "screen_lock": ("locked", True),
    "battery_charged_on": ("charging", True),
    "battery_charged_off": ("charging", False),
    "wifi": ("wifi", True),
    "2g": ("wifi", False),
    "3g": ("wifi", False),
    "4g": ("wifi", False),
    "5g": ("wifi", False),
    "unknown": ("wifi", False),
}


def parse(line: str) -> tuple[float, str]:
    """(seconds, event) of one line; ValueError where it is not `date time<TAB>event`."""
    time, _, event = line.partition("\t")
    moment = datetime.strptime(time.strip(), _TIME).replace(tzinfo=UTC)
    return moment.timestamp(), event.strip().lower()


def trainable(events: Iterable[tuple[float, str]]) -> Iterator[tuple[float, float]]:
    """The intervals in which a phone may train; the last one ends with the log. Times in the events' seconds."""
    state = {"dark": False, "locked": False, "charging": False, "wifi": False}
    start: float | None = None
    now = 0.0
    for now, event in events:
        if event in _SAYS:
            what, value = _SAYS[event]
            state[what] = value
        may = (state["dark"] or state["locked"]) and state["charging"] and state["wifi"]
        if may and start is None:
            start = now
        elif not may and start is not None:
            yield start, now
            start = None
    if start is not None:
        yield start, now
