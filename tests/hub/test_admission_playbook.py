"""Which bloc opens when, with the shipped agents: gate, rest, quota, room, windows, newcomers, starvation."""

from collections import Counter
from itertools import pairwise

import msgspec
import pytest
from playbook import NOW, Fleet, campaign, kind_of

from fedge import topics
from fedge.formation import beacon_commitment, check_card
from fedge.messages import Announcement, BlocCard, Open, Ready, decode, decode_envelope
from hub import effects as hub_effects
from hub.effects import BlocRow, CampaignRow, DeviceRow, RoundRow
from hub.scheduler import LIVE_SECONDS, STARVE_AFTER_SECONDS, Work
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


# ---------------------------------------------------------------- formation
def test_the_announcement_commits_to_the_beacons_and_cards_follow_from_it() -> None:
    fleet = Fleet(10)
    fleet.begin(campaign(10, bloc=5))
    announcement = decode(decode_envelope(fleet.retained[topics.announcement("c1")]).body, Announcement)
    assert announcement.beacon == beacon_commitment(fleet.campaign.beacon_secret)
    assert fleet.campaign.beacon_secret not in announcement.beacon
    fleet.settle()
    for row in blocs(fleet):
        card = decode(decode_envelope(row.card).body, BlocCard)
        readys = []
        for envelope in card.roster:
            opened = fleet.hub.verifier.open(envelope, Ready, role="device", now=fleet.now)
            readys.append((opened.message, opened.digest))
        check_card(card, readys, announcement.beacon, fleet.campaign.adapter.size)
    formed = fleet.kinds("formed")
    assert {entry.detail["root"] for entry in formed} == {card.root.hex()}
    assert [entry.detail["members"] for entry in formed] == [",".join(row.members) for row in blocs(fleet)]
    assert {
        (entry.detail["blocs"], entry.detail["devices"], entry.detail["formation"]) for entry in formed
    } == {(2, 10, 1)}


def test_newcomers_become_blocs_of_newcomers_and_a_tail_waits() -> None:
    fleet = Fleet(13)
    late = [f"d{number:02d}" for number in range(6, 13)]
    quiet = set(late)
    fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) in quiet else [payload]
    fleet.begin(campaign(6, bloc=5, rounds=40, form_seconds=1_800.0, rest_seconds=600.0))
    fleet.run()
    assert len(blocs(fleet)) == 1
    assert sum(one.why == "unassigned" for one in standing(fleet.hub, fleet.now).devices) == 1
    quiet.clear()
    for name in late:
        fleet.boot(name)
    fleet.run()
    assert len(blocs(fleet)) == 1, "not before half an hour is over"
    fleet.wait(1_900)
    first, second = blocs(fleet)
    assert (first.formation, second.formation) == (1, 2)
    assert not set(first.members) & set(second.members)
    cards = [decode(decode_envelope(row.card).body, BlocCard) for row in (first, second)]
    assert cards[0].beacon != cards[1].beacon
    assert not [refusal for device in fleet.devices.values() for refusal in device.refusals]
    assert any(entry.bloc == second.id for entry in fleet.kinds("opened"))
    fleet.wait(3_700)
    assert len(blocs(fleet)) == 2, "three are left, and fill no bloc"
    fleet.check()


def test_a_restarted_hub_forms_nobody_twice() -> None:
    fleet = Fleet(12)
    fleet.begin(campaign(10, bloc=5, rounds=30, rest_seconds=60.0, form_seconds=60.0))
    fleet.run()
    before = blocs(fleet)
    for _ in range(3):
        fleet.start_hub()
        fleet.run()
        fleet.wait(300)
    assert [row.members for row in blocs(fleet)] == [row.members for row in before]
    assert fleet.campaign.formations == 1
    fleet.check()


# ---------------------------------------------------------------- starvation
def test_a_campaign_in_which_too_few_blocs_live_stops_and_goes_on() -> None:
    """One of five blocs is whole. After two hours it is the whole of what would be learned, so it has to wait."""
    fleet = Fleet(25)
    fleet.begin(campaign(25, bloc=5, rounds=500, rest_seconds=600.0))
    while not blocs(fleet):
        fleet.step()
    away = [row.members[0] for row in blocs(fleet)[1:]]
    fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) in away else [payload]
    fleet.wait(STARVE_AFTER_SECONDS + 60, step=60)
    assert fleet.campaign.starving
    assert fleet.kinds("starving")[0].detail == {"live": 1, "unfinished": 5}
    assert any("starves" in tell.text for tell in fleet.hub_told)
    assert "starving" in states(fleet).values()
    opened = len(fleet.kinds("open"))
    fleet.start_hub()
    fleet.wait(LIVE_SECONDS, step=60)
    assert len(fleet.kinds("open")) == opened, "also after a restart"
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(400)
    assert not fleet.campaign.starving
    assert [entry.kind for entry in fleet.ledger if entry.kind in ("starving", "fed")] == ["starving", "fed"]
    assert len(fleet.kinds("open")) > opened
    assert all(len(row.members) == 5 for row in blocs(fleet)), "a bloc is never made smaller"


