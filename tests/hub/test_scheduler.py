"""How much work, who may, in which order: pure functions of public facts."""

import hashlib
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.limits import PLAN_SHARE_MAX
from fedge.messages import Facts, Ready
from hub import scheduler
from hub.scheduler import WORK_FLOOR, Work, balance, plan_work, planned_seconds, why_not

BEACON = hashlib.sha256(b"beacon").digest()


def ready(pace: float = 0.0, *, stay: int = 86_400, samples: int = 9, **facts: object) -> Ready:
    return Ready(
        campaign="c1",
        device="d00",
        counter=1,
        prekey=bytes(32),
        stay_seconds=stay,
        facts=Facts(seconds_per_step=pace, samples_bucket=samples, **facts),
    )


def plan(one: Ready, steps: int = 100, layers: int = 0, adapter_bytes: int = 0, seconds: float = 120) -> Work:
    return plan_work(one, steps=steps, work_seconds=seconds, layers=layers, adapter_bytes=adapter_bytes)


# ---------------------------------------------------------------- how much work
def test_a_pace_decides_the_steps() -> None:
    assert plan(ready(0.0)) == Work(100), "not known yet"
    assert plan(ready(120 / 50)) == Work(50)
    assert plan(ready(1e6)) == Work(math.ceil(WORK_FLOOR * 100))
    assert plan(ready(1e6), steps=1) == Work(1)


@pytest.mark.parametrize("pace", [5e-324, 1e-300, 1e-9])
def test_a_pace_that_divides_to_infinity_is_a_fast_device(pace: float) -> None:
    assert plan(ready(pace)) == Work(100)


def test_a_slow_link_leaves_less_time_for_work() -> None:
    """Bucket 10 is about 724 kbit/s: 4 MB both ways take 88 s of the 120."""
    assert plan(ready(1.0)) == Work(100)
    assert plan(ready(1.0, link_bucket=10), adapter_bytes=4_000_000) == Work(31)
    assert plan(ready(1.0, link_bucket=1), adapter_bytes=4_000_000) == Work(15), "never below the floor"


def test_where_the_floor_takes_too_long_fewer_layers_are_adapted() -> None:
    """15 steps of 12 s are 180 s; at half the layers 15 x 12 x (1/3 + 1/3) = 120."""
    assert plan(ready(8.0), layers=24) == Work(15)
    assert plan(ready(12.0), layers=24) == Work(15, 12)
    assert plan(ready(12.0), layers=0) == Work(15), "the number of layers is not known"
    assert plan(ready(99.0), layers=24) == Work(15, 6), "a quarter at least"
    assert plan(ready(99.0), layers=1) == Work(15)
    assert planned_seconds(ready(12.0), Work(15, 12), layers=24, adapter_bytes=0) == pytest.approx(120)


paces = st.floats(0, 1e6)


@given(pace=paces, steps=st.integers(1, 10_000), layers=st.integers(0, 80), link=st.integers(0, 32))
def test_every_plan_is_between_the_floor_and_all(pace: float, steps: int, layers: int, link: int) -> None:
    one = ready(pace, link_bucket=link)
    work = plan(one, steps=steps, layers=layers, adapter_bytes=10_000)
    assert max(1, math.ceil(WORK_FLOOR * steps)) <= work.steps <= steps
    assert 0 <= work.depth < max(layers, 1)
    assert not work.depth or work.depth >= layers * scheduler.DEPTH_FLOOR
    seconds = planned_seconds(one, work, layers=layers, adapter_bytes=10_000)
    assert seconds <= planned_seconds(one, Work(steps), layers=layers, adapter_bytes=10_000) + 1e-6


works = st.lists(st.builds(Work, st.integers(1, 10_000), st.integers(0, 23)), min_size=5, max_size=16)


@given(wanted=works)
def test_a_balanced_plan_gives_nobody_more_than_two_shares(wanted: list[Work]) -> None:
    got = balance(wanted, 24)
    steps = [work.steps for work in got]
    depths = [work.depth or 24 for work in got]
    both = [a * b for a, b in zip(steps, depths, strict=True)]
    for values in (steps, depths, both):
        assert max(values) * len(values) <= PLAN_SHARE_MAX * sum(values)
    for new, old in zip(got, wanted, strict=True):
        assert 1 <= new.steps <= old.steps
        assert 1 <= (new.depth or 24) <= (old.depth or 24)


@given(steps=st.lists(st.integers(1, 500), min_size=5, max_size=16))
def test_a_fair_plan_stays_and_an_unfair_one_is_cut_no_more_than_it_must(steps: list[int]) -> None:
    got = [work.steps for work in balance([Work(count) for count in steps], 0)]
    cap = max(got)
    assert got == [min(count, cap) for count in steps]
    if max(steps) > cap:
        total = sum(min(count, cap + 1) for count in steps)
        assert (cap + 1) * len(steps) > PLAN_SHARE_MAX * total


