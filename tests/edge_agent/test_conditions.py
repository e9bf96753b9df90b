"""What a board may do and how long it stays: one reading at a time."""

from __future__ import annotations

import gc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.conditions import STAY_SECONDS_MAX, STAY_STEPS, Reading, judge
from edge_agent.effects import Conditions
from edge_agent.policy import Policy
from fedge.messages import Facts

NOON = 12.0
MIDNIGHT_UTC = 1_800_000_000.0 // 86_400 * 86_400
FACTS = Facts(board="Pi 5", samples_bucket=9, aes=False, version="0.4")
WELL = Reading(free_memory_mb=1_000, up_seconds=100_000.0, share_on=0.99, upload_kbit=3_000.0)


def now(
    policy: Policy | None = None, hour: float = NOON, facts: Facts = FACTS, **reading: object
) -> Conditions:
    return judge(
        policy or Policy(),
        msgspec.structs.replace(WELL, **reading),
        facts,
        MIDNIGHT_UTC + 7_200,
        local_hour=hour,
    )


# ---------------------------------------------------------------- what may be known
def test_facts_are_buckets_and_what_no_reading_tells_is_kept() -> None:
    said = now(power="battery", charge=0.6, hot=True)
    assert said.facts == msgspec.structs.replace(
        FACTS,
        memory_mb_step=768,
        power="battery",
        charge_quarter=2,
        hot=True,
        link_bucket=12,  # 2,048 to 4,095 kbit/s
        history_bucket=4,
    )


@pytest.mark.parametrize(
    ("share", "bucket"), [(0.0, 0), (0.49, 0), (0.5, 1), (0.71, 2), (0.9, 3), (0.95, 4), (1.0, 4)]
)
def test_history_in_five_buckets(share: float, bucket: int) -> None:
    assert now(share_on=share).facts.history_bucket == bucket


def test_an_unknown_upload_rate_leaves_what_was_known() -> None:
    facts = msgspec.structs.replace(FACTS, link_bucket=7)
    assert now(facts=facts, upload_kbit=0.0).facts.link_bucket == 7
    assert now(upload_kbit=0.4).facts.link_bucket == 1


def test_the_same_reading_gives_the_same_object() -> None:
    facts = now().facts
    assert now(facts=facts).facts is facts


@pytest.mark.parametrize(
    ("field", "edge", "wavers"),
    [("free_memory_mb", 1_024, 30), ("charge", 0.5, 0.03), ("upload_kbit", 4_096.0, 400.0)],
)
def test_a_reading_that_wavers_around_an_edge_says_nothing_new(
    field: str, edge: float, wavers: float
) -> None:
    power = {"power": "battery"} if field == "charge" else {}
    facts = now(**{field: edge + wavers}, **power).facts
    for reading in (edge - wavers, edge + wavers, edge - wavers):
        assert now(facts=facts, **{field: reading}, **power).facts is facts
    assert now(facts=facts, **{field: edge / 2}, **power).facts != facts


# ---------------------------------------------------------------- what the owner allows
@pytest.mark.parametrize(
    ("policy", "reading", "word"),
    [
        (Policy(), {"power": "battery", "charge": 0.2}, "battery"),
        (Policy(battery_min=0.9), {"power": "battery", "charge": 0.8}, "battery"),
        (Policy(), {"metered": True}, "metered"),
        (Policy(celsius_max=60), {"celsius": 61.0}, "60 °C"),
        (Policy(hours="22:00-06:00"), {}, "22:00-06:00"),
    ],
)
def test_what_is_not_allowed_has_a_reason_for_the_owner(
    policy: Policy, reading: dict[str, object], word: str
) -> None:
    said = now(policy, **reading)
    assert (said.allowed, said.stay_seconds) == (False, 0)
    assert word in said.reason


@pytest.mark.parametrize(
    ("policy", "reading"),
    [
        (Policy(), {"power": "charging", "charge": 0.05}),
        (Policy(), {"power": "battery", "charge": 0.26}),
        (Policy(metered=True), {"metered": True}),
        (Policy(), {"celsius": 99.0, "hot": True}),
        (Policy(celsius_max=60), {"celsius": 60.0}),
    ],
)
def test_what_is_allowed_has_none(policy: Policy, reading: dict[str, object]) -> None:
    said = now(policy, **reading)
    assert said.allowed
    assert said.stay_seconds > 0
    assert said.reason == ""


