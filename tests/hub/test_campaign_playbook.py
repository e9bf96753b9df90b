"""A campaign from its first formation to its end, with the shipped agents: newcomers, hunger, time, announcements."""

import msgspec
from playbook import NOW, Fleet, campaign

from fedge import topics
from fedge.formation import beacon_commitment, check_card
from fedge.messages import Announcement, BlocCard, Ready, decode, decode_envelope
from hub import effects as hub_effects
from hub.effects import BlocRow, CampaignRow
from hub.scheduler import LIVE_SECONDS, STARVE_AFTER_SECONDS
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
    fleet.filter = lambda to, topic, payload: [] if topic == topics.chunks("d01") else [payload]
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
    fleet.hub.here = 100
    seen = announcements(fleet)
    fleet.begin(campaign(5, bloc=5, rounds=50, rest_seconds=600.0))
    assert fleet.campaign.checkin_seconds == 120
    fleet.hub.here = 400
    fleet.hub_event(hub_effects.TimerFired("tick"))
    assert fleet.campaign.checkin_seconds == 480
    fleet.start_hub()
    assert fleet.campaign.checkin_seconds == 480, "devices keep the pace that they were told"
    assert len(seen) == 3


def test_the_fast_path_believes_only_the_very_bytes_that_were_verified() -> None:
    fleet = one_bloc(rest_seconds=3_600.0)
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