# ---------------------------------------------------------------- who may
def test_a_stay_must_be_longer_than_the_work() -> None:
    assert why_not(ready(stay=150), 120) == "short stay"
    assert why_not(ready(stay=151), 120) == ""
    assert why_not(ready(stay=1), 0) == ""


def test_the_facts_say_why_not() -> None:
    assert why_not(ready(samples=0), 0) == "no data"
    assert why_not(ready(rounds_left=False), 0) == "rounds spent"
    assert why_not(ready(stay=0), 0) == "not now"
    assert why_not(ready(stay=0, hot=True, metered=True), 0) == "hot"
    assert why_not(ready(stay=0, power="battery", charge_quarter=1), 0) == "low battery"
    assert why_not(ready(stay=0, metered=True), 0) == "metered"
    assert why_not(ready(metered=True, hot=True, power="battery", charge_quarter=0), 0) == "", (
        "what the owner allows, the hub does not forbid"
    )


def test_the_quota_bounds_how_far_a_bloc_runs_ahead() -> None:
    assert scheduler.within_quota(999, 0.0, 0.0)
    assert scheduler.within_quota(2, 0.0, 2.5)
    assert not scheduler.within_quota(3, 0.0, 2.5)


@given(opened=st.integers(0, 1_000), mean=st.floats(0, 1_000), quota=st.floats(0.5, 10))
def test_a_bloc_is_freed_when_the_mean_has_grown_enough(opened: int, mean: float, quota: float) -> None:
    frees = scheduler.quota_mean(opened, quota)
    if mean >= frees + 1e-6:
        assert scheduler.within_quota(opened, mean, quota)
    elif mean <= frees - 1e-6:
        assert not scheduler.within_quota(opened, mean, quota)


# ---------------------------------------------------------------- in which order
def test_the_order_is_of_public_facts_and_a_beacon_that_was_fixed_before() -> None:
    """Longest unserved first; ties by a hash that nobody chooses, and that any name may win."""
    first = itertools.groupby(
        sorted(range(100), key=lambda n: scheduler.order(n // 50, scheduler.place(BEACON, f"bloc-{n}"))),
        key=lambda n: n // 50,
    )
    assert [key for key, _ in first] == [0, 1]
    winners = {
        min(range(8), key=lambda n: scheduler.place(hashlib.sha256(b"%d" % seed).digest(), f"bloc-{n}"))
        for seed in range(100)
    }
    assert winners == set(range(8))


def test_room_is_for_whole_blocs_and_never_none() -> None:
    assert scheduler.has_room(10**6, 0), "no bound"
    assert scheduler.has_room(31, 32)
    assert not scheduler.has_room(32, 32)
    assert scheduler.side_by_side(75, 0, 8) == 75
    assert scheduler.side_by_side(75, 32, 8) == 4
    assert scheduler.side_by_side(3, 32, 8) == 3
    assert scheduler.side_by_side(75, 5, 8) == 1
    assert scheduler.side_by_side(0, 0, 8) == 1


def test_a_quarter_of_the_blocs_must_be_live() -> None:
    assert scheduler.is_starving(0, 1)
    assert scheduler.is_starving(24, 100)
    assert not scheduler.is_starving(25, 100)
    assert not scheduler.is_starving(0, 0), "all have finished"


# ---------------------------------------------------------------- pace steering
@given(devices=st.integers(0, 10**7))
def test_check_ins_stay_few(devices: int) -> None:
    """One a second while devices are asked every minutes; never above 200, however many they are."""
    seconds = scheduler.checkin_seconds(devices, 60)
    assert (seconds // 60).bit_count() == 1
    assert devices / seconds <= scheduler.CHECKINS_PER_SECOND_MAX
    if seconds < scheduler.CHECKIN_SECONDS_CALM:
        assert devices / seconds <= scheduler.CHECKINS_PER_SECOND
    if seconds > scheduler.CHECKIN_SECONDS_CALM:
        assert devices / (seconds // 2) > scheduler.CHECKINS_PER_SECOND_MAX


def test_the_pace_does_not_flap() -> None:
    assert scheduler.checkin_seconds(60, 60) == 60
    assert scheduler.checkin_seconds(61, 60) == 120
    assert scheduler.checkin_seconds(58, 120) == 120, "a few left"
    assert scheduler.checkin_seconds(42, 120) == 60
    assert scheduler.checkin_seconds(100_000, 60) == 960
    assert scheduler.checkin_seconds(200_000, 60) == 1_920
