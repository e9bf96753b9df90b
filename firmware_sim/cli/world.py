"""`fedge sim world` and `fedge sim scenarios`: one simulated fleet, and the ready descriptions of some."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from firmware_sim.simulate import Wish

_EPILOG: Final = """\
examples:
  fedge sim world vineyard                            a ready scenario, as its file says
  fedge sim world my.toml --devices 100000 --days 1   any size; memory is foreseen before it runs
  fedge sim world phones --traces DIR                 presence and links from recorded traces
  fedge sim world lab --check                         every invariant is judged after every effect
  fedge sim world lab --real-training BUNDLE --data DIR --devices 8 --days 0.1
                                                      the real trainer on a real bundle

What comes out, in the folder --out: report.html (look at it: the time-lapse plays), and world.json, the same figures.
The same scenario, devices, days and seed give the same events and the same CRC, on any machine. Ctrl-C ends a run
early and keeps what there is.
"""
_SCENARIOS_EPILOG: Final = """\
examples:
  fedge sim scenarios                       which there are
  fedge sim scenarios vineyard > my.toml    one as a file, to edit and to run: fedge sim world my.toml
  fedge sim scenarios --boards              boards that a group may have
  fedge sim scenarios --faults              faults that may strike
"""


def register(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `world` and `scenarios`. Imports nothing heavy."""
    world = words.add_parser(
        "world",
        help="a simulated fleet of any size: clock, heat, batteries, links, bad luck",
        description="Runs the shipped agent and hub code for a whole fleet on virtual time, and shows what happened.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    world.add_argument("scenario", metavar="SCENARIO", help="a ready scenario's name, or a .toml file")
    world.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (0)")
    add_fleet_flags(world)
    world.add_argument(
        "--real-training", type=Path, metavar="BUNDLE", help="train for real on this bundle (few devices)"
    )
    world.add_argument("--data", type=Path, metavar="DIR", help="people's folders for --real-training")
    world.add_argument(
        "--out", type=Path, default=Path("fedge-world"), metavar="DIR", help="the run's folder (fedge-world)"
    )
    world.add_argument("--json", action="store_true", help="print world.json on standard output")
    world.set_defaults(run=_world)
    scenarios = words.add_parser(
        "scenarios",
        help="the ready scenarios; NAME prints one as a file to edit",
        epilog=_SCENARIOS_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = scenarios.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", metavar="NAME", help="print this one's file")
    which.add_argument("--boards", action="store_true", help="list the boards")
    which.add_argument("--faults", action="store_true", help="list the faults")
    scenarios.set_defaults(run=_scenarios)


def add_fleet_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every word that runs worlds."""
    parser.add_argument("--devices", type=int, metavar="N", help="how many (as the scenario says)")
    parser.add_argument("--days", type=float, metavar="D", help="virtual days (as the scenario says)")
    parser.add_argument(
        "--traces", type=Path, metavar="PATH", help="recorded presence and links: file or folder"
    )
    parser.add_argument(
        "--crypto",
        choices=("auto", "real", "hashed"),
        default="auto",
        help="real signatures and key agreement, or cheaper ones that fail and cancel alike (auto: real up to 24)",
    )
    parser.add_argument("--faults", choices=("on", "off"), default="on", help="those of the scenario (on)")
    parser.add_argument("--check", action="store_true", help="judge every invariant after every effect")


def wish_of(arguments: argparse.Namespace) -> Wish:
    """What the flags ask for. Raises UsageError."""
    from fedge.errors import UsageError
    from firmware_sim.simulate import Wish

    bundle, data = getattr(arguments, "real_training", None), getattr(arguments, "data", None)
    if (bundle is None) != (data is None):
        raise UsageError(
            "--real-training and --data belong together", hint="One names the bundle, one the data"
        )
    for name, low in (("devices", 1), ("days", 0.0)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= 1e7:
            raise UsageError(f"--{name} cannot be that", field=name, value=value, hint="It is above 0")
    return Wish(
        devices=arguments.devices,
        days=arguments.days,
        traces=arguments.traces,
        crypto=arguments.crypto,
        faults=arguments.faults == "on",
        check=arguments.check,
        bundle=bundle,
        data=data,
    )


def _world(arguments: argparse.Namespace) -> int:
    from firmware_sim.pages.screen import Screen
    from firmware_sim.pages.world_report import print_world
    from firmware_sim.scenario import load_scenario
    from firmware_sim.simulate import keep, simulate
    from firmware_sim.world.outcome import encode_world

    wish = wish_of(arguments)
    scenario = load_scenario(arguments.scenario)
    with Screen() as screen:
        run = simulate(scenario, wish, arguments.seed, screen)
    keep(run.result, arguments.out)
    if arguments.json:
        print(encode_world(run.result).decode(), end="")
    else:
        print_world(run.result, arguments.out)
    if run.broken is not None:
        raise run.broken
    return 130 if run.stopped else 0


def _scenarios(arguments: argparse.Namespace) -> int:
    from firmware_sim import scenario

    if arguments.name:
        print(scenario.ready_text(arguments.name), end="")
    elif arguments.boards:
        _print_boards()
    elif arguments.faults:
        from firmware_sim.faults.strikes import FAULTS

        for kind in FAULTS.values():
            print(f"{kind.name:<18} {kind.what} (a day{' and device' if kind.unit == 'device' else ''})")
    else:
        for name in scenario.ready():
            found = scenario.load_scenario(name)
            print(f"{name:<10} {found.devices:>6,} devices, {found.days:g} d  {found.about}")
    return 0


def _print_boards() -> None:
    from firmware_sim.parts.board import BOARDS

    print(f"{'name':<12} {'board':<18} {'MB':>7} {'tokens/s':>9} {'watts':>12} {'US$':>5}")
    for board in BOARDS.values():
        watts = f"{board.idle_watts:g} to {board.load_watts:g}"
        print(
            f"{board.name:<12} {board.label:<18} {board.memory_mb:>7,} {board.tokens_per_second:>9,.0f} "
            f"{watts:>12} {board.price:>5,.0f}"
        )
