"""Faults of real processes: drawn from a seed, asked for by name, and each of them does what its line says."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedge.errors import UsageError
from firmware_sim.processes.fleet import LocalFleet
from firmware_sim.processes.process_faults import (
    FAULTS,
    ProcessFaults,
    Strike,
    draw_strikes,
    needs_lines,
    parse_faults,
)
from firmware_sim.processes.shaper import Line
from hub.effects import LedgerEntry

DEVICES = [f"d{number}" for number in range(8)]
# Writes a file again and again, in a child process as an agent's worker is one, until its parent is gone.
WRITER = """
import os, pathlib, subprocess, sys, time
if len(sys.argv) == 2:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], str(os.getpid())])
else:
    while os.getppid() == int(sys.argv[2]):
        try:
            pathlib.Path("big").write_bytes(bytes(100_000))
            pathlib.Path("wrote").touch()
        except OSError:
            pathlib.Path("full").touch()
        time.sleep(0.01)
"""


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.01)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalFleet]:
    """A fleet whose one device is a process that writes."""
    monkeypatch.chdir(tmp_path)
    made = LocalFleet(tmp_path / "fleet", {}, line=Line())
    made.supervisor.add("d0", [sys.executable, "-c", WRITER, WRITER])
    yield made
    made.stop()


def report() -> LedgerEntry:
    return LedgerEntry(at=0.0, kind="report", device="d0", round=1)


def states(fleet: LocalFleet) -> set[str]:
    return {process.status() for process in fleet.supervisor.children["d0"].family()}


# ---------------------------------------------------------------- drawn and asked for
def test_the_same_seed_draws_the_same_strikes_and_one_more_moves_none() -> None:
    wanted = {"kill-agent": 3, "link-hole": 2, "kill-hub": 1}
    strikes = draw_strikes(wanted, DEVICES, 40, seed=5)
    assert strikes == draw_strikes(wanted, DEVICES, 40, seed=5)
    assert strikes != draw_strikes(wanted, DEVICES, 40, seed=6)
    assert set(strikes) < set(draw_strikes({**wanted, "link-hole": 3}, DEVICES, 40, seed=5))
    assert all(1 <= strike.after < 40 for strike in strikes)
    assert {strike.device for strike in strikes if strike.fault == "kill-hub"} == {""}
    assert all(strike.device in DEVICES for strike in strikes if strike.fault != "kill-hub")
    assert all(5.0 <= strike.seconds <= 60.0 for strike in strikes if strike.fault == "link-hole")


def test_faults_are_asked_for_by_name() -> None:
    assert parse_faults("kill-agent=2, link-cut ,kill-agent") == {"kill-agent": 3, "link-cut": 1}
    assert parse_faults("") == {}
    assert needs_lines(parse_faults("kill-hub,link-cut"))
    assert not needs_lines(parse_faults("kill-hub"))


@pytest.mark.parametrize(
    ("text", "told"),
    [("kill-agnet", "Did you mean kill-agent"), ("kill-agent=many", "number"), ("kill-agent=0", "number")],
)
def test_a_fault_that_does_not_exist_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_faults(text)


# ---------------------------------------------------------------- when
def test_a_strike_waits_for_its_report(fleet: LocalFleet) -> None:
    faults = ProcessFaults(fleet, [Strike(after=2, delay=0.0, fault="kill-agent", device="d0", seconds=0.0)])
    child = fleet.supervisor.children["d0"]
    assert faults.look([report()]) == []
    assert child.running
    assert [strike.fault for strike in faults.look([report()])] == ["kill-agent"]
    assert not child.running
    assert (faults.counts["kill-agent"], faults.left) == (1, 0)
    eventually(lambda: (fleet.supervisor.look(), child.running)[1])
    assert (child.restarts, child.kills) == (1, 1)


def test_what_is_not_there_is_struck_later(fleet: LocalFleet) -> None:
    faults = ProcessFaults(fleet, [Strike(after=0, delay=0.0, fault="kill-agent", device="d0", seconds=0.0)])
    fleet.supervisor.kill("d0")
    assert faults.look([]) == []
    eventually(lambda: (fleet.supervisor.look(), faults.look([]))[1])


# ---------------------------------------------------------------- what
def test_a_frozen_device_stands_still_with_its_worker_until_it_is_over(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    eventually(lambda: (tmp_path / "wrote").exists())
    faults = ProcessFaults(fleet, [])
    assert faults.strike(Strike(after=0, delay=0.0, fault="freeze-agent", device="d0", seconds=3_600.0))
    eventually(lambda: states(fleet) == {psutil.STATUS_STOPPED})
    again = Strike(after=0, delay=0.0, fault="full-disk", device="d0", seconds=1.0)
    assert not faults.strike(again), "one lasting trouble of a device at a time"
    faults.end()
    eventually(lambda: psutil.STATUS_STOPPED not in states(fleet))
    assert faults.strike(again)


def test_a_full_disk_is_full_for_the_worker_too_and_has_room_afterwards(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    eventually(lambda: (tmp_path / "wrote").exists())
    assert not (tmp_path / "full").exists()
    faults = ProcessFaults(fleet, [])
    faults.strike(Strike(after=0, delay=0.0, fault="full-disk", device="d0", seconds=3_600.0))
    eventually(lambda: (tmp_path / "full").exists())
    faults.end()
    (tmp_path / "wrote").unlink()
    eventually(lambda: (tmp_path / "wrote").exists())


def test_a_worker_is_killed_alone(fleet: LocalFleet) -> None:
    eventually(lambda: len(fleet.supervisor.children["d0"].family()) == 2)
    parent, worker = fleet.supervisor.children["d0"].family()
    assert FAULTS["kill-worker"].begin(fleet, "d0")
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert parent.pid != worker.pid
    assert fleet.supervisor.children["d0"].kills == 0


def test_a_frozen_process_can_be_stopped(fleet: LocalFleet, tmp_path: Path) -> None:
    eventually(lambda: (tmp_path / "wrote").exists())
    fleet.supervisor.freeze("d0")
    eventually(lambda: states(fleet) == {psutil.STATUS_STOPPED})
    fleet.supervisor.stop()
    process = fleet.supervisor.children["d0"].process
    assert process is not None
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("fault", "begun"),
    [
        ("link-down", Line(carries="refused")),
        ("link-hole", Line(carries="nothing")),
        ("link-throttle", Line(up=2_000.0, down=2_000.0, latency=0.5)),
    ],
)
def test_a_line_in_trouble_is_mended(fleet: LocalFleet, fault: str, begun: Line) -> None:
    assert fleet.shaper is not None
    fleet.shaper.start()
    fleet.shaper.lay("d0", "127.0.0.1", 1, Line())
    faults = ProcessFaults(fleet, [])
    assert faults.strike(Strike(after=0, delay=0.0, fault=fault, device="d0", seconds=0.0))
    assert fleet.shaper.line("d0") == begun
    faults.look([])
    assert fleet.shaper.line("d0") == Line()