@pytest.mark.parametrize(
    ("hours", "hour", "allowed"),
    [
        ("22:00-06:00", 22.0, True),
        ("22:00-06:00", 3.5, True),
        ("22:00-06:00", 6.0, False),
        ("22:00-06:00", 21.99, False),
        ("09:30-17:00", 9.49, False),
        ("09:30-17:00", 9.5, True),
        ("09:30-17:00", 17.0, False),
        ("08:00-08:00", 3.0, True),
        ("", 3.0, True),
    ],
)
def test_the_owners_hours(hours: str, hour: float, allowed: bool) -> None:
    assert now(Policy(hours=hours), hour).allowed == allowed


def test_a_board_that_was_too_warm_must_cool_down_by_five_kelvin() -> None:
    policy = Policy(celsius_max=60)
    facts = now(policy, celsius=61.0).facts
    assert facts.hot
    assert not now(policy, facts=facts, celsius=57.0).allowed
    cool = now(policy, facts=facts, celsius=54.9)
    assert cool.allowed
    assert not cool.facts.hot
    assert now(policy, facts=cool.facts, celsius=57.0).allowed


def test_the_day_has_its_bytes_and_the_life_its_rounds() -> None:
    policy = Policy(bytes_per_day_max=1_000, rounds_max=3)

    def at(bytes_today: int, rounds_spent: int) -> Conditions:
        return judge(
            policy,
            WELL,
            FACTS,
            MIDNIGHT_UTC + 7_200,
            bytes_today=bytes_today,
            rounds_spent=rounds_spent,
            local_hour=NOON,
        )

    assert at(999, 2).allowed
    assert "again in 22 h" in at(1_000, 2).reason
    spent = at(0, 3)
    assert not spent.allowed
    assert not spent.facts.rounds_left
    assert at(0, 2).facts.rounds_left


# ---------------------------------------------------------------- how long it stays
@pytest.mark.parametrize(
    ("reading", "stay"),
    [
        ({"up_seconds": 10.0, "share_on": 0.0}, 600),
        ({"up_seconds": 4_000.0, "share_on": 0.0}, 3_600),
        ({"up_seconds": 10.0, "share_on": 0.9}, 14_400),
        ({"up_seconds": 10.0, "share_on": 0.99}, 86_400),
        ({"up_seconds": 1e9}, 86_400),
        ({"power": "battery", "charge": 0.50}, 3_600),
        ({"power": "battery", "charge": 0.26}, 60),
        ({"power": "battery", "charge": 0.253}, 0),
    ],
)
def test_the_expected_stay(reading: dict[str, object], stay: int) -> None:
    assert now(**reading).stay_seconds == stay


def test_nobody_stays_beyond_the_owners_hours() -> None:
    policy = Policy(hours="22:00-06:00")
    assert now(policy, 22.0).stay_seconds == 14_400
    assert now(policy, 5.5).stay_seconds == 1_200
    assert now(policy, 5.999).stay_seconds == 0
    assert now(Policy(hours="08:00-08:00"), 7.9).stay_seconds == STAY_SECONDS_MAX


# ---------------------------------------------------------------- whatever is read
@settings(deadline=None)
@given(
    st.sampled_from(["mains", "charging", "battery"]),
    st.floats(0, 1),
    st.floats(0, 200),
    st.integers(0, 2**40),
    st.floats(0, 1e10),
    st.floats(0, 1),
    st.floats(0, 1e12),
    st.floats(0, 24, exclude_max=True),
)
def test_any_reading_gives_facts_that_may_be_said(
    power: str, charge: float, celsius: float, memory: int, up: float, share: float, kbit: float, hour: float
) -> None:
    reading = Reading(power, charge, celsius, False, False, memory, up, share, kbit)
    policy = Policy(hours="22:00-06:00", celsius_max=80)
    said = judge(policy, reading, FACTS, MIDNIGHT_UTC, local_hour=hour)
    assert said.stay_seconds in (0, *STAY_STEPS)
    assert said.allowed == (said.reason == "")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said.facts), type=Facts) == said.facts
    again = judge(policy, reading, said.facts, MIDNIGHT_UTC, local_hour=hour)
    assert again.facts is said.facts, "judged again, nothing has changed"


def test_conditions_are_no_work_for_the_garbage_collector() -> None:
    assert not gc.is_tracked(now())
