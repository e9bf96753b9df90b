"""Which bloc opens when, with the shipped agents: gate, rest, quota, room, windows, newcomers, starvation."""

from collections import Counter
from itertools import pairwise

import msgspec
import pytest
from playbook import Fleet, campaign, kind_of

from fedge import topics
from fedge.messages import Open, Ready, decode, decode_envelope
from hub.effects import BlocRow, DeviceRow, RoundRow
from hub.scheduler import Work
from hub.standing import standing


def blocs(fleet: Fleet) -> list[BlocRow]:
    return [row for row in fleet.rows.values() if isinstance(row, BlocRow)]


def states(fleet: Fleet) -> dict[str, str]:
    return {one.id: one.state for one in standing(fleet.hub, fleet.now).blocs}


def why(fleet: Fleet, name: str) -> str:
    return next(one.why for one in standing(fleet.hub, fleet.now).devices if one.id == name)


def one_bloc(**knobs: float) -> Fleet:
    """Five devices that wait for their first round: their READYs are on the way."""
    fleet = Fleet(5)
    fleet.begin(campaign(5, bloc=5, **{"rounds": 100, **knobs}))
    return fleet


def held(fleet: Fleet, name: str) -> None:
    """From now on nothing reaches this device's chunks topic: it trains for ever."""
    fleet.filter = lambda to, topic, payload: [] if topic == topics.chunks(name) else [payload]


def formed_and_held(devices: int, **knobs: float) -> Fleet:
    """All blocs formed, and every OPEN that the hub says is lost until the test lets them through."""
    fleet = Fleet(devices)
    fleet.filter = lambda to, topic, payload: [] if kind_of(payload) in ("open", "result") else [payload]
    fleet.begin(campaign(devices, bloc=5, **{"rounds": 100, **knobs}))
    fleet.run()
    return fleet


# ---------------------------------------------------------------- the gate
def test_nothing_opens_until_the_last_member_may_work() -> None:
    fleet = one_bloc(rounds=2, rest_seconds=60.0)
    fleet.run()
    fleet.conditions("d02", 0)
    fleet.run()
    opened = len(fleet.kinds("opened"))
    assert why(fleet, "d02") == "not now"
    assert {why(fleet, name) for name in fleet.devices if name != "d02"} == {"waiting for d02"}
    fleet.wait(600)
    assert len(fleet.kinds("opened")) == opened, "four wait for one"
    fleet.conditions("d02", 86_400)
    fleet.settle()
    fleet.check()
    assert fleet.campaign.closed


@pytest.mark.parametrize(("stay", "opens"), [(375, False), (376, True)])
def test_a_member_must_expect_to_stay_a_quarter_longer_than_its_work(stay: int, opens: bool) -> None:
    """5 steps of 60 s are 300 s of work: the hub plans 2 of them, 120 s, or all within 300 s."""
    fleet = one_bloc(work_seconds=300.0, rounds=1)
    for device in fleet.devices.values():
        device.saved = msgspec.structs.replace(device.saved, seconds_per_step=60.0)
    for name in fleet.devices:
        fleet.boot(name)
        fleet.conditions(name, stay if name == "d03" else 86_400)
    fleet.queue = type(fleet.queue)(
        entry for entry in fleet.queue if not (kind_of(entry[2]) == "ready" and fresh(entry[2]) < 2)
    )
    fleet.run()
    assert bool(fleet.kinds("open")) is opens
    if not opens:
        assert why(fleet, "d03") == "short stay"


def fresh(payload: bytes) -> int:
    return decode(decode_envelope(payload).body, Ready).counter


def test_a_device_that_is_away_does_not_count_and_one_that_returns_does() -> None:
    fleet = formed_and_held(5, rest_seconds=300.0)
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(60)
    assert states(fleet) == {"bloc-0": "resting"}
    fleet.presence("d04", False)
    assert why(fleet, "d04") == "absent"
    fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) == "d04" else [payload]
    fleet.wait(600)
    assert states(fleet) == {"bloc-0": "waiting for d04"}
    assert len(fleet.kinds("open")) == 1
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.presence("d04", True)
    fleet.run()
    assert len(fleet.kinds("open")) == 2, "its READY is still good"


