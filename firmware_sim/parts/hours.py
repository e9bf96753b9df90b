"""Local hours of the day: windows that may span midnight. All hours are floats in 0 … 24."""

from __future__ import annotations

from typing import Final

DAY: Final = 86_400.0
HOUR: Final = 3_600.0


def local_hour(now: float, time_zone: float) -> float:
    """Hour of the day at `now` seconds after a midnight UTC, `time_zone` hours east."""
    return (now / HOUR + time_zone) % 24.0


def span(start: float, end: float) -> float:
    """Hours from `start` to `end`; equal ones make an empty window, 0 to 24 a whole day."""
    hours = (end - start) % 24.0
    return 24.0 if hours == 0.0 and end != start else hours


def inside(hour: float, start: float, end: float) -> bool:
    """Whether `hour` lies in the window, its start included and its end not."""
    return (hour - start) % 24.0 < span(start, end)


def until(hour: float, goal: float) -> float:
    """Hours from `hour` to the next `goal`: above 0, at most 24."""
    ahead = (goal - hour) % 24.0
    return ahead if ahead > 0.0 else 24.0
