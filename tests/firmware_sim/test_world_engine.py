"""The world's engine: one seed is one run, and what happens to a device follows from its own draws alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from world_scenes import HOUR, small

from edge_agent.effects import CancelTimer, Save, SetTimer, TimerFired
from fedge.errors import ConfigError
from firmware_sim.world import world as worlds
from firmware_sim.world.clock import Clock
from firmware_sim.world.world import World

_RUN = """
from world_scenes import small
world = small(devices=24, hours=1.0, seed=5, crypto="hashed")
world.at(1500.0, lambda world: world.crash_hub(30.0))
world.at(2000.0, lambda world: world.partition(range(0, 12), 200.0))
result = world.run()
print(result.crc, result.events, result.rounds.opened)
"""


def test_same_seed_is_same_run_whatever_the_hash_seed() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _RUN],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4711")
    ]
    assert outputs[0] == outputs[1]
    assert int(outputs[0].split()[2]) > 0, "rounds were opened"


def test_other_seed_is_another_run() -> None:
    assert small(devices=8, hours=0.2, seed=1).run().crc != small(devices=8, hours=0.2, seed=2).run().crc


def test_device_is_the_same_in_a_fleet_of_any_size() -> None:
    few, many = small(devices=10, crypto="hashed"), small(devices=500, crypto="hashed")
    for number in range(10):
        one, other = few.devices[number], many.devices[number]
        assert one.parts.speed == other.parts.speed
        assert one.parts.board == other.parts.board
        assert one.parts.link.latency() == other.parts.link.latency()
        assert one.draws.word() == other.draws.word()
        assert few.entropy(number)(32) == many.entropy(number)(32)
        assert few.identities.signer(number).certificate == many.identities.signer(number).certificate


def test_clock_goes_by_time_then_by_asking() -> None:
    clock, seen = Clock(100.0), []
    for number, time in enumerate((5.0, 3.0, 5.0, 101.0)):
        clock.ask(time, number, 0, None, 0)
    clock.advance(100.0, [lambda number, argument, generation, sequence: seen.append(number)])
    assert seen == [1, 0, 2], "and what is past the end never comes"
    assert clock.now == 100.0
    assert clock.events == 3


def running(world: World, number: int = 0) -> World:
    """Until this device's machine runs and is connected."""
    while not world.devices[number].connected:
        world.until(world.now + 1.0)
    return world


def test_timer_set_anew_fires_once_and_a_cancelled_one_never() -> None:
    world = running(small(devices=8))
    device, fired = world.devices[0], []
    carry_out = world.fleet.carry_out
    world.fleet.handle = lambda device, event: fired.append((world.now, event))  # type: ignore[method-assign]
    start = world.now
    carry_out[SetTimer](device, SetTimer("a", 10.0))
    carry_out[SetTimer](device, SetTimer("a", 20.0))
    carry_out[SetTimer](device, SetTimer("b", 5.0))
    carry_out[CancelTimer](device, CancelTimer("b"))
    world.until(start + 60.0)
    ours = [(at, event) for at, event in fired if event in (TimerFired("a"), TimerFired("b"))]
    assert ours == [(start + 20.0, TimerFired("a"))]


def test_power_off_ends_timers_and_jobs() -> None:
    world = small(devices=8, hours=3.0)
    world.begin()
    while world.devices[3].job is None:
        world.until(world.now + 1.0)
    device, job = world.devices[3], world.devices[3].job
    saves: list[int] = []
    world.watch(Save, lambda world, number, effect: saves.append(number))
    world.power_cut(3)
    assert job is not None
    world.until(world.now + job.seconds + 600.0)
    assert device.agent is None
    assert device.job is None
    assert 3 not in saves
    assert world.recorder.started > world.recorder.finished, "an interrupted training is not a finished one"
    world.power_on(3)
    world.until(world.now + 300.0)
    assert device.agent is not None
    assert 3 in saves


def test_watch_sees_devices_and_the_hub() -> None:
    from hub.effects import Publish

    world, seen = small(devices=8), []
    world.watch(Publish, lambda world, number, effect: seen.append((number, effect.topic)))
    world.until(600.0)
    assert {number for number, _ in seen} == {-1}


def test_too_large_a_world_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "free_memory_mb", lambda: 300)
    with pytest.raises(ConfigError, match="needs") as refused:
        small(devices=1_000_000)
    assert refused.value.field == "devices"
    assert "fit" in refused.value.hint
    assert World.memory_needed(100_000) > World.memory_needed(1_000)


def test_action_at_a_time() -> None:
    world, seen = small(devices=8), []
    world.at(HOUR / 2, lambda world: seen.append(world.now))
    world.until(HOUR)
    assert seen == [HOUR / 2]
