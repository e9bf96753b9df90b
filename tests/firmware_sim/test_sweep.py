"""Sweeps: a killed one goes on, another sweep's journal is refused, a failure is made small and read back."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fedge.errors import ConfigError, DataError
from firmware_sim.rules.cases import Case, Verdict, case_of, read_case, write_case
from firmware_sim.rules.shrinking import shrink
from firmware_sim.rules.sweep import JOURNAL, summary, sweep
from firmware_sim.scenario import load_scenario

DEVICES, DAYS = 12, 0.02


def test_a_killed_sweep_goes_on_and_judges_nothing_twice(tmp_path: Path) -> None:
    scenario, judged = load_scenario("storm"), []
    first = sweep(scenario, range(2), DEVICES, DAYS, tmp_path, progress=lambda *told: judged.append(told))
    assert [told[0].seed for told in judged] == [0, 1]
    assert judged[-1][1:] == (2, 2)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-9])  # the last line was torn
    judged.clear()
    again = sweep(scenario, range(3), DEVICES, DAYS, tmp_path, progress=lambda *told: judged.append(told))
    assert [told[0].seed for told in judged] == [1, 2]
    crcs = [verdict.crc for verdict in again.verdicts]
    assert crcs[:2] == [verdict.crc for verdict in first.verdicts], "one seed is one run"
    figures = summary(again)
    assert (figures.seeds, figures.failures) == (3, 0)
    assert figures.events > 100


def test_workers_find_the_same(tmp_path: Path) -> None:
    scenario = load_scenario("storm")
    one = sweep(scenario, range(2), DEVICES, DAYS, tmp_path / "one")
    two = sweep(scenario, range(2), DEVICES, DAYS, tmp_path / "two", workers=2)
    assert [verdict.crc for verdict in one.verdicts] == [verdict.crc for verdict in two.verdicts]


def test_a_journal_of_another_sweep_is_refused(tmp_path: Path) -> None:
    sweep(load_scenario("storm"), range(1), DEVICES, DAYS, tmp_path)
    with pytest.raises(ConfigError, match="another scenario"):
        sweep(load_scenario("lab"), range(1), DEVICES, DAYS, tmp_path)


def test_a_failure_is_made_small() -> None:
    """A rule that breaks as soon as two kinds of faults meet 30 devices for an hour."""
    runs = []

    def judged(case: Case) -> Verdict:
        runs.append(case)
        faults = case.scenario.faults
        broken = {"loss", "hub-crash"} <= faults.keys() and case.devices >= 30 and case.days >= 1 / 24
        return Verdict(seed=case.seed, invariant="stuck" if broken else "", found="d7", at=3_600.0 * broken)

    case = case_of(load_scenario("storm"), 5, 200, 0.25)
    small = shrink(case, judged(case), judged)
    assert small.scenario.faults.keys() == {"loss", "hub-crash"}
    assert small.devices == 30
    assert 1 / 24 <= small.days < 0.05
    assert small.faults_end == case.faults_end, "faults strike when they did"
    assert (small.invariant, small.found) == ("stuck", "d7")
    assert len(runs) < 62


def test_another_failure_is_not_the_same_failure() -> None:
    case = case_of(load_scenario("storm"), 5, 200, 0.25)
    small = shrink(
        case,
        Verdict(seed=5, invariant="stuck"),
        lambda case: Verdict(seed=5, invariant="fold" if case.devices < 200 else "stuck"),
    )
    assert small.devices == 200
    assert small.scenario.faults == {}


def test_a_record_is_read_back_as_written(tmp_path: Path) -> None:
    case = msgspec.structs.replace(case_of(load_scenario("storm"), 5, 20, 0.1), invariant="stuck", found="x")
    path = write_case(case, tmp_path)
    assert path.name == "storm-5.json"
    assert read_case(path) == case
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="no recorded world"):
        read_case(path)
