"""One run of a world as a user asks for it: what it needs is checked and said first, then it runs with a bar.

A run can end early, by Ctrl-C or by an invariant that is broken; what was found until then is a result all the same.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from fedge.errors import ConfigError, InvariantBroken
from fedge.io import durable
from firmware_sim.pages.screen import Screen
from firmware_sim.pages.timelapse import when_text
from firmware_sim.pages.world_report import write_world_report
from firmware_sim.parts.hours import DAY
from firmware_sim.scenario import Scenario
from firmware_sim.world.outcome import Violation, WorldResult, write_world
from firmware_sim.world.task import Task
from firmware_sim.world.world import World

if TYPE_CHECKING:
    from firmware_sim.rules.watching import WatchedWorld

EXACT_DEVICES_MAX, EXACT_EVERY = 200, 16
REAL_TRAINING_DEVICES_MAX: Final = 64  # each training takes as long here as it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a run should be like beside its scenario and seed. None: as the scenario says."""

    devices: int | None = None
    days: float | None = None
    traces: Path | None = None
    crypto: Literal["auto", "real", "hashed"] = "auto"
    faults: bool = True
    check: bool = False
    bundle: Path | None = None  # of --real-training
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What came out; `stopped`: by the user; `broken`: by this invariant."""

    result: WorldResult
    stopped: bool = False
    broken: InvariantBroken | None = None


class _Stopped(Exception):
    """The user wants no more of this run."""


def simulate(scenario: Scenario, wish: Wish, seed: int, screen: Screen) -> Run:
    """Runs it. ConfigError for what cannot be, too little memory among it; what traces and bundles raise."""
    world = _built(scenario, wish, seed)
    needed = World.memory_needed(len(world.devices)) / 2**20
    screen.note(
        f"{scenario.name}: {len(world.devices):,} devices, {world.days:g} days, seed {seed}; {needed:,.0f} MB"
    )
    watched = _watched(world, _again(scenario, world)) if wish.check else None
    cpu, wall = time.process_time(), time.monotonic()
    stopped, broken, result = False, None, None
    with _interrupts() as interrupts:
        try:
            result = world.run(_Bar(world, screen, interrupts))
            if watched is not None:
                watched.finish()
        except _Stopped:
            stopped = True
        except InvariantBroken as error:
            broken = error
    if result is None:
        result = world.recorder.result(time.process_time() - cpu, time.monotonic() - wall, 0.0)
    judged = watched.invariants.looked.total() if watched is not None else 0
    return Run(_completed(result, world, judged, stopped, broken), stopped, broken)


def keep(result: WorldResult, folder: Path) -> None:
    """Writes world.json and report.html into `folder`. Raises StorageError."""
    durable.make_folder(folder)
    write_world(result, folder / "world.json")
    write_world_report(result, folder / "report.html")


def _built(scenario: Scenario, wish: Wish, seed: int) -> World:
    from firmware_sim.faults.strikes import Faults
    from firmware_sim.traces.recorded import load

    devices, days = wish.devices or scenario.devices, wish.days or scenario.days
    return World(
        scenario,
        devices=devices,
        days=days,
        seed=seed,
        crypto=wish.crypto,
        task=_real_task(wish, devices),
        traces=load(wish.traces) if wish.traces is not None else None,
        faults=Faults(scenario.faults, seed, devices, days) if wish.faults else None,
    )


def _real_task(wish: Wish, devices: int) -> Task | None:
    if wish.bundle is None or wish.data is None:
        return None
    if devices > REAL_TRAINING_DEVICES_MAX:
        raise ConfigError(
            f"real training is for at most {REAL_TRAINING_DEVICES_MAX} devices",
            field="devices",
            value=devices,
            hint="Give --devices, or leave --real-training out",
        )
    from firmware_sim.world.real_task import RealTask

    return RealTask(wish.bundle, wish.data)


def _watched(world: World, again: str) -> WatchedWorld:
    """The world under every rule. Sums are worked out again word by word: all of a small fleet, some of a large one."""
    from firmware_sim.rules.watching import WatchedWorld

    every = 1 if len(world.devices) <= EXACT_DEVICES_MAX else EXACT_EVERY
    return WatchedWorld(world, exact_every=every, replay=again)


def _again(scenario: Scenario, world: World) -> str:
    """The command that replays a run."""
    size = f"--devices {len(world.devices)} --days {world.days:g}"
    return f"fedge sim world {scenario.name} {size} --seed {world.seed} --check"


def _completed(
    result: WorldResult, world: World, judged: int, stopped: bool, broken: InvariantBroken | None
) -> WorldResult:
    """The result with what the recorder cannot know."""
    notes = list(result.notes)
    if stopped or broken:
        why = "it was stopped" if stopped else "an invariant broke"
        notes.append(f"The run ended early, at {when_text(world.now)}: {why}.")
    violations = list(result.violations)
    if broken is not None:
        violations.append(
            Violation(invariant=broken.invariant, event=broken.event, at=broken.at, text=broken.text)
        )
    days = min(result.days, max(world.now / DAY, 1e-6))
    return msgspec.structs.replace(
        result, judged=judged, violations=violations, notes=notes, days=days if notes else result.days
    )


# ---------------------------------------------------------------- while it runs
class _Bar:
    """What the world calls at every step: the bar, and the place where it can be stopped."""

    def __init__(self, world: World, screen: Screen, interrupts: list[int]) -> None:
        self._world, self._screen, self._interrupts = world, screen, interrupts
        self._began = time.monotonic()

    def __call__(self, share: float) -> None:
        if self._interrupts:
            raise _Stopped
        self._screen.bar("world", share, 1.0, self._text(share))

    def _text(self, share: float) -> str:
        if not self._screen.live:
            return f"{10 * int(10 * share)} %"  # a line for each of these only
        pace = self._world.events / max(time.monotonic() - self._began, 1e-3)
        opened = self._world.recorder.ledger["opened"]
        return f"{when_text(self._world.now)} · {pace:,.0f} events/s · {opened:,} sums opened"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C instead of raising it anywhere in a machine; a second one is as always."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: whoever runs us there has Ctrl-C for itself
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