# ---------------------------------------------------------------- the end
def test_a_campaign_ends_when_its_time_is_up_and_open_rounds_end_first() -> None:
    fleet = one_bloc(seconds_max=3_000.0, rest_seconds=300.0)
    fleet.run()
    fleet.wait(2_690)
    held(fleet, "d01")
    fleet.wait(400)
    assert not fleet.campaign.closed, "a round is open"
    opened = len(fleet.kinds("open"))
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    assert fleet.campaign.closed
    assert len(fleet.kinds("open")) == opened
    assert fleet.kinds("closed")[0].at - NOW >= 3_000


def test_time_that_is_up_before_blocs_were_formed_closes_too() -> None:
    fleet = Fleet(5)
    fleet.begin(campaign(6, bloc=5, seconds_max=600.0))
    fleet.wait(700)
    assert fleet.campaign.closed
    assert {why(fleet, name) for name in fleet.devices} == {"campaign closed"}


# ---------------------------------------------------------------- announcements and pace
def announcements(fleet: Fleet) -> list[int]:
    """Counts what is announced from here on, by its sequence."""
    seen: list[int] = []
    publish = fleet.publish

    def count(sender: str, topic: str, payload: bytes, retain: bool) -> None:
        if topic == topics.announcement("c1"):
            seen.append(decode(decode_envelope(payload).body, Announcement).sequence)
        publish(sender, topic, payload, retain)

    fleet.publish = count
    return seen


def test_versions_are_announced_at_most_once_an_hour() -> None:
    fleet = Fleet(5)
    seen = announcements(fleet)
    fleet.begin(campaign(5, bloc=5, rounds=15, rest_seconds=300.0))
    fleet.run()
    fleet.wait(3_500)
    assert len(seen) == 1
    assert fleet.campaign.adapter_version > 10
    fleet.wait(400)
    assert len(seen) == 2
    assert seen == sorted(set(seen))
    fleet.settle()
    assert len(seen) <= 4


def test_more_devices_are_told_to_say_ready_less_often() -> None:
    fleet = Fleet(5)
    fleet.hub.here = 400
    seen = announcements(fleet)
    fleet.begin(campaign(5, bloc=5, rounds=50, rest_seconds=600.0))
    assert fleet.campaign.checkin_seconds == 120
    fleet.hub.here = 1_500
    fleet.hub_event(hub_effects.TimerFired("tick"))
    assert fleet.campaign.checkin_seconds == 480
    fleet.start_hub()
    assert fleet.campaign.checkin_seconds == 480, "devices keep the pace that they were told"
    assert len(seen) == 3


def test_the_fast_path_believes_only_the_very_bytes_that_were_verified() -> None:
    fleet = formed_and_held(5, rest_seconds=3_600.0)
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.wait(60)
    contact = fleet.hub.contacts["d00"]
    fleet.now += 50
    again = hub_effects.Received(topics.control("d00"), contact.envelope)
    assert fleet.hub.handle(fleet.now, again) == []
    assert contact.heard_at == fleet.now
    forged = hub_effects.Received(topics.control("d00"), contact.envelope[:-1] + b"\0")
    fleet.hub_event(forged)
    assert fleet.hub_told[-1].refusal == "bad-signature"


def test_a_row_without_the_new_fields_still_reads() -> None:
    """A database of the version before has campaigns without knobs: they run as they did."""
    old = {
        name: value
        for name, value in msgspec.to_builtins(campaign(5, bloc=5)).items()
        if name in CampaignRow.__struct_fields__[: CampaignRow.__struct_fields__.index("closed") + 1]
    }
    row = msgspec.convert(old, CampaignRow)
    assert (row.training_devices_max, row.rest_seconds, row.quota, row.server_rate) == (0, 0.0, 0.0, 1.0)
