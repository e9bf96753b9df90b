"""One script, two fleets: real processes, and the simulated world; then their hubs' logs, compared modulo time.

A script says what happens to which device at which logical point ("when the hub has device 3's report of round 2, cut
device 3's power"). `replay_processes` plays it with a real broker, real cryptography and real training, `replay_world`
on virtual time. What either hub wrote into its ledger is brought into one canonical form.

Compared: who was ever READY; the members of every bloc; for every bloc, its rounds in order, each with its number, how
it ended and why, and who reported; that every entry stands where the protocol allows it; whether the campaign closed;
who was quarantined.

Not compared, because time decides it and no promise says how: moments and durations; the order of READYs and of reports
inside a round; who had reported in a round that sat out; names and order of blocs (a fresh beacon decides); figures of
a sum (the tasks differ); refusals, where a repeated message may be counted once more; words for people.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedge.errors import UnavailableError
from firmware_sim.processes.fleet import LocalFleet
from firmware_sim.processes.process_faults import FAULTS
from firmware_sim.scenario import Campaign, Group, Scenario
from firmware_sim.world.task import Task
from firmware_sim.world.world import World, WorldFaults
from hub.campaigns import Wish
from hub.effects import LedgerEntry, Save

CAMPAIGN: Final = "conformance"
_RATE: Final = 0.02
_WINDOW_TOKENS: Final = 48
_WORK_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.02
_PATIENCE_SECONDS: Final = 300.0

Action = Literal["kill-device", "freeze-device", "thaw-device", "restart-hub", "restart-broker"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of scripts and logs: JSON, compared by value."""


class Cue(_Part, frozen=True):
    """When the ledger has the first entry of this kind and round (of device `of`, if named), `action` is done."""

    kind: str
    round: int
    action: Action
    of: str = ""
    device: str = ""


class Script(_Part, frozen=True):
    """A campaign of one fleet and what goes wrong in it."""

    name: str
    devices: int
    bloc: int
    rounds: int
    steps: int = 4
    window_seconds: int = 600
    cues: tuple[Cue, ...] = ()

    @property
    def names(self) -> list[str]:
        """The devices, named as in the world."""
        return [f"d{number:06d}" for number in range(self.devices)]


class RoundLog(_Part, frozen=True):
    """One round. `reported` has a device as often as the hub took a report from it; empty when the round sat out."""

    number: int
    reported: tuple[str, ...] = ()
    ended: str = ""
    reason: str = ""


class BlocLog(_Part, frozen=True):
    """One bloc and its rounds, in order."""

    members: tuple[str, ...]
    rounds: tuple[RoundLog, ...] = ()


class Log(_Part, frozen=True):
    """A hub's ledger of one campaign in canonical form. `misplaced` is empty, or something is very wrong."""

    ready: tuple[str, ...] = ()
    blocs: tuple[BlocLog, ...] = ()
    closed: bool = False
    quarantined: tuple[str, ...] = ()
    misplaced: tuple[str, ...] = ()


class Recording(_Part, frozen=True):
    """A script, and the log that it led to."""

    script: Script
    log: Log


# ---------------------------------------------------------------- canonical form
def canonical(entries: Iterable[LedgerEntry]) -> Log:
    """The canonical form of a ledger that holds one campaign."""
    reader = _Reader()
    for entry in entries:
        reader.take(entry)
    return reader.log()


def differences(one: Log, other: Log) -> list[str]:
    """What differs, a line each; empty when the two are equal."""
    found = [
        f"{field}: {getattr(one, field)} and {getattr(other, field)}"
        for field in ("ready", "closed", "quarantined", "misplaced")
        if getattr(one, field) != getattr(other, field)
    ]
    left, right = ({bloc.members: bloc.rounds for bloc in log.blocs} for log in (one, other))
    for members in sorted(left.keys() ^ right.keys()):
        found.append(f"bloc of {', '.join(members)}: only in {'one' if members in left else 'the other'}")
    for members in sorted(left.keys() & right.keys()):
        found += _round_differences(members, left[members], right[members])
    return found


