"""The saved state: whole or refused, under kills, damage and a disk that says no."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edge_agent.effects import AgentState
from edge_agent.journal import Journal
from fedge.errors import IntegrityError, NoInputError, StorageError

ROOT = Path(__file__).parents[2]


def test_what_was_saved_is_loaded_by_another_process(tmp_path: Path) -> None:
    state = AgentState(boot=3, counter=9, prekey=bytes(32), announcement=b"\x00\xff")
    Journal(tmp_path / "state.bin").save(state)
    assert Journal(tmp_path / "state.bin").load() == state
    assert (tmp_path / "state.bin").stat().st_mode & 0o777 == 0o600


def test_a_missing_state_is_not_a_fresh_one(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="join the fleet again"):
        Journal(tmp_path / "state.bin").load()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_state_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.bin"
    Journal(path).save(AgentState(boot=3))
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    broken = {"empty": b"", "cut": whole[:-3], "flipped": flipped, "foreign": b"hello" * 40}[damage]
    path.write_bytes(broken)
    with pytest.raises(IntegrityError, match="damaged"):
        Journal(path).load()
    assert path.read_bytes() == broken


def test_the_state_of_another_version_is_named(tmp_path: Path) -> None:
    class Newer(msgspec.Struct):
        boot: int = 1
        something_new: int = 2

    path = tmp_path / "state.bin"
    Journal(path).save(Newer())  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="another version"):
        Journal(path).load()


_SAVES = """
import sys, pathlib
from edge_agent.effects import AgentState
from edge_agent.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]))
for counter in range(1, 10**9):
    journal.save(AgentState(counter=counter, announcement=bytes(20_000)))
    print(counter, flush=True)
"""


def test_killed_while_saving_nothing_that_was_told_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    for delay in (0.0, 0.003, 0.011, 0.017):
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVES, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        told = [line for line in child.stdout.read().splitlines() if line]
        child.wait()
        saved = Journal(path).load()
        assert saved.counter >= (int(told[-1]) if told else 1)
        assert saved.announcement == bytes(20_000)


def test_a_disk_that_is_full_keeps_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    journal = Journal(path)
    journal.save(AgentState(boot=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, before[1]))
    try:
        with pytest.raises(StorageError):
            journal.save(AgentState(boot=2, announcement=bytes(20_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert Journal(path).load().boot == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.bin"]
    journal.save(AgentState(boot=2))
    assert Journal(path).load().boot == 2


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.bin")
    journal.save(AgentState(boot=1))
    inode = (tmp_path / "state.bin").stat().st_ino
    journal.save(AgentState(boot=1))
    assert (tmp_path / "state.bin").stat().st_ino == inode
