"""Worlds under every rule: each seed that ever failed, for ever, and fresh storms over two hundred devices.

A file `<scenario>-<seed>.json` here is a run that once broke a rule, made small by `fedge sim sweep`; what it broke
and how that read is in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from firmware_sim.faults.strikes import FAULTS, Faults
from firmware_sim.rules.cases import case_of, judge, read_case, replay
from firmware_sim.rules.watching import WatchedWorld
from firmware_sim.scenario import load_scenario
from firmware_sim.world.world import World

FOLDER = Path(__file__).parent
RECORDED = sorted(FOLDER.glob("*.json"))
SEEDS = 20  # each some 2.5 CPU seconds; `fedge sim sweep storm --seeds 10000` is the long run
DEVICES, DAYS = 200, 0.25


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_once_broke_a_rule_holds(path: Path) -> None:
    case = read_case(path)
    assert case.invariant, "a record says what it once broke"
    assert replay(case).events


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_storm_over_two_hundred_devices_breaks_no_rule(seed: int) -> None:
    verdict = judge(case_of(load_scenario("storm"), seed, DEVICES, DAYS))
    assert not verdict.invariant, verdict.found
    assert verdict.opened > 50, "there was something to judge"
    assert verdict.faults > 300
    print(verdict)


def test_every_fault_of_the_storm_strikes_and_judging_changes_nothing() -> None:
    scenario, crcs = load_scenario("storm"), []
    assert scenario.faults.keys() == FAULTS.keys()
    for watched in (False, True):
        faults = Faults({name: 4 * rate for name, rate in scenario.faults.items()}, 1, 40, 0.15)
        world = World(scenario, devices=40, days=0.15, seed=1, faults=faults)
        if watched:
            WatchedWorld(world)
        crcs.append(world.run().crc)
    assert crcs[0] == crcs[1]
    assert all(faults.counts.values()), faults.counts