def _round_differences(
    members: tuple[str, ...], one: tuple[RoundLog, ...], other: tuple[RoundLog, ...]
) -> list[str]:
    where = f"bloc of {members[0]} and {len(members) - 1} more"
    found = [f"{where}: {a} and {b}" for a, b in zip(one, other, strict=False) if a != b]
    if len(one) != len(other):
        found.append(f"{where}: {len(one)} rounds and {len(other)}")
    return found


class _Reader:
    """Reads a ledger in order and notes what stands where the protocol does not allow it."""

    def __init__(self) -> None:
        self._ready: set[str] = set()
        self._members: dict[str, tuple[str, ...]] = {}
        self._rounds: dict[str, list[RoundLog]] = {}
        self._closed = False
        self._quarantined: set[str] = set()
        self._misplaced: list[str] = []

    def take(self, entry: LedgerEntry) -> None:
        match entry.kind:
            case "ready":
                self._ready.add(entry.device)
            case "quarantined":
                self._quarantined.add(entry.device)
            case "formed":
                self._formed(entry)
            case "open" | "report" | "opened" | "sat-out":
                self._round(entry)
            case "closed":
                self._closed = True

    def log(self) -> Log:
        blocs = [
            BlocLog(members=members, rounds=tuple(self._rounds[bloc]))
            for bloc, members in self._members.items()
        ]
        return Log(
            ready=tuple(sorted(self._ready)),
            blocs=tuple(sorted(blocs, key=lambda bloc: bloc.members)),
            closed=self._closed,
            quarantined=tuple(sorted(self._quarantined)),
            misplaced=tuple(self._misplaced),
        )

    def _formed(self, entry: LedgerEntry) -> None:
        members = tuple(sorted(str(entry.detail["members"]).split(",")))
        self._expect(entry.bloc not in self._members and self._ready.issuperset(members), entry)
        self._members[entry.bloc], self._rounds[entry.bloc] = members, []

    def _round(self, entry: LedgerEntry) -> None:
        rounds = self._rounds.setdefault(entry.bloc, [])
        last = rounds[-1] if rounds else RoundLog(number=0, ended="never opened")
        if entry.kind == "open":
            self._expect(bool(last.ended) and entry.round > last.number, entry)
            rounds.append(RoundLog(number=entry.round))
            return
        self._expect(not last.ended and entry.round == last.number, entry)
        if entry.kind == "report":
            self._expect(entry.device in self._members.get(entry.bloc, ()), entry)
            last = msgspec.structs.replace(last, reported=tuple(sorted((*last.reported, entry.device))))
        elif entry.kind == "opened":
            last = msgspec.structs.replace(last, ended="opened")
        else:
            reason = str(entry.detail.get("reason", ""))
            last = RoundLog(number=last.number, ended="sat-out", reason=reason)
        rounds[-1:] = [last]

    def _expect(self, right: bool, entry: LedgerEntry) -> None:
        if self._closed or not right:
            where = f"{entry.device or entry.bloc} round {entry.round}"
            self._misplaced.append(f"{entry.kind} of {where}" + (" after the end" if self._closed else ""))


# ---------------------------------------------------------------- cues
class Prompter:
    """Follows a ledger and says what the script wants done now. Each cue is given once, in any order."""

    def __init__(self, script: Script) -> None:
        self._left = list(script.cues)

    def take(self, entry: LedgerEntry) -> list[Cue]:
        """The cues of this entry."""
        given = [
            cue
            for cue in self._left
            if (cue.kind, cue.round) == (entry.kind, entry.round) and cue.of in ("", entry.device)
        ]
        self._left = [cue for cue in self._left if cue not in given]
        return given

    def check(self) -> None:
        """UnavailableError when a cue was never given: the campaign went another way than the script."""
        if self._left:
            raise UnavailableError("the script was not played to its end", field="cues", value=self._left)


# ---------------------------------------------------------------- processes
_IN_PROCESSES: Final[dict[Action, Callable[[LocalFleet, str], object]]] = {
    "kill-device": FAULTS["kill-agent"].begin,
    "freeze-device": FAULTS["freeze-agent"].begin,
    "thaw-device": lambda fleet, device: fleet.supervisor.thaw(device),
    "restart-hub": FAULTS["kill-hub"].begin,
    "restart-broker": FAULTS["restart-broker"].begin,
}


