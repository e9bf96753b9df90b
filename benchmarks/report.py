"""The one shape of every benchmark: a table for people, or with `--json` one object on standard output.

A benchmark collects `Row`s and hands them to `print_report`. Values are medians and spreads are minimum and maximum
over the runs. Progress goes to standard error. Figures of a `--quick` run are for smoke tests and are never quoted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed measures itself, not another copy

import fedge  # noqa: E402  (after the path above, on purpose)

_GOAL = re.compile(r"(<=|>=|<|>|==) *(-?[0-9][0-9_,.]*(?:e-?\d+)?)")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: `figure` is stable snake_case with the unit last, `case` says what was varied.

    `baseline_value` is None when the peer was not measured in this run; `baseline` then names the source.
    """

    figure: str
    case: str
    value: float
    spread: tuple[float, float]
    unit: str
    goal: str | None = None
    baseline: str | None = None
    baseline_value: float | None = None

    @classmethod
    def of(
        cls,
        figure: str,
        case: str,
        values: Sequence[float],
        unit: str,
        *,
        goal: str | None = None,
        baseline: str | None = None,
        baseline_value: float | None = None,
    ) -> Row:
        """The row of repeated measurements: median, minimum and maximum of `values`."""
        spread = (min(values), max(values))
        return cls(figure, case, statistics.median(values), spread, unit, goal, baseline, baseline_value)

    @property
    def meets(self) -> bool | None:
        """Whether `value` keeps `goal` ("<= 30", ">= 0.75"); None without a goal."""
        if self.goal is None:
            return None
        match = _GOAL.match(self.goal)
        if match is None:
            raise ValueError(f"goal must start with a comparison and a number: {self.goal!r}")
        limit = float(match[2].replace(",", "").replace("_", ""))
        return {
            "<=": self.value <= limit,
            ">=": self.value >= limit,
            "<": self.value < limit,
            ">": self.value > limit,
            "==": self.value == limit,
        }[match[1]]

    @property
    def ratio(self) -> float | None:
        """value / baseline_value, both measured in the same run."""
        return self.value / self.baseline_value if self.baseline_value else None


def parser(description: str, *, runs: int = 5, seed: int = 7) -> argparse.ArgumentParser:
    """The flags that every benchmark has; a benchmark may add its own."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    flags.add_argument("--quick", action="store_true", help="shrink the work for a smoke test")
    flags.add_argument("--runs", type=int, default=runs, help=f"repetitions of each measurement ({runs})")
    flags.add_argument("--seed", type=int, default=seed, help=f"seed of all that is random ({seed})")
    return flags


def progress(text: str) -> None:
    """A line for whoever waits, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_report(benchmark: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print `rows` as JSON or as a table, as `args` (of `parser`) says."""
    head: dict[str, object] = {
        "benchmark": benchmark,
        "version": fedge.__version__,
        "commit": _commit(),
        "machine": _machine(),
        "seed": args.seed,
        "runs": args.runs,
    }
    if options := _options(args):
        head["options"] = options
    if args.quick:
        head["quick"] = True
    if args.json:
        print(json.dumps({**head, "rows": [_as_object(row) for row in rows]}, allow_nan=False))
        return
    print("  ".join(f"{key}: {value}" for key, value in head.items()))
    _print_table(rows)


def _options(args: argparse.Namespace) -> str:
    """What was typed, without the form of the output and without paths: they say nothing on another machine."""
    words, paths = sys.argv[1:], {str(value) for value in vars(args).values() if isinstance(value, Path)}
    following = [*words[1:], ""]
    return shlex.join(
        word
        for word, then in zip(words, following, strict=True)
        if word != "--json" and not paths & {word, then} and "/" not in word
    )


def _as_object(row: Row) -> dict[str, object]:
    return {
        "figure": row.figure,
        "case": row.case,
        "value": row.value,
        "spread": list(row.spread),
        "unit": row.unit,
        "goal": row.goal,
        "meets": row.meets,
        "baseline": row.baseline,
        "baseline_value": row.baseline_value,
        "ratio": row.ratio,
    }


def _print_table(rows: Sequence[Row]) -> None:
    titles = ("figure", "case", "value", "min .. max", "unit", "goal", "baseline", "ratio")
    lines = [titles, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(row: Row) -> tuple[str, ...]:
    goal = "" if row.goal is None else f"{row.goal} {'ok' if row.meets else 'MISSED'}"
    baseline = row.baseline or ""
    if row.baseline_value is not None:
        baseline += f" = {_number(row.baseline_value)}"
    spread = f"{_number(row.spread[0])} .. {_number(row.spread[1])}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    return (row.figure, row.case, _number(row.value), spread, row.unit, goal, baseline, ratio)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} x {_processor()}, {memory:.0f} GiB, Python {platform.python_version()}"


def _processor() -> str:
    """The processor's name; /proc/cpuinfo calls it differently on x86 and on ARM boards."""
    names = re.compile(r"^(?:model name|Model)\s*:\s*(.+)$", re.MULTILINE)
    try:
        found = names.search(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
