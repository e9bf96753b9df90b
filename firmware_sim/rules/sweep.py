"""Many seeds, one after another: each a world of its own under every rule. A failing seed is made small and kept.

The journal in the sweep's folder has a line for each seed that is done, so a sweep that was killed goes on where it
was. What is left of a failure is one file that a test replays for ever (tests/worlds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from fedge.errors import ConfigError
from fedge.io import durable
from firmware_sim.rules.cases import Case, Verdict, case_of, judge, write_case
from firmware_sim.rules.shrinking import shrink
from firmware_sim.scenario import Scenario

JOURNAL: Final = "journal.jsonl"


class _Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line: a journal belongs to one scenario and size."""

    sweep: str


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep has found out, the seeds of earlier starts included."""

    verdicts: list[Verdict]
    records: list[Path]  # of the failures that this start has made small

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.invariant]


def sweep(
    scenario: Scenario,
    seeds: Iterable[int],
    devices: int,
    days: float,
    folder: Path,
    *,
    workers: int = 1,
    records: Path | None = None,
    progress: Callable[[Verdict, int, int], None] | None = None,
) -> Swept:
    """Judges every seed that the journal in `folder` has not yet; failures go to `records` (default: `folder`).

    `progress(verdict, done, total)` after each. Raises ConfigError when the journal is of another sweep, StorageError.
    """
    durable.make_folder(folder)
    cases = [case_of(scenario, seed, devices, days) for seed in seeds]
    journal = _Journal(folder / JOURNAL, scenario, devices, days)
    known = {verdict.seed: verdict for verdict in journal.read()}
    left = [case for case in cases if case.seed not in known]
    written = []
    for case, verdict in _judged(left, workers):
        known[case.seed] = verdict
        if verdict.invariant:
            written.append(write_case(shrink(case, verdict), records or folder))
        journal.append(verdict)
        if progress is not None:
            progress(verdict, len(known), len(cases))
    return Swept([known[case.seed] for case in cases], written)


def _judged(cases: list[Case], workers: int) -> Iterator[tuple[Case, Verdict]]:
    if workers <= 1:
        yield from ((case, judge(case)) for case in cases)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from zip(cases, pool.map(judge, cases), strict=True)


class _Journal:
    """Verdicts, a line each, appended; a line that a kill has torn counts as not written."""

    def __init__(self, path: Path, scenario: Scenario, devices: int, days: float) -> None:
        digest = hashlib.sha256(msgspec.json.encode((scenario, devices, days))).hexdigest()
        self._path, self._head = path, msgspec.json.encode(_Head(digest))

    def read(self) -> list[Verdict]:
        """What was judged; begins the journal when there is none."""
        if not self._path.exists():
            durable.write_bytes(self._path, self._head + b"\n")
            return []
        head, *lines = self._path.read_bytes().split(b"\n")
        if head != self._head:
            raise ConfigError(
                "the journal in this folder is of another scenario, fleet or time",
                field="folder",
                value=str(self._path.parent),
                hint="Give another --out, or remove it",
            )
        whole = [line for line in lines[:-1] if line]
        if lines and lines[-1]:  # torn
            durable.write_bytes(self._path, b"\n".join([head, *whole, b""]))
        return [msgspec.json.decode(line, type=Verdict) for line in whole]

    def append(self, verdict: Verdict) -> None:
        """One line more."""
        try:
            with self._path.open("ab") as stream:
                stream.write(msgspec.json.encode(verdict) + b"\n")
        except OSError as error:
            raise durable.storage_error(error, self._path) from error


class Figures(msgspec.Struct, frozen=True):
    """The sums over a sweep."""

    seeds: int
    failures: int
    failed_seeds: list[int]
    events: int
    opened: int
    sat_out: int
    faults: int
    judged: int
    cpu_seconds: float


def summary(swept: Swept) -> Figures:
    """A sweep in one line."""
    verdicts = swept.verdicts
    return Figures(
        seeds=len(verdicts),
        failures=len(swept.failures),
        failed_seeds=[verdict.seed for verdict in swept.failures],
        events=sum(verdict.events for verdict in verdicts),
        opened=sum(verdict.opened for verdict in verdicts),
        sat_out=sum(verdict.sat_out for verdict in verdicts),
        faults=sum(verdict.faults for verdict in verdicts),
        judged=sum(verdict.judged for verdict in verdicts),
        cpu_seconds=round(sum(verdict.cpu_seconds for verdict in verdicts), 1),
    )