def replay_processes(
    script: Script, folder: Path, bundle: Path, data: Mapping[str, Path]
) -> list[LedgerEntry]:
    """The ledger of a real fleet in `folder` that trains `bundle`. UnavailableError when the script does not end."""
    fleet, prompter = LocalFleet(folder, {name: data[name] for name in script.names}), Prompter(script)
    ledger: list[LedgerEntry] = []
    try:
        fleet.start_hub()
        fleet.enroll(lambda _: None)
        fleet.start_campaign(bundle, _wish(script))
        fleet.start_agents()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not any(entry.kind == "closed" for entry in ledger):
            if time.monotonic() > deadline:
                raise UnavailableError("the campaign does not end", field="ledger", value=_last(ledger))
            entries = fleet.look()
            for cue in [cue for entry in entries for cue in prompter.take(entry)]:
                _IN_PROCESSES[cue.action](fleet, cue.device)
            ledger += entries
            time.sleep(_LOOK_SECONDS)
    finally:
        fleet.stop()
    prompter.check()
    return ledger


def _wish(script: Script) -> Wish:
    return Wish(
        CAMPAIGN,
        rounds=script.rounds,
        steps=script.steps,
        bloc=script.bloc,
        devices=script.devices,
        rate=_RATE,
        window_tokens=_WINDOW_TOKENS,
        window_seconds=script.window_seconds,
        work_seconds=min(_WORK_SECONDS, script.window_seconds),
    )


def _last(ledger: Sequence[LedgerEntry]) -> list[str]:
    return [f"{entry.kind} {entry.bloc} {entry.device} {entry.round}" for entry in ledger[-8:]]


# ---------------------------------------------------------------- the world
_BACK_SECONDS: Final = 1.0  # after which what was cut off is started again
_WORLD_DAYS: Final = 1.0
_WORLD_STEP_SECONDS: Final = 60.0
_WORLD_WINDOW_SECONDS: Final = 600  # waiting costs nothing there, and a board is slower than this machine
_DEVICE: Final = Group(name="lab", boards={"gateway": 1.0})

# A frozen device is one that is off: either way it says nothing and hears nothing, and goes on from what it has saved.
_IN_WORLD: Final[dict[Action, Callable[[World, int], None]]] = {
    "kill-device": lambda world, number: world.power_off(number, _BACK_SECONDS),
    "freeze-device": lambda world, number: world.power_cut(number),
    "thaw-device": lambda world, number: world.power_on(number),
    "restart-hub": lambda world, _: world.crash_hub(_BACK_SECONDS),
    "restart-broker": lambda world, _: world.restart_broker(_BACK_SECONDS, with_memory=True),
}


def replay_world(
    script: Script, seed: int, *, task: Task | None = None, faults: WorldFaults | None = None
) -> list[LedgerEntry]:
    """The ledger of a simulated fleet with real cryptography. UnavailableError when the script does not end."""
    world = World(
        _scenario(script),
        devices=script.devices,
        days=_WORLD_DAYS,
        seed=seed,
        crypto="real",
        task=task,
        faults=faults,
    )
    ledger: list[LedgerEntry] = []
    prompter = Prompter(script)

    def saved(_world: World, _number: int, effect: Save) -> None:
        if isinstance(effect.row, LedgerEntry):
            ledger.append(effect.row)
            for cue in prompter.take(effect.row):
                world.at(world.now, partial(_do, cue))

    world.watch(Save, saved)
    while not any(entry.kind == "closed" for entry in ledger):
        if world.now >= world.end:
            raise UnavailableError("the campaign does not end", field="ledger", value=_last(ledger))
        world.until(world.now + _WORLD_STEP_SECONDS)
    prompter.check()
    return ledger


def _scenario(script: Script) -> Scenario:
    """Devices that are always there and train whenever they are asked: what goes wrong is the script's alone."""
    campaign = Campaign(
        steps=script.steps,
        rounds=script.rounds,
        bloc=script.bloc,
        form_at_share=1.0,
        window_seconds=max(script.window_seconds, _WORLD_WINDOW_SECONDS),
        training_share=0.0,
        rest_seconds=0.0,
        quota=0.0,
    )
    return Scenario(name="conformance", groups=(_DEVICE,), campaign=campaign)


def _do(cue: Cue, world: World) -> None:
    _IN_WORLD[cue.action](world, int(cue.device.removeprefix("d")) if cue.device else -1)
