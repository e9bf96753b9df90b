"""The device's folder: modes, one owner at a time, a round's files, slots, clock, and what the board says."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
from desk import Desk

from edge_agent import resources
from edge_agent.clock import Clock
from edge_agent.home import Home, default_home
from edge_agent.round_files import Rounds
from edge_agent.slots import slot
from edge_agent.stats import Stats
from edge_agent.unit import unit_text
from fedge.errors import IntegrityError, NoInputError, StorageError, UnavailableError
from fedge.frames import decode_frame
from fedge.limits import CHUNK_BODY_BYTES

ROUND = bytes(range(32))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Desk(tmp_path).device("dev", 1)


def test_secrets_and_folders_are_the_owners_alone(home: Home) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in (home.folder, home.rounds, home.blobs)}
    assert modes == {home.folder.name: 0o700, "rounds": 0o700, "blobs": 0o700}
    for path in (home.identity, home.key, home.state):
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_identity_speaks_and_its_key_is_never_printed(home: Home) -> None:
    identity = home.who()
    assert identity.key not in repr(identity).encode()
    assert identity.key.hex() not in repr(identity)
    start, end = identity.valid()
    assert start <= time.time() <= end
    certificate = identity.verifier().certificate(
        identity.signer().certificate, role="device", now=time.time()
    )
    assert certificate.subject == "dev"


def test_no_device_and_a_damaged_identity_are_told_apart(tmp_path: Path, home: Home) -> None:
    with pytest.raises(NoInputError, match="fedge agent enroll"):
        Home(tmp_path / "nobody").who()
    home.identity.write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        home.who()


def test_one_agent_in_a_home(home: Home) -> None:
    with home.alone(), pytest.raises(UnavailableError, match="another agent"), home.alone():
        pass
    with home.alone():
        pass


def test_the_default_home_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home().folder == Path("/data/fedge/agent")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_home().folder == Path("/home/me/.local/share/fedge/agent")


def test_the_unit_runs_this_agent_and_quotes_its_paths(tmp_path: Path) -> None:
    text = unit_text(Home(tmp_path / "my home"), tmp_path / "50%.jsonl")
    assert not {"@COMMAND@", "@HOME@", "@USER@"} & set(text.replace("=", " ").split())
    assert f'--home "{tmp_path}/my home" --data {tmp_path}/50%%.jsonl\n' in text
    assert f'ReadWritePaths="{tmp_path}/my home"\n' in text


# ---------------------------------------------------------------- a round's files
def test_frames_are_cut_from_the_report_on_disk(home: Home) -> None:
    body = os.urandom(CHUNK_BODY_BYTES + 10)
    home.report(ROUND).write_bytes(body)
    frames = [decode_frame(Rounds(home).frame(ROUND, bytes(32), index)) for index in (0, 1)]
    assert b"".join(bytes(part) for _, part in frames) == body
    assert frames[1][0].index == 1
    with pytest.raises(StorageError, match="cannot read"):
        Rounds(home).frame(bytes(32), bytes(32), 0)


def test_an_update_that_was_not_opened_is_carried_once(home: Home) -> None:
    rounds = Rounds(home)
    home.carry.write_bytes(b"old")
    for path, data in ((home.delta(ROUND), b"d"), (home.sent(ROUND), b"new"), (home.report(ROUND), b"r")):
        path.write_bytes(data)
    for _ in range(2):  # a power cut may repeat it
        rounds.keep_carry(ROUND)
        assert home.carry.read_bytes() == b"new"
        assert list(home.rounds.iterdir()) == []


def test_a_delta_that_was_never_sealed_is_carried_where_nothing_else_waits(home: Home) -> None:
    home.delta(ROUND).write_bytes(b"d")
    Rounds(home).keep_carry(ROUND)
    assert home.carry.read_bytes() == b"d"
    home.delta(ROUND).write_bytes(b"e")
    Rounds(home).keep_carry(ROUND)
    assert home.carry.read_bytes() == b"d"


def test_an_update_that_was_opened_leaves_nothing(home: Home) -> None:
    home.carry.write_bytes(b"old")
    home.sent(ROUND).write_bytes(b"new")
    for _ in range(2):
        Rounds(home).drop_carry(ROUND)
        assert Rounds(home).carry() == ""
        assert list(home.rounds.iterdir()) == []


def test_only_the_running_round_survives_a_start(home: Home) -> None:
    other = bytes(32)
    for transcript in (ROUND, other):
        home.report(transcript).write_bytes(b"r")
    Rounds(home).sweep(ROUND)
    assert list(home.rounds.iterdir()) == [home.report(ROUND)]
    Rounds(home).sweep(b"")
    assert list(home.rounds.iterdir()) == []


# ---------------------------------------------------------------- slots
def test_no_more_than_n_hold_a_slot(tmp_path: Path) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with slot(tmp_path, 2):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2


def _hold(folder: str, held: object) -> None:
    with slot(Path(folder), 1):
        held.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_killed_holder_gives_its_slot_back(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    held = spawn.Event()
    holder = spawn.Process(target=_hold, args=(str(tmp_path), held))
    holder.start()
    assert held.wait(30)
    holder.kill()
    with slot(tmp_path, 1):
        holder.join()


def test_without_slots_nothing_waits_and_nothing_is_made(tmp_path: Path) -> None:
    with slot(tmp_path / "none", 0), slot(tmp_path / "none", 0):
        assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- clock
class Wall:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


DAY = 86_400.0
JOINED = 20_000 * DAY


def clock(tmp_path: Path, wall: Wall) -> Clock:
    return Clock(tmp_path / "clock", (JOINED, JOINED + 365 * DAY), wall)


def test_1970_and_last_month_are_not_believed(tmp_path: Path) -> None:
    wall = Wall(JOINED + 40 * DAY)
    clock(tmp_path, wall).keep(every_seconds=0)
    for at, believed in ((0.0, False), (JOINED + 10 * DAY, False), (JOINED + 40 * DAY, True)):
        wall.at = at
        assert clock(tmp_path, wall).is_set() is believed


def test_a_clock_that_ran_ahead_for_once_locks_nobody_out(tmp_path: Path) -> None:
    wall = Wall(JOINED + 47_000 * DAY)  # 2099 or so
    clock(tmp_path, wall).keep(every_seconds=0)
    wall.at = JOINED + DAY
    assert clock(tmp_path, wall).is_set()


def test_time_never_goes_back_within_a_process(tmp_path: Path) -> None:
    wall = Wall(JOINED + 100)
    one = clock(tmp_path, wall)
    assert one.now() == JOINED + 100
    wall.at = JOINED + 50
    assert one.now() == JOINED + 100
    wall.at = JOINED + 101
    assert one.now() == JOINED + 101


# ---------------------------------------------------------------- what the board can do
def test_facts_are_coarse(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    facts = resources.measure(data)
    assert facts.samples_bucket == 3
    assert facts.memory_mb_step % resources.MEMORY_STEP_MB == 0
    assert facts.board
    assert resources.measure(None).samples_bucket == 0


def test_threads_follow_the_allowed_cores_and_every_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(resources, "_groups", lambda _: iter(()))
    assert resources.threads_allowed() == 6
    assert resources.threads_allowed(4, 0, 3) == 3
    assert resources.threads_allowed(64) == 6


def test_threads_follow_the_quota_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(resources, "_groups", lambda _: iter((tmp_path,)))
    for text, threads in (("50000 100000", 1), ("150000 100000", 2), ("max 100000", 6)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert resources.threads_allowed() == threads
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{60 << 20}\n")
    assert resources.free_memory_mb() == 4


def test_bytes_of_a_day_begin_at_nothing_and_outlive_the_process(tmp_path: Path) -> None:
    stats = Stats(tmp_path / "stats.json")
    stats.count_bytes(9 * DAY, 1_000, 200, 30)
    stats.count_bytes(9 * DAY + 60, 1_500, 200, 30)
    assert stats.figures.day_bytes == 1_730
    stats.write(0.0)
    again = Stats(tmp_path / "stats.json")
    again.count_bytes(9 * DAY + 120, 10, 0, 0)
    assert (again.figures.day_bytes, again.figures.mqtt_up_bytes) == (1_740, 1_510)
    again.count_bytes(10 * DAY, 11, 0, 0)
    assert again.figures.day_bytes == 1


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    assert resources.memory_of(2**30) == resources.Memory()
    mine = resources.memory_of(os.getpid())
    assert mine.peak_kb >= mine.resident_kb > mine.anonymous_kb > 0
