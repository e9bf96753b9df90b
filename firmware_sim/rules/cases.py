"""One run of a world that is judged: what it depends on, how it went, and the file that replays it for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from fedge.errors import DataError, InvariantBroken
from fedge.io import durable
from firmware_sim.faults.strikes import Faults, quiet_from
from firmware_sim.rules.watching import WatchedWorld
from firmware_sim.scenario import Scenario
from firmware_sim.world.outcome import WorldResult
from firmware_sim.world.world import World

EXACT_EVERY: Final = 8  # of so many opened sums one is worked out again word by word


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run that is to be judged: everything that it depends on, so that a file of it replays for ever."""

    scenario: Scenario
    devices: int
    days: float
    seed: int
    faults_end: float  # seconds
    invariant: str = ""  # what it once broke, and how that read; empty for a run that is only to be judged
    found: str = ""

    @property
    def name(self) -> str:
        return f"{self.scenario.name}-{self.seed}"


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the journal. `invariant` is empty for a run in which everything held."""

    seed: int
    crc: str = ""
    events: int = 0
    cpu_seconds: float = 0.0
    opened: int = 0
    sat_out: int = 0
    faults: int = 0
    judged: int = 0
    invariant: str = ""
    found: str = ""
    at: float = 0.0  # seconds


# ---------------------------------------------------------------- one run
def case_of(scenario: Scenario, seed: int, devices: int, days: float) -> Case:
    """The run of a scenario with this seed."""
    return Case(scenario=scenario, devices=devices, days=days, seed=seed, faults_end=quiet_from(days))


def replay(case: Case, *, exact_every: int = 1) -> WorldResult:
    """Runs a case under every rule. Raises InvariantBroken, and whatever else a machine raises."""
    watched = _watched(case, exact_every)
    result = watched.world.run()
    watched.finish()
    return result


def judge(case: Case, *, exact_every: int = EXACT_EVERY) -> Verdict:
    """Runs a case and says how it went; a machine that raises anything else has failed, too."""
    watched = _watched(case, exact_every)
    try:
        result = watched.world.run()
        watched.finish()
    except InvariantBroken as error:
        return Verdict(seed=case.seed, invariant=error.invariant, found=error.text, at=error.at)
    except Exception as error:  # a bug, wherever it is: the seed is worth keeping
        kind = f"raised {type(error).__name__}"
        return Verdict(seed=case.seed, invariant=kind, found=str(error), at=watched.world.now)
    return Verdict(
        seed=case.seed,
        crc=result.crc,
        events=result.events,
        cpu_seconds=round(result.cpu_seconds, 3),
        opened=result.rounds.opened,
        sat_out=result.rounds.sat_out,
        faults=sum(result.faults.values()),
        judged=watched.invariants.looked.total(),
    )


def _watched(case: Case, exact_every: int) -> WatchedWorld:
    faults = Faults(case.scenario.faults, case.seed, case.devices, case.days, case.faults_end)
    world = World(case.scenario, devices=case.devices, days=case.days, seed=case.seed, faults=faults)
    size = f"--devices {case.devices} --days {case.days:g}"
    again = f"fedge sim world {case.scenario.name} {size} --seed {case.seed} --check"
    return WatchedWorld(world, exact_every=exact_every, replay=again)


# ---------------------------------------------------------------- for ever
def write_case(case: Case, folder: Path) -> Path:
    """Writes a case as a file that `read_case` and the tests replay. Raises StorageError."""
    path = durable.make_folder(folder) / f"{case.name}.json"
    durable.write_bytes(path, msgspec.json.format(msgspec.json.encode(case), indent=1) + b"\n")
    return path


def read_case(path: Path) -> Case:
    """The case in a file. DataError for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Case)
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is no recorded world: {error}", field="path", value=str(path)) from error
