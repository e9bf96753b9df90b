"""Who holds a bloc up and for how long; what the tables say; a standing is written only when somebody asks."""

import json
import os
import time
from pathlib import Path

import msgspec
import pytest
from playbook import Fleet, campaign

from fedge import topics
from fedge.errors import IntegrityError, NoInputError
from hub import effects as hub_effects
from hub.effects import DeviceRow
from hub.standing import Standing, standing
from hub.views import FILE, WRITTEN_SECONDS, StandingFile, read_standing, show_blocs, show_devices


def waiting_for(name: str, *, rest: float = 60.0) -> Fleet:
    """Two blocs of five; one has had a round, and `name` may not work now."""
    fleet = Fleet(10)
    fleet.begin(campaign(10, bloc=5, rounds=100, rest_seconds=rest))
    fleet.run()
    fleet.conditions(name, 0)
    fleet.run()
    return fleet


def now(fleet: Fleet) -> Standing:
    return standing(fleet.hub, fleet.now)


def device(fleet: Fleet, name: str) -> object:
    return next(one for one in now(fleet).devices if one.id == name)


# ---------------------------------------------------------------- the breaker
def test_the_time_for_which_a_bloc_waits_for_one_member_is_counted_in_closed_form() -> None:
    fleet = waiting_for("d03")
    fleet.wait(3_660)
    worst = now(fleet).devices[0]
    assert worst.id == "d03"
    assert worst.why == "not now"
    assert worst.blocked_seconds == pytest.approx(3_600), "an hour, and not the minute of rest before it"
    bloc = now(fleet).blocs[0]
    assert (bloc.breaker, bloc.blocked_hours) == ("d03", pytest.approx(1.0))
    assert bloc.state == "waiting for d03"
    assert (DeviceRow, ("", "d03")) in fleet.rows
    assert fleet.rows[DeviceRow, ("", "d03")].blocked_seconds == 0, "it still goes on"
    fleet.conditions("d03", 86_400)
    fleet.run()
    saved = fleet.rows[DeviceRow, ("", "d03")].blocked_seconds
    assert saved == pytest.approx(3_600)
    fleet.start_hub()
    assert device(fleet, "d03").blocked_seconds == saved, "and survives a restart"


def test_a_bloc_that_misses_two_blames_neither() -> None:
    fleet = waiting_for("d03")
    bloc = fleet.hub.contacts["d03"].blocs[0]
    other = next(member for member in bloc.row.members if member != "d03")
    fleet.conditions(other, 0)
    fleet.run()
    fleet.wait(3_600)
    assert now(fleet).blocs[0].state == "waiting for 2 members"
    assert device(fleet, "d03").blocked_seconds < 61
    assert device(fleet, other).blocked_seconds < 61
    fleet.conditions(other, 86_400)
    fleet.run()
    fleet.wait(600)
    assert device(fleet, "d03").blocked_seconds == pytest.approx(600, abs=61)


def test_a_moment_between_two_readys_writes_no_row_of_its_own() -> None:
    fleet = Fleet(5)
    fleet.begin(campaign(5, bloc=5, rounds=6))
    fleet.settle()
    rows = [row for row in fleet.rows.values() if isinstance(row, DeviceRow)]
    assert sum(row.blocked_seconds for row in rows) == 0


# ---------------------------------------------------------------- every device has a why-not
def test_every_reason_has_its_words() -> None:
    fleet = waiting_for("d03", rest=600.0)
    reasons = {one.id: one.why for one in now(fleet).devices}
    assert reasons["d03"] == "not now"
    assert set(reasons.values()) == {"not now", "waiting for d03", "resting"}
    fleet.conditions("d03", 0, hot=True)
    fleet.run()
    assert device(fleet, "d03").why == "hot"
    fleet.conditions("d03", 86_400, rounds_left=False)
    fleet.run()
    assert device(fleet, "d03").why == "rounds spent"
    fleet.conditions("d03", 86_400, rounds_left=True, samples_bucket=0)
    fleet.run()
    assert device(fleet, "d03").why == "no data"
    fleet.presence("d03", False)
    assert device(fleet, "d03").why == "absent"


def test_who_works_and_who_has_reported() -> None:
    fleet = Fleet(5)
    fleet.filter = lambda to, topic, payload: [] if topic == topics.chunks("d01") else [payload]
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    reasons = {one.id: one.why for one in now(fleet).devices}
    assert reasons == {name: "working" if name == "d01" else "waiting for d01" for name in fleet.devices}
    bloc = now(fleet).blocs[0]
    assert (bloc.state, bloc.reported, bloc.devices, bloc.tried, bloc.opened) == ("working", 4, 5, 1, 0)
    fleet.presence("d01", False)
    assert device(fleet, "d01").why == "absent"