def test_an_older_process_last_will_does_not_send_a_device_away() -> None:
    fleet = formed_and_held(5, rest_seconds=300.0)
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(60)
    fleet.presence("d04", True)
    fleet.devices["d04"].saved = msgspec.structs.replace(fleet.devices["d04"].saved, boot=0)
    fleet.presence("d04", False)
    assert fleet.hub.contacts["d04"].here


def test_a_silent_device_is_away_after_three_check_ins() -> None:
    fleet = formed_and_held(5, rest_seconds=3_600.0)
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(60)
    fleet.filter = lambda to, topic, payload: [] if topic == topics.control("d01") else [payload]
    fleet.wait(100)
    assert fleet.hub.contacts["d01"].here
    fleet.wait(200)
    assert why(fleet, "d01") == "absent"
    assert all(fleet.hub.contacts[name].here for name in fleet.devices if name != "d01")
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(100)
    assert why(fleet, "d01") == "resting"


# ---------------------------------------------------------------- rest, quota, room
def test_a_bloc_rests_between_rounds() -> None:
    fleet = one_bloc(rest_seconds=300.0, rounds=3)
    fleet.run()
    assert len(fleet.kinds("opened")) == 1
    assert why(fleet, "d00") == "resting"
    fleet.wait(270)
    assert len(fleet.kinds("opened")) == 1
    fleet.wait(60)
    assert len(fleet.kinds("opened")) == 2
    fleet.settle()
    fleet.check()
    opened = [entry.at for entry in fleet.kinds("open")]
    assert all(later - earlier >= 300 for earlier, later in pairwise(opened))


def test_a_quota_stops_the_bloc_that_runs_ahead_until_the_others_follow() -> None:
    fleet = Fleet(10)
    fleet.begin(campaign(10, bloc=5, rounds=12, quota=1.0))
    while not blocs(fleet):
        fleet.step()
    slow = blocs(fleet)[0]
    absent = slow.members[0]
    fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) == absent else [payload]
    fleet.run()
    ahead = Counter(entry.bloc for entry in fleet.kinds("opened"))
    assert set(ahead) == {"bloc-1"}
    assert ahead["bloc-1"] == 5, "opened <= 1.0 * mean + 2: with 0 and 4 the mean is 2, and 4 <= 4"
    assert states(fleet)["bloc-1"] == "quota"
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    assert Counter(entry.bloc for entry in fleet.kinds("opened")) == {"bloc-0": 12, "bloc-1": 12}


def test_no_bloc_opens_while_enough_devices_train_and_the_longest_unserved_is_next() -> None:
    fleet = Fleet(20)
    fleet.begin(campaign(20, bloc=5, rounds=3, training_devices_max=5))
    most = 0

    def count(to: str, topic: str, payload: bytes) -> list[bytes]:
        nonlocal most
        most = max(most, sum(state.open for state in fleet.hub.rounds.values()))
        fleet.now += 0.01  # or all rounds would end at one moment
        return [payload]

    fleet.filter = count
    fleet.settle()
    fleet.check()
    turns = [entry.bloc for entry in fleet.kinds("open")]
    assert len(turns) == 12
    for start in (0, 4, 8):
        assert turns[start : start + 4] == turns[:4], "each has its turn before any has a second one"
    assert most <= 2, "a bloc whose reports are in makes room while its sum is opened"
    assert fleet.hub.campaigns["c1"].training == 0


def test_ties_between_blocs_follow_from_the_beacon_alone() -> None:
    """The same fleet under another beacon has another order; under the same one, whoever speaks first, the same."""

    def turns(seed: int, secret: bytes) -> list[str]:
        fleet = Fleet(20, seed=seed)
        fleet.begin(campaign(20, bloc=5, rounds=1, training_devices_max=5, beacon_secret=secret))
        fleet.settle()
        return [entry.bloc for entry in fleet.kinds("open")]

    orders = {tuple(turns(seed, b"\1" * 32)) for seed in range(4)}
    assert len(orders) == 1
    assert {tuple(turns(0, bytes([secret]) * 32)) for secret in range(1, 6)} != orders


