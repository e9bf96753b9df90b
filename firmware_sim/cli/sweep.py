"""`fedge sim sweep`: many seeds of one scenario under every rule, and the small files of those that break one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

_EPILOG: Final = """\
examples:
  fedge sim sweep storm --seeds 200                      as the tests do it
  fedge sim sweep storm --seeds 10000 --workers 8        the long run; Ctrl-C and the same line again: it goes on
  fedge sim sweep my.toml --devices 50 --days 0.5        any scenario, with the faults that it names

Each failing seed is made small (fewer faults, less time, fewer devices) and written as DIR/SCENARIO-SEED.json; a copy
of that file in tests/worlds/ is replayed by the tests for ever. Exit code 80 when any seed failed.
"""


def register(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sweep`. Imports nothing heavy."""
    parser = words.add_parser(
        "sweep",
        help="many seeds under every rule: what breaks is made small and kept",
        description="Runs a world for each seed and judges every invariant after every effect.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", metavar="SCENARIO", help="a ready scenario's name, or a .toml file")
    parser.add_argument("--seeds", type=int, default=200, metavar="N", help="how many (200)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (0)")
    parser.add_argument("--devices", type=int, metavar="N", help="how many (as the scenario says)")
    parser.add_argument("--days", type=float, metavar="D", help="virtual days (as the scenario says)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fedge-sweep"),
        metavar="DIR",
        help="journal and failures (fedge-sweep)",
    )
    parser.add_argument("--json", action="store_true", help="print the sums on standard output")
    parser.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedge.errors import InvariantBroken
    from firmware_sim.pages.screen import Screen
    from firmware_sim.rules.cases import Verdict
    from firmware_sim.rules.sweep import summary, sweep
    from firmware_sim.scenario import load_scenario

    scenario = load_scenario(arguments.scenario)
    devices, days = arguments.devices or scenario.devices, arguments.days or scenario.days
    with Screen() as screen:

        def progress(verdict: Verdict, done: int, total: int) -> None:
            screen.bar(
                "sweep", done, total, f"{done} of {total} seeds" if screen.live or done == total else ""
            )
            if verdict.invariant:
                screen.note(f"seed {verdict.seed}: {verdict.invariant}: {verdict.found}")

        seeds = range(arguments.first, arguments.first + arguments.seeds)
        swept = sweep(
            scenario, seeds, devices, days, arguments.out, workers=arguments.workers, progress=progress
        )
        for path in swept.records:
            screen.note(f"made small: {path}")
    figures = summary(swept)
    if arguments.json:
        print(msgspec.json.encode(figures).decode())
    else:
        print(
            f"{figures.seeds} seeds, {figures.failures} broke a rule; {figures.events:,} events, "
            f"{figures.opened:,} sums opened, {figures.faults:,} faults, {figures.cpu_seconds:,.0f} CPU s"
        )
    return InvariantBroken.exit_code if swept.failures else 0