def test_a_quarantined_device_and_one_that_follows_nothing() -> None:
    fleet = Fleet(6)
    fleet.begin(campaign(5, bloc=5, rounds=100, rest_seconds=60.0))
    fleet.run()
    row = msgspec.structs.replace(fleet.hub.device("d02"), quarantined="changed its report")
    fleet.rows[DeviceRow, ("", "d02")] = row
    fleet.start_hub()
    fleet.presence("d05", True)
    assert device(fleet, "d02").why == "quarantined"
    unassigned = [one.id for one in now(fleet).devices if not one.bloc]
    assert len(unassigned) <= 1


def test_the_figures_of_a_campaign() -> None:
    fleet = waiting_for("d03")
    fleet.wait(600)
    one = now(fleet).campaigns[0]
    assert (one.blocs, one.live, one.done, one.training, one.yielded) == (2, 2, 0, 0, 1.0)
    assert one.versions == len(fleet.kinds("opened"))
    assert one.never_served == {"x86-64": 0.0}
    assert sum(bloc.share for bloc in now(fleet).blocs) == pytest.approx(1.0)
    fleet.start_hub()
    assert now(fleet).campaigns[0].never_served == {"not heard yet": 0.0}


# ---------------------------------------------------------------- the file
def test_nothing_is_written_while_nobody_asks_and_at_most_every_half_minute(tmp_path: Path) -> None:
    fleet, made = waiting_for("d03"), []

    def make() -> Standing:
        made.append(1)
        return now(fleet)

    file, at = StandingFile(tmp_path, make), time.time()
    file.answer(at)
    assert not made
    (tmp_path / "standing.asked").touch()
    file.answer(at)
    assert len(made) == 1
    assert not (tmp_path / "standing.asked").exists()
    (tmp_path / "standing.asked").touch()
    file.answer(at + WRITTEN_SECONDS - 1)
    assert len(made) == 1
    file.answer(at + WRITTEN_SECONDS)
    assert len(made) == 2
    assert read_standing(tmp_path, running=False) == now(fleet)


def test_a_hub_that_never_told_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="fedge hub up"):
        read_standing(tmp_path, running=False)
    (tmp_path / FILE).write_bytes(b"{")
    with pytest.raises(IntegrityError):
        read_standing(tmp_path, running=False)


def test_an_old_standing_says_how_old_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = msgspec.structs.replace(now(waiting_for("d03")), at=time.time() - 7_200)
    (tmp_path / FILE).write_bytes(msgspec.json.encode(old))
    os.utime(tmp_path / FILE, (old.at, old.at))
    assert read_standing(tmp_path, running=False) == old
    assert "not running: this is how it stood 2.0 h ago" in capsys.readouterr().err


# ---------------------------------------------------------------- the tables
def test_the_tables_name_the_breaker_first(capsys: pytest.CaptureFixture[str]) -> None:
    fleet = waiting_for("d03")
    fleet.wait(3_660)
    show_blocs(now(fleet), campaign="", most=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("c1: running, 2/2 blocs live, 0 devices train")
    assert "d03" in lines[2]
    assert "1.0 h" in lines[2]
    show_devices(now(fleet), campaign="c1", most=1)
    told = capsys.readouterr().out
    assert told.splitlines()[1].startswith("d03")
    assert "the first 1 of 10 devices" in told
    assert "1 not now" in told
    assert "4 waiting for" in told
    show_devices(now(fleet), campaign="c2", most=1)
    assert "d03" not in capsys.readouterr().out


def test_a_standing_is_plain_json() -> None:
    told = json.loads(msgspec.json.encode(now(waiting_for("d03"))))
    assert {"at", "campaigns", "blocs", "devices"} == set(told)
    assert len(told["devices"]) == 10
    assert all(one["why"] for one in told["devices"])


def test_asking_changes_nothing() -> None:
    fleet = waiting_for("d03")
    before = len(fleet.ledger), dict(fleet.rows), fleet.hub.campaigns["c1"].live
    assert now(fleet) == now(fleet)
    fleet.hub_event(hub_effects.TimerFired("tick"))
    assert before == (len(fleet.ledger), dict(fleet.rows), fleet.hub.campaigns["c1"].live)
