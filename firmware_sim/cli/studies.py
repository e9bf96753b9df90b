"""`fedge sim compare`, `plan` and `fits`: questions that take several runs or recorded fleets to answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firmware_sim.cli.world import add_fleet_flags, wish_of

if TYPE_CHECKING:
    from firmware_sim.compare import Side
    from firmware_sim.pages.compare_report import Comparison
    from firmware_sim.scenario import Scenario
    from firmware_sim.simulate import Wish

_COMPARE_EPILOG: Final = """\
examples:
  fedge sim compare runs/before runs/after            folders that `fedge sim world --out` has written
  fedge sim compare lab my.toml --seeds 5             scenarios, each run with 5 seeds

What comes out, in the folder --out: compare.html (all runs in each chart), compare.json, and of scenarios a folder for
each run. Ratios are over runs of the same seed; one that is not the same on every seed is told as unclear.
"""
_PLAN_EPILOG: Final = """\
examples:
  fedge sim plan vineyard --buy pi5=40 --instead orin=20
  fedge sim plan my.toml --buy pi4=60 pi5=10 --instead pi5=40 --seeds 5
  fedge sim plan city --buy pi5=40 --instead orin=20 --beside --where crossings
                                                      beside the boards that the scenario has, on the poles

What comes out: for both fleets the price, hours and energy to the same loss, participation and heat, over the same
seeds; a verdict with its spread; and, in the folder --out, plan's page (compare.html) and every run.
"""

_FITS_EPILOG: Final = """\
examples:
  fedge sim fits --traces DIR           each model, its parameters, and how far it is from the traces
  fedge sim world phones --traces DIR   the same traces instead of the models
"""


def register(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `compare`, `plan` and `fits`. Imports nothing heavy."""
    compare = _parser(words, "compare", "two to four runs or scenarios beside each other", _COMPARE_EPILOG)
    compare.add_argument(
        "sides", nargs="+", metavar="RUN", help="a folder with results, a ready scenario or a .toml file"
    )
    _add_study_flags(compare, "fedge-compare")
    compare.set_defaults(run=_compare)
    plan = _parser(words, "plan", "which boards to buy: two fleets, one campaign", _PLAN_EPILOG)
    plan.add_argument("scenario", metavar="SCENARIO", help="a ready scenario's name, or a .toml file")
    for flag, about in (
        ("--buy", "the boards, as BOARD=NUMBER"),
        ("--instead", "those you could buy instead"),
    ):
        plan.add_argument(flag, nargs="+", required=True, metavar="BOARD=N", help=about)
    plan.add_argument(
        "--beside", action="store_true", help="beside the scenario's own devices (default: alone)"
    )
    plan.add_argument(
        "--where", default="", metavar="GROUP", help="in the place of this group of the scenario"
    )
    plan.add_argument(
        "--target", type=float, metavar="LOSS", help="loss to reach (nine tenths of the way to where all end)"
    )
    _add_study_flags(plan, "fedge-plan")
    plan.set_defaults(run=_plan)
    fits = _parser(
        words, "fits", "models of presence, links and heat fitted to recorded traces", _FITS_EPILOG
    )
    fits.add_argument("--traces", type=Path, required=True, metavar="PATH", help="a trace file or a folder")
    fits.add_argument("--json", action="store_true", help="print the fits as JSON on standard output")
    fits.set_defaults(run=_fits)


def _parser(
    words: argparse._SubParsersAction[argparse.ArgumentParser], word: str, about: str, epilog: str
) -> argparse.ArgumentParser:
    return words.add_parser(
        word, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _add_study_flags(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (0)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each scenario (3)")
    add_fleet_flags(parser)
    parser.add_argument(
        "--out", type=Path, default=Path(folder), metavar="DIR", help=f"the folder ({folder})"
    )
    parser.add_argument("--json", action="store_true", help="print compare.json on standard output")


def _compare(arguments: argparse.Namespace) -> int:
    from firmware_sim.compare import common_target, load_side, require_sides, told_apart
    from firmware_sim.pages.compare_report import compared
    from firmware_sim.scenario import load_scenario

    wish, seeds = wish_of(arguments), _seeds(arguments)
    sources = arguments.sides
    require_sides(len(sources))
    scenarios = {text: load_scenario(text) for text in sources if not Path(text).is_dir()}
    sides = []
    for place, text in enumerate(sources, 1):
        if text in scenarios:
            folder = arguments.out / f"{place}-{scenarios[text].name}"
            sides.append(_run_side(Path(text).stem, scenarios[text], wish, seeds, folder))
        else:
            sides.append(load_side(Path(text)))
    sides = told_apart(sides)
    names = " and ".join(side.name for side in sides)
    return _tell(arguments, compared(f"Compared: {names}", sides, common_target(sides)))


def _plan(arguments: argparse.Namespace) -> int:
    from firmware_sim import plan
    from firmware_sim.scenario import load_scenario

    wish, seeds = wish_of(arguments), _seeds(arguments)
    scenario = load_scenario(arguments.scenario)
    purchases = [plan.parse_purchase(words) for words in (arguments.buy, arguments.instead)]
    fleets = [
        plan.bought(scenario, boards, where=arguments.where, beside=arguments.beside) for boards in purchases
    ]
    sides = [
        _run_side(plan.purchase_text(boards), fleet, wish, seeds, arguments.out / folder)
        for boards, fleet, folder in zip(purchases, fleets, ("buy", "instead"), strict=True)
    ]
    return _tell(arguments, plan.answer(scenario, purchases, sides, arguments.target))


def _fits(arguments: argparse.Namespace) -> int:
    from firmware_sim.traces import fits

    return fits.main(["--traces", str(arguments.traces), *(["--json"] if arguments.json else [])])


def _seeds(arguments: argparse.Namespace) -> range:
    from fedge.errors import UsageError

    if not 1 <= arguments.seeds <= 1_000:
        raise UsageError(
            "--seeds cannot be that", field="seeds", value=arguments.seeds, hint="It is 1 to 1,000"
        )
    return range(arguments.seed, arguments.seed + arguments.seeds)


def _run_side(name: str, scenario: Scenario, wish: Wish, seeds: range, folder: Path) -> Side:
    """One run for each seed, each kept in a folder of its own as soon as it is there."""
    from firmware_sim.compare import Side
    from firmware_sim.pages.screen import Screen
    from firmware_sim.simulate import keep, simulate

    runs = []
    for seed in seeds:
        with Screen() as screen:
            run = simulate(scenario, wish, seed, screen)
        keep(run.result, folder / f"seed-{seed}")
        if run.broken is not None:
            raise run.broken
        if run.stopped:
            raise KeyboardInterrupt
        runs.append(run.result)
    return Side(name, tuple(runs))


def _tell(arguments: argparse.Namespace, found: Comparison) -> int:
    from firmware_sim.pages.compare_report import encode_comparison, print_comparison, write_comparison

    write_comparison(found, arguments.out)
    if arguments.json:
        print(encode_comparison(found).decode(), end="")
    else:
        print_comparison(found, arguments.out)
    return 0
