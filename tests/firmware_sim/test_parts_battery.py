"""Batteries, chargers and panels in closed form against small steps."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from firmware_sim.parts.battery import CHARGE_STEP, DAWN, DUSK, Battery
from firmware_sim.parts.hours import inside
from firmware_sim.scenario import Power

STEP = 15.0  # seconds of the brute force

hours_of_day = st.integers(0, 95).map(lambda quarter: quarter / 4.0)
plugs = st.builds(
    Power,
    kind=st.just("battery"),
    charge_watts=st.floats(0.0, 30.0),
    plugged_from_hour=hours_of_day,
    plugged_to_hour=hours_of_day,
)
suns = st.just(Power(kind="solar"))
batteries = st.builds(
    Battery, st.one_of(plugs, suns), st.floats(5.0, 100.0), st.floats(1.0, 40.0), st.floats(0.0, 1.0)
)


def flow(part: Battery, hour: float, watts: float) -> float:
    """Watts that the battery gains."""
    if part.supply.kind == "solar":
        sun = part.panel_watts * math.sin(math.pi * (hour - DAWN) / 12.0) if inside(hour, DAWN, DUSK) else 0.0
        return sun - watts
    plugged = inside(hour, part.supply.plugged_from_hour, part.supply.plugged_to_hour)
    return (part.supply.charge_watts if plugged else 0.0) - watts


def stepped(part: Battery, hour: float, watts: float, seconds: float) -> list[float]:
    """Charge after each small step from local hour `hour` on."""
    charge, out = part.charge, []
    for index in range(math.ceil(seconds / STEP)):
        length = min(STEP, seconds - index * STEP)
        middle = (hour + (index * STEP + length / 2.0) / 3_600.0) % 24.0
        charge = min(1.0, max(0.0, charge + flow(part, middle, watts) * length / 3_600.0 / part.wh))
        out.append(charge)
    return out


@settings(max_examples=50, deadline=None)
@given(batteries, hours_of_day, st.floats(0.0, 20.0), st.floats(60.0, 60 * 3_600.0))
def test_charge_is_what_small_steps_come_to(part: Battery, hour: float, watts: float, seconds: float) -> None:
    expected = stepped(part, hour, watts, seconds)[-1]
    after = (hour + seconds / 3_600.0) % 24.0
    assert part.settle(seconds, after, watts) == pytest.approx(expected, abs=0.03)


@settings(max_examples=50, deadline=None)
@given(batteries, hours_of_day, st.floats(0.0, 20.0), st.integers(1, 12))
def test_looking_more_often_changes_nothing(part: Battery, hour: float, watts: float, looks: int) -> None:
    other = Battery(part.supply, part.wh, part.panel_watts, part.charge)
    for look in range(1, looks + 1):
        part.settle(look * 3_000.0, (hour + look * 3_000.0 / 3_600.0) % 24.0, watts)
    end = looks * 3_000.0
    assert part.charge == pytest.approx(other.settle(end, (hour + end / 3_600.0) % 24.0, watts), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(batteries, hours_of_day, st.floats(0.0, 20.0))
def test_nothing_changes_before_the_next_change_and_something_does_there(
    part: Battery, hour: float, watts: float
) -> None:
    levels = (0.0, 0.25, 0.5, 0.75)
    seconds = part.next_change(0.0, hour, watts, levels)
    assert 0.0 < seconds <= 86_400.0
    assume(seconds > 60.0)
    first, source = part.charge, part.power(hour)
    later = seconds - 30.0
    assert part.power((hour + later / 3_600.0) % 24.0) == source
    before = stepped(part, hour, watts, later)
    tolerance = 0.03
    for level in levels:
        if abs(first - level) > tolerance:
            assert all(
                (charge - level) * (first - level) > 0 or abs(charge - level) < tolerance for charge in before
            )
    part.settle(seconds, (hour + seconds / 3_600.0) % 24.0, watts)
    flipped = part.power((hour + (seconds + 1.0) / 3_600.0) % 24.0) != source
    passed = any(
        (part.charge - level) * (first - level) < 0 or abs(part.charge - level) < 3 * CHARGE_STEP
        for level in levels
    )
    never = part.supply.kind == "battery" and part.supply.plugged_from_hour == part.supply.plugged_to_hour
    assert flipped or passed or (never and seconds == 86_400.0)


def test_an_hour_that_rounding_puts_a_hair_ahead_does_not_hold_time_up() -> None:
    hour = 6.0 - 2e-15
    part = Battery(Power(kind="battery", plugged_from_hour=6.0, plugged_to_hour=6.0 + 1e-15), 20.0, 0.0, 0.5)
    assert part.settle(100 * 3_600.0, (hour + 100.0) % 24.0, 0.1) == pytest.approx(0.0)


@settings(max_examples=30, deadline=None)
@given(batteries, hours_of_day, st.floats(0.0, 20.0))
def test_following_the_changes_needs_few_steps(part: Battery, hour: float, watts: float) -> None:
    now, looks = 0.0, 0
    while now < 86_400.0 and looks < 60:
        now += part.next_change(now, (hour + now / 3_600.0) % 24.0, watts, (0.0, 0.1, 0.25, 0.5, 0.75))
        looks += 1
    assert looks < 40  # two flips and five levels, each passed at most four times


def test_a_night_on_the_charger_and_a_day_without() -> None:
    power = Power(kind="battery", charge_watts=12.0, plugged_from_hour=22.0, plugged_to_hour=6.0)
    part = Battery(power, wh=20.0, panel_watts=0.0, charge=0.5)
    assert part.settle(3_600.0, 23.0, 2.0) == pytest.approx(1.0)  # an hour at 12 - 2 W is 10 of 20 Wh
    assert part.power(23.0) == "charging"
    assert part.settle(3_600.0 * 9, 7.0, 2.0) == pytest.approx(0.9)  # full until 6, then one hour at 2 W
    assert part.power(7.0) == "battery"
    assert part.next_change(3_600.0 * 9, 7.0, 2.0, (0.5,)) == pytest.approx(4 * 3_600.0, abs=1.0)
    assert part.settle(3_600.0 * 23, 21.0, 2.0) == 0.0
    assert part.empty


@pytest.mark.parametrize(("charge", "hour", "watts", "way"), [(0.3, 12.0, 1.5, -1.0), (0.2, 23.0, 1.5, 1.0)])
def test_at_the_next_change_a_level_lies_behind(charge: float, hour: float, watts: float, way: float) -> None:
    part = Battery(Power(kind="battery"), wh=33.0, panel_watts=0.0, charge=charge)
    seconds = part.next_change(0.0, hour, watts, (0.25, 0.9))
    part.settle(seconds, hour + seconds / 3_600.0, watts)
    assert CHARGE_STEP < (part.charge - 0.25) * way < 1e-5
    part.supply = Power(kind="battery", plugged_from_hour=0.0, plugged_to_hour=24.0 if way < 0.0 else 0.0)
    assert part.next_change(seconds, 12.0, watts, (0.25,)) < 60.0  # and is found again on the way back


def test_a_day_of_sun_gives_peak_times_twenty_four_over_pi() -> None:
    part = Battery(Power(kind="solar"), wh=1_000.0, panel_watts=10.0, charge=0.0)
    part.settle(86_400.0, 0.0, 0.0)
    assert part.charge * 1_000.0 == pytest.approx(10.0 * 24.0 / math.pi)
    assert [part.power(hour) for hour in (0.0, 6.1, 12.0, 17.9)] == [
        "battery",
        "battery",
        "charging",
        "battery",
    ]


def test_mains_is_always_full_and_never_changes() -> None:
    part = Battery(Power(), 20.0, 10.0, 0.1)
    assert part.settle(1e6, 3.0, 500.0) == 1.0
    assert part.power(12.0) == "mains"
    assert part.next_change(1e6, 3.0, 500.0, (0.25,)) == math.inf
    assert not part.empty
