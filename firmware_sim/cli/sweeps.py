"""`fedge sim sweep`: many seeds of one scenario under every rule, and the replay of one that failed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from firmware_sim.cases import Verdict
    from firmware_sim.screen import Screen

_EPILOG: Final = """\
examples:
  fedge sim sweep city --devices 200 --days 0.25 --seeds 200     200 worlds, 6 hours each
  fedge sim sweep city --devices 200 --days 0.25 --seeds 10000   goes on after the first 200
  fedge sim sweep --replay fedge-sweep/city-17.json              a failure, again, with its last events

What comes out, in the folder --out: journal.jsonl, a line for each seed (a sweep that was stopped goes on where it
was), and for each failure a file that replays it, made as small as it goes. Exit code 80 when a rule was broken.
"""


def register(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sweep`. Imports nothing heavy."""
    sweep = words.add_parser(
        "sweep",
        help="many seeds under every rule that must hold; failures are made small and kept",
        description="Runs a scenario with many seeds and judges every effect of every machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument(
        "scenario", nargs="?", metavar="SCENARIO", help="a ready scenario's name, or a .toml file"
    )
    sweep.add_argument("--replay", type=Path, metavar="FILE", help="run the recorded failure in FILE instead")
    for flag, default, about in (
        ("--seed", 0, "the first seed"),
        ("--seeds", 200, "how many"),
        ("--workers", 1, "processes at once"),
    ):
        sweep.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} ({default})")
    sweep.add_argument("--devices", type=int, metavar="N", help="how many (as the scenario says)")
    sweep.add_argument("--days", type=float, metavar="D", help="virtual days (as the scenario says)")
    sweep.add_argument(
        "--out",
        type=Path,
        default=Path("fedge-sweep"),
        metavar="DIR",
        help="the sweep's folder (fedge-sweep)",
    )
    sweep.add_argument("--json", action="store_true", help="print the sums as JSON on standard output")
    sweep.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from fedge.errors import UsageError

    if (arguments.scenario is None) == (arguments.replay is None):
        raise UsageError(
            "a sweep takes a scenario, or --replay FILE", hint="`fedge sim scenarios` lists some"
        )
    for name, low, high in (
        ("seeds", 1, 1_000_000),
        ("workers", 1, 256),
        ("devices", 1, 1e7),
        ("days", 1e-4, 3_650),
    ):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UsageError(
                f"--{name} cannot be that", field=name, value=value, hint=f"It is {low:g} to {high:,.0f}"
            )
    return _replay(arguments.replay) if arguments.replay is not None else _sweep(arguments)


def _replay(path: Path) -> int:
    from fedge.errors import NoInputError
    from firmware_sim.cases import read_case, replay

    if not path.is_file():
        raise NoInputError(f"there is no file {path}", field="replay", value=str(path))
    case = read_case(path)
    if case.invariant:
        print(f"{case.name}: it once broke {case.invariant}: {case.found}")
    result = replay(case)  # raises what breaks now
    print(f"{case.name}: all held, CRC {result.crc}, {result.events:,} events")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedge.errors import InvariantBroken
    from firmware_sim.scenario import load_scenario
    from firmware_sim.screen import Screen
    from firmware_sim.sweep import summary, sweep

    scenario = load_scenario(arguments.scenario)
    with Screen() as screen:
        swept = sweep(
            scenario,
            range(arguments.seed, arguments.seed + arguments.seeds),
            arguments.devices or scenario.devices,
            arguments.days or scenario.days,
            arguments.out,
            workers=arguments.workers,
            progress=lambda verdict, done, total: _tell(screen, verdict, done, total),
        )
    found = summary(swept)
    if arguments.json:
        print(msgspec.json.encode(found).decode())
    else:
        print(
            f"{found.seeds:,} seeds, {found.failures:,} failures; {found.events:,} events, {found.opened:,} sums opened, "
            f"{found.faults:,} faults, {found.judged:,} judgements, {found.cpu_seconds:,.0f} s of processor time"
        )
        for record in swept.records:
            print(f"replay it: fedge sim sweep --replay {record}")
    return InvariantBroken.exit_code if found.failures else 0


def _tell(screen: Screen, verdict: Verdict, done: int, total: int) -> None:
    if verdict.invariant:
        screen.note(f"seed {verdict.seed}: {verdict.invariant}: {verdict.found}")
    step = 1 if screen.live else max(1, total // 10)  # without a terminal a line for each tenth
    screen.bar("sweep", done, total, f"{done // step * step} of {total} seeds")