def test_a_member_that_stays_away_makes_room_for_another_bloc() -> None:
    fleet = formed_and_held(10, training_devices_max=5)
    fleet.filter = lambda to, topic, payload: [] if kind_of(payload) == "open" else [payload]
    assert len(fleet.kinds("open")) == 1
    first = next(row for row in fleet.rows.values() if isinstance(row, RoundRow))
    member = next(row for row in blocs(fleet) if row.id == first.bloc).members[0]
    fleet.presence(member, False)
    fleet.wait(290)
    fleet.presence(member, True)
    fleet.wait(60)
    assert len(fleet.kinds("open")) == 1, "a link that was down for five minutes changes nothing"
    fleet.presence(member, False)
    fleet.filter = lambda to, topic, payload: (
        [] if kind_of(payload) == "open" or topics.device_of(topic) == member else [payload]
    )
    fleet.wait(330)
    assert len(fleet.kinds("open")) == 2
    assert fleet.hub.campaigns["c1"].training == 9
    fleet.presence(member, True)
    assert fleet.hub.campaigns["c1"].training == 10


# ---------------------------------------------------------------- work
def test_plans_follow_pace_and_depth_and_idle_nobody() -> None:
    fleet = Fleet(5)
    paces = dict(zip(fleet.devices, (0.0, 1.0, 30.0, 60.0, 700.0), strict=True))
    for name, pace in paces.items():
        fleet.devices[name].saved = msgspec.structs.replace(fleet.devices[name].saved, seconds_per_step=pace)
    fleet.begin(campaign(5, bloc=5, rounds=1, layers=24))
    fleet.run()
    row = next(row for row in fleet.rows.values() if isinstance(row, RoundRow))
    opening = decode(decode_envelope(row.envelope).body, Open)
    by_name = dict(zip(blocs(fleet)[0].members, zip(opening.steps, opening.depths, strict=True), strict=True))
    assert [Work(*by_name[name]) for name in fleet.devices] == [
        Work(5, 24),
        Work(5, 24),
        Work(4, 24),
        Work(2, 24),
        Work(1, 6),
    ]
    fleet.settle()
    fleet.check()


# ---------------------------------------------------------------- windows
def test_who_missed_a_window_is_remembered_and_its_bloc_tries_again() -> None:
    fleet = one_bloc(rounds=1)
    held(fleet, "d03")
    fleet.run()
    fleet.wait(3_700)
    assert fleet.kinds("sat-out")[0].detail == {"reason": "window-over"}
    row = fleet.rows[DeviceRow, ("", "d03")]
    assert row.failed == 1
    assert all(fleet.rows[DeviceRow, ("", name)].failed == 0 for name in fleet.devices if name != "d03")
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    campaign_row = fleet.campaign
    assert (campaign_row.reports_opened, campaign_row.reports_spoiled) == (5, 4)
    assert standing(fleet.hub, fleet.now).campaigns[0].yielded == pytest.approx(5 / 9)


def test_a_bloc_whose_rounds_come_to_nothing_is_tried_ever_more_seldom() -> None:
    fleet = one_bloc(window_seconds=60)
    held(fleet, "d02")
    fleet.run()
    for _ in range(24 * 60):
        fleet.wait(60)
    assert 24 <= len(fleet.kinds("open")) <= 40, "an hour apart in the end, not a minute"
    assert fleet.kinds("opened") == []


def test_an_open_is_repeated_ever_more_seldom_and_only_to_who_is_there() -> None:
    fleet = formed_and_held(5)
    said: Counter[str] = Counter()

    def count(to: str, topic: str, payload: bytes) -> list[bytes]:
        said[to] += kind_of(payload) == "open"
        return [] if kind_of(payload) in ("open", "ready") else [payload]

    fleet.filter = count
    fleet.presence("d02", False)
    fleet.wait(3_500)
    assert said["d00"] == 5, "after 1, 3, 7, 15, 31 minutes"
    assert said["d02"] == 0
    fleet.presence("d02", True)
    fleet.run()
    assert said["d02"] == 1
