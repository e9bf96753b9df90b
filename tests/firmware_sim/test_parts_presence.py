"""Presence: what fleets do in the long run, and that each kind keeps its hours."""

import math
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError
from firmware_sim.parts.hours import DAY, HOUR, inside, local_hour, span, until
from firmware_sim.parts.presence import FLIP_SECONDS_MIN, Presence, Sessions, presence
from firmware_sim.scenario import Presence as Plan
from firmware_sim.world.streams import Stream

RECORDED = Sessions(
    2 * DAY, array("d", [3_600.0, 50_000.0, 100_000.0]), array("d", [7_200.0, 90_000.0, 172_800.0])
)


def made(number: int, plan: Plan, zone: float = 0.0) -> Presence:
    return presence(plan, Stream(3, number, "presence"), zone, RECORDED)


def course(part: Presence, days: float) -> list[tuple[float, float]]:
    """Intervals on in the first `days`."""
    now, on, found = 0.0, part.first(0.0), []
    while now < days * DAY:
        length = part.next(now, on)
        assert length >= FLIP_SECONDS_MIN
        if on:
            found.append((now, min(now + length, days * DAY)))
        now, on = now + length, not on
    return found


def share(found: list[tuple[float, float]], start: float, end: float) -> float:
    return sum(max(0.0, min(b, end) - max(a, start)) for a, b in found) / (end - start)


@pytest.mark.parametrize("keep", [1.0, 0.35])
def test_sessions_are_stationary_from_the_first_moment_on(keep: float) -> None:
    plan = Plan(kind="sessions", on_hours=3.0, off_hours=2.0, spread=1.2, keep=keep)
    courses = [course(made(number, plan), 3.0) for number in range(1_500)]
    own = float(np.mean([made(number, plan).share for number in range(1_500)]))
    for day in range(3):
        on = float(np.mean([share(found, day * DAY, (day + 1) * DAY) for found in courses]))
        assert on == pytest.approx(own, abs=0.03)
    first_hour = float(np.mean([share(found, 0.0, HOUR) for found in courses]))
    assert first_hour == pytest.approx(own, abs=0.04)


def test_sessions_have_the_median_that_was_asked_for() -> None:
    plan = Plan(kind="sessions", on_hours=2.0, off_hours=1.0, spread=1.0)
    lengths: list[float] = []
    for number in range(400):
        found = course(made(number, plan), 8.0)[1:-1]
        lengths += [b - a for a, b in found[:3]]
    assert float(np.median(lengths)) == pytest.approx(2.0 * HOUR, rel=0.15)
    assert float(np.std(np.log(lengths))) == pytest.approx(1.0, rel=0.15)


def test_always_on_restarts_about_every_other_day() -> None:
    courses = [course(made(number, Plan()), 20.0) for number in range(200)]
    assert float(np.mean([len(found) for found in courses])) == pytest.approx(11.0, rel=0.1)
    assert min(share(found, 0.0, 20 * DAY) for found in courses) > 0.99


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["night", "day"]),
    st.floats(0.0, 23.9),
    st.floats(2.0, 22.0),
    st.integers(0, 23),
    st.integers(0, 10_000),
)
def test_a_window_is_kept_every_day(kind: str, start: float, width: float, zone: int, number: int) -> None:
    plan = Plan(kind=kind, from_hour=start, to_hour=(start + width) % 24.0, on_hours=0.5, off_hours=4.0)
    found = course(made(number, plan, zone), 6.0)
    for sample in np.arange(0.0, 6 * DAY, 900.0).tolist():
        hour = local_hour(sample, zone)
        margin = min(0.55, width / 4 + 0.05)
        if inside(hour, (start + margin) % 24.0, (start + width - margin) % 24.0) and width > 2 * margin:
            assert any(a <= sample < b for a, b in found)
        elif kind == "day" and not inside(hour, (start - 0.55) % 24.0, (start + width + 0.55) % 24.0):
            assert not any(a <= sample < b for a, b in found)
    assert made(number, plan, zone).share == pytest.approx(share(found, 0.0, 6 * DAY), abs=0.35)


def test_by_night_the_phones_are_on_and_by_day_sometimes() -> None:
    plan = Plan(kind="night", from_hour=22.0, to_hour=6.0, on_hours=1.0, off_hours=3.0, spread=0.8)
    courses = [course(made(number, plan), 4.0) for number in range(300)]
    at = [
        float(
            np.mean(
                [
                    share(found, day * DAY + h * HOUR, day * DAY + (h + 1) * HOUR)
                    for found in courses
                    for day in (1, 2)
                ]
            )
        )
        for h in (2, 14)
    ]
    assert at[0] > 0.99
    assert at[1] == pytest.approx(0.25, abs=0.08)


def test_a_trace_is_replayed_for_ever_at_its_own_hours() -> None:
    for number in range(20):
        part = made(number, Plan(kind="trace"))
        found = course(part, 6.0)
        assert share(found, 0.0, 6 * DAY) == pytest.approx(RECORDED.share, abs=1e-9)
        assert part.share == pytest.approx(RECORDED.share)
        edges = {round(edge % DAY) for interval in found for edge in interval}
        assert edges <= {3_600, 7_200, 50_000, 90_000 % 86_400, 100_000 % 86_400, 0}


def test_churn_keeps_the_share_of_each_recorded_session() -> None:
    found = course(made(1, Plan(kind="trace", keep=0.5)), 6.0)
    assert share(found, 0.0, 6 * DAY) == pytest.approx(0.5 * RECORDED.share, abs=0.02)


def test_time_zones_shift_a_trace() -> None:
    at_home, east = (
        course(made(4, Plan(kind="trace")), 4.0),
        course(made(4, Plan(kind="trace"), zone=5.0), 4.0),
    )
    shifted = [(a - 5 * HOUR, b - 5 * HOUR) for a, b in at_home if a > 5 * HOUR and b < 4 * DAY]
    assert set(map(repr, shifted)) <= set(map(repr, east))


def test_the_expected_stay_errs_by_a_factor_that_holds_for_a_session() -> None:
    errors = []
    for number in range(2_000):
        part = made(number, Plan())
        seconds = part.next(0.0, part.first(0.0))
        error = part.expected_stay(0.0) / seconds
        assert part.expected_stay(seconds / 2) == pytest.approx(error * seconds / 2)
        assert part.expected_stay(seconds + 1.0) == 0.0
        errors.append(math.log(error))
    assert float(np.mean(errors)) == pytest.approx(0.0, abs=0.05)
    assert float(np.std(errors)) == pytest.approx(0.5, abs=0.04)


def test_a_trace_without_traces_is_refused() -> None:
    with pytest.raises(ConfigError, match="--traces"):
        presence(Plan(kind="trace"), Stream(1), 0.0, None)


def test_hours_span_midnight() -> None:
    assert (span(22.0, 6.0), span(6.0, 6.0), span(0.0, 24.0)) == (8.0, 0.0, 24.0)
    assert (inside(23.0, 22.0, 6.0), inside(6.0, 22.0, 6.0), inside(5.9, 22.0, 6.0)) == (True, False, True)
    assert (until(23.0, 1.0), until(1.0, 1.0)) == (2.0, 24.0)
    assert local_hour(3_600.0, 23.5) == 0.5
