"""Who is in which bloc and how much work a member gets: pure functions of public facts."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.messages import Facts, Ready
from hub.scheduler import WORK_FLOOR, WORK_SECONDS, balance, form_blocs, plan_steps

BEACON = hashlib.sha256(b"beacon").digest()


def ready(name: str, stay: int = 86_400, pace: float = 0.0) -> Ready:
    return Ready(
        campaign="c1",
        device=name,
        counter=1,
        prekey=bytes(32),
        stay_seconds=stay,
        facts=Facts(seconds_per_step=pace, samples_bucket=9),
    )


def fleet(count: int, **facts: float) -> dict[str, Ready]:
    return {f"d{i:02d}": ready(f"d{i:02d}", **facts) for i in range(count)}


# ---------------------------------------------------------------- blocs
@given(count=st.integers(0, 40), size=st.integers(5, 8))
def test_every_device_is_in_one_whole_bloc_or_waits(count: int, size: int) -> None:
    blocs = form_blocs(fleet(count), size, BEACON)
    placed = [member for bloc in blocs for member in bloc]
    assert len(placed) == len(set(placed)) == count // size * size
    assert all(len(bloc) == size for bloc in blocs)


@given(order=st.permutations(sorted(fleet(12))))
def test_blocs_do_not_depend_on_who_came_first(order: list[str]) -> None:
    devices = fleet(12)
    assert form_blocs({name: devices[name] for name in order}, 5, BEACON) == form_blocs(devices, 5, BEACON)


def test_the_beacon_breaks_ties_and_nothing_else() -> None:
    assert form_blocs(fleet(16), 8, BEACON) != form_blocs(fleet(16), 8, bytes(32))
    mixed = {**fleet(8), **{f"s{i}": ready(f"s{i}", stay=60) for i in range(8)}}
    for beacon in (BEACON, bytes(32)):
        assert [set(bloc) for bloc in form_blocs(mixed, 8, beacon)] == [
            set(fleet(8)),
            {f"s{i}" for i in range(8)},
        ]


def test_a_slow_device_is_with_the_slow() -> None:
    slow = {f"s{i}": ready(f"s{i}", pace=3.0) for i in range(8)}
    fast = {f"f{i}": ready(f"f{i}", pace=0.1) for i in range(8)}
    assert [set(bloc) for bloc in form_blocs({**slow, **fast}, 8, BEACON)] == [set(fast), set(slow)]


# ---------------------------------------------------------------- work
def test_a_pace_decides_the_steps() -> None:
    assert plan_steps(ready("d", pace=0.0), 100) == 100, "not known yet"
    assert plan_steps(ready("d", pace=WORK_SECONDS / 50), 100) == 50
    assert plan_steps(ready("d", pace=1e6), 100) == math.ceil(WORK_FLOOR * 100)
    assert plan_steps(ready("d", pace=1e6), 1) == 1


@pytest.mark.parametrize("pace", [5e-324, 1e-300, 1e-9])
def test_a_pace_that_divides_to_infinity_is_a_fast_device(pace: float) -> None:
    assert plan_steps(ready("d", pace=pace), 100) == 100


@given(pace=st.floats(0, 1e6), steps=st.integers(1, 10_000))
def test_every_plan_is_between_one_step_and_all(pace: float, steps: int) -> None:
    assert 1 <= plan_steps(ready("d", pace=pace), steps) <= steps


@given(steps=st.lists(st.integers(1, 500), min_size=5, max_size=16).map(tuple))
def test_a_balanced_plan_gives_nobody_more_than_two_shares(steps: tuple[int, ...]) -> None:
    plan = balance(steps)
    assert max(plan) * len(plan) <= 2 * sum(plan)
    assert all(1 <= new <= old for new, old in zip(plan, steps, strict=True))
    if max(steps) * len(steps) <= 2 * sum(steps):
        assert plan == steps
