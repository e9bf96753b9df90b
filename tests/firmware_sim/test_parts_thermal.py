"""Heat in closed form against small steps, and what a throttled board settles at."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError
from firmware_sim.parts.board import BOARDS, board
from firmware_sim.parts.draw import thermal
from firmware_sim.parts.fitted import ENCLOSURES
from firmware_sim.parts.thermal import SPEEDS, STEP_KELVIN, STEPS, Thermal, ambient_celsius

STEP = 0.02  # seconds of the brute force
LIMIT = 80.0

boards = st.builds(
    Thermal,
    tau=st.floats(8.0, 60.0),
    rise=st.floats(1.0, 90.0),
    throttle_celsius=st.just(LIMIT),
    idle=st.floats(0.0, 40.0),
    ambient=st.floats(-10.0, 45.0),
)


def speed_at(celsius: float) -> float:
    return SPEEDS[min(STEPS, max(0, math.ceil((celsius - LIMIT) / STEP_KELVIN)))]


def stepped(
    part: Thermal, celsius: float, ambient: float, load: float, seconds: float
) -> tuple[float, float]:
    """Temperature and work done after `seconds`, by Euler's method."""
    work = 0.0
    for _ in range(round(seconds / STEP)):
        speed = speed_at(celsius)
        work += speed * STEP
        celsius += STEP * (ambient + part.idle + part.rise * load * speed**2 - celsius) / part.tau
    return celsius, work


@settings(max_examples=40, deadline=None)
@given(boards, st.floats(-10.0, 60.0), st.floats(0.0, 1.0), st.floats(1.0, 120.0))
def test_settling_is_what_small_steps_come_to(
    part: Thermal, ambient: float, load: float, seconds: float
) -> None:
    expected, _ = stepped(part, part.celsius, ambient, load, seconds)
    assert part.settle(seconds, ambient, load) == pytest.approx(expected, abs=0.15)


@settings(max_examples=40, deadline=None)
@given(boards, st.floats(-10.0, 60.0), st.floats(5.0, 60.0))
def test_work_takes_as_long_as_small_steps_need(part: Thermal, ambient: float, seconds: float) -> None:
    wall = part.work(0.0, ambient, seconds)[0]
    _, work = stepped(part, part.celsius, ambient, 1.0, wall)
    assert work == pytest.approx(seconds, rel=0.02, abs=0.05)
    assert seconds - 1e-9 <= wall <= seconds / SPEEDS[-1] + 1e-6
    assert 0.0 <= part.work(0.0, ambient, seconds)[1] <= wall + 1e-9


@settings(max_examples=60, deadline=None)
@given(boards, st.floats(-10.0, 60.0), st.lists(st.floats(0.1, 80.0), min_size=1, max_size=6))
def test_looking_more_often_changes_nothing(part: Thermal, ambient: float, pauses: list[float]) -> None:
    other = Thermal(part.tau, part.rise, part.throttle_celsius, part.idle, part.celsius - part.idle)
    now = 0.0
    for pause in pauses:
        now += pause
        part.settle(now, ambient, 1.0)
    assert part.celsius == pytest.approx(other.settle(now, ambient, 1.0), abs=1e-6)


def test_a_throttled_board_settles_where_heat_and_cooling_balance() -> None:
    part = Thermal(tau=30.0, rise=60.0, throttle_celsius=LIMIT, idle=10.0, ambient=25.0)
    assert not part.hot
    # One step down, 0.9, still heats (to 35 + 60 * 0.81 = 83.6); two steps, from 80.5 on, cool (to 73.4).
    assert part.settle(3_600.0, 25.0, 1.0) == LIMIT + STEP_KELVIN
    assert part.hot
    balance = (80.5 - 35.0) / 60.0  # between the heat of 0.9 and that of 0.8
    speed = 0.8 + 0.1 * (balance - 0.64) / (0.81 - 0.64)
    assert part.work(3_600.0, 25.0, 600.0)[0] == pytest.approx(600.0 / speed)
    assert part.work(3_600.0, 25.0, 600.0)[1] == part.work(3_600.0, 25.0, 600.0)[0]


def test_a_cool_board_works_at_full_speed_and_asking_changes_nothing() -> None:
    part = Thermal(30.0, 20.0, LIMIT, 10.0, 25.0)
    assert part.work(100.0, 25.0, 500.0)[0] == 500.0
    assert part.work(100.0, 25.0, 500.0)[1] == 0.0
    assert part.celsius == 35.0


def test_the_day_is_coldest_at_four_and_warmest_at_four() -> None:
    hours = [hour / 4 for hour in range(96)]
    air = [ambient_celsius(11.0, 31.0, hour) for hour in hours]
    assert hours[air.index(min(air))] == 4.0
    assert hours[air.index(max(air))] == 16.0
    assert (min(air), max(air)) == (11.0, 31.0)


def test_boards_are_ordered_as_measured_and_a_bare_pi5_throttles_but_none_with_a_fan() -> None:
    speeds = [BOARDS[name].tokens_per_second for name in ("zero2w", "pi3", "pi4", "pi5", "orin-nano")]
    assert speeds == sorted(speeds)
    assert not any(BOARDS[name].aes for name in ("zero2w", "pi3", "pi4"))
    for made in BOARDS.values():
        work = {where: thermal(made, where, 22.0).work(0.0, 22.0, 900.0)[0] for where in ENCLOSURES}
        assert work["fan"] == 900.0
        assert work["open"] >= work["heatsink"] >= work["fan"]
    assert thermal(BOARDS["pi5"], "open", 22.0).work(0.0, 22.0, 900.0)[0] > 1_300.0


def test_an_unknown_board_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="pi5") as caught:
        board("pi55")
    assert (caught.value.field, caught.value.value) == ("boards", "pi55")
