"""What the scheduler is worth under the bloc law: the shipped hub and agents in a world, lawless schedulers beside it.

600 devices for twelve virtual hours, the same devices, data and rate of power cuts for all. Ours opens whole blocs or
nothing and never sees a single loss; random, Oort and Power-of-Choice take whom they like and are charged for no
messages, keys or masks. A target counts for ours when the mean of three evaluations is below it, for them at the first
hit; what they do not reach counts as twelve hours, what ours does not reach as a speed of 0. Presence and links are
those of the FedScale subset where it is at hand (--traces, or ../shared/data beside the checkout), else generative
models; `case` says which. `--reach` prints instead what would bring more devices of the phone fleet in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from report import ROOT, Row, parser, print_report, progress

from firmware_sim.faults.strikes import Faults
from firmware_sim.parts.draw import DeviceParts, draw
from firmware_sim.scenario import Scenario
from firmware_sim.study import reach
from firmware_sim.study.baselines import BASELINES, run_baseline
from firmware_sim.study.conditions import CONDITIONS, DEVICES, HOURS, Condition, study
from firmware_sim.study.figures import Figures, Reached, of_lawless, of_world
from firmware_sim.traces import recorded
from firmware_sim.traces.recorded import Traces
from firmware_sim.world.tasks import Mlp, fleet_task
from firmware_sim.world.world import World
from hub import effects
from hub.effects import LedgerEntry

BESIDE: Final = ROOT.parent / "shared/data/traces/fedscale_subset"


@dataclass(frozen=True, slots=True)
class Goals:
    """What a condition must reach; None: no promise."""

    speed: str | None = None
    speed_over_tuned: str | None = None
    energy: str | None = None
    opened: str | None = None
    jain: str | None = None
    never: str | None = None
    slowest: str | None = None
    rare: str | None = None


GOALS: Final[dict[Condition, Goals]] = {
    "phone": Goals(">= 2.0", ">= 1.5", "<= 0.75", ">= 0.95", ">= 0.45", "<= 0.32", ">= 0.6", ">= 0.80"),
    "mains": Goals(">= 2.0", ">= 1.5", "<= 0.70", ">= 0.98", ">= 0.95", "<= 0", ">= 0.8", ">= 0.83"),
    "churn": Goals(opened=">= 0.85"),
}
TUNED: Final = ("oort", "random-rate-2")


def main() -> None:
    flags = parser(__doc__ or "", runs=5, seed=1)
    flags.add_argument("--traces", type=Path, help="recorded presence and bandwidth")
    flags.add_argument("--reach", action="store_true", help="the reach study, on the phone fleet")
    flags.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    args = flags.parse_args()
    if args.quick:
        args.runs = 1
    path = args.traces or (BESIDE if BESIDE.is_dir() else None)
    progress(f"presence and links: {path.name if path else 'generative models'}")
    lab = Lab(args, recorded.load(path) if path else None, path.name if path else "generative")
    print_report("scheduler", list(lab.reach_rows() if args.reach else lab.rows()), args)


class Lab:
    """The runs of one call."""

    def __init__(self, args: argparse.Namespace, traces: Traces | None, source: str) -> None:
        self.traces, self.source = traces, source
        self.seeds = range(args.seed, args.seed + args.runs)
        self.conditions: Sequence[Condition] = args.conditions
        self.devices, self.hours = (160, 3.0) if args.quick else (DEVICES, HOURS)

    def rows(self) -> Iterator[Row]:
        """The table: each condition, ours and the baselines over all seeds."""
        for condition in self.conditions:
            scenario = self.scenario(condition)
            ours: list[Figures] = []
            torn: list[float] = []
            lawless: dict[str, list[Figures]] = {name: [] for name in BASELINES}
            for seed in self.seeds:
                figures, sums = self.world(scenario, seed)
                ours.append(figures)
                torn.append(sums)
                progress(f"{condition}, seed {seed}: {told(figures)}")
                for name in BASELINES:
                    lawless[name].append(self.baseline(name, scenario, seed))
            case = f"{condition}, {self.source}"
            yield from speeds(case, GOALS[condition], ours, lawless, self.hours)
            yield from shares(case, GOALS[condition], ours, lawless["random"])
            yield Row.of("starving_hours", case, [run.starving for run in ours], "h")
            yield Row.of("sums_of_no_whole_bloc_count", case, torn, "sums", goal="== 0")

    def reach_rows(self) -> Iterator[Row]:
        """The reach study: one knob turned at a time."""
        for case in reach.CASES:
            scenario = case.scenario(self.scenario("phone"))
            runs = [self.reach_run(case, scenario, seed) for seed in self.seeds]
            name = f"{case.name}; phone, {self.source}"
            yield Row.of("time_to_loss_0.45_hours", name, hours(runs, self.hours), "h")
            yield from shares(name, Goals(), runs, None)

    def reach_run(self, case: reach.Case, scenario: Scenario, seed: int) -> Figures:
        """One seed of a case. A campaign that starts later has as many hours as the others."""
        longer = msgspec.structs.replace(scenario, days=(self.hours + scenario.campaign.start_hour) / 24)
        habit = reach.habits(self.fleet(longer, seed)) if case.habit else None
        with reach.formed_by_habit(habit) if habit else nullcontext():
            figures, _ = self.world(longer, seed)
        progress(f"{case.name}, seed {seed}: {told(figures)}")
        return figures

    # ------------------------------------------------------------ runs
    def scenario(self, condition: Condition) -> Scenario:
        made = study(condition, traces=self.traces is not None)
        return msgspec.structs.replace(made, devices=self.devices, days=self.hours / 24)

    def fleet(self, scenario: Scenario, seed: int) -> list[DeviceParts]:
        return list(draw(scenario, self.devices, seed, self.traces))

    def task(self, scenario: Scenario, seed: int) -> Mlp:
        task = fleet_task("mlp", self.fleet(scenario, seed), seed)
        assert isinstance(task, Mlp)
        return task

    def world(self, scenario: Scenario, seed: int) -> tuple[Figures, int]:
        """A world's figures, and how many sums it opened that were not exactly one whole bloc."""
        world = World(
            scenario,
            devices=self.devices,
            days=scenario.days,
            seed=seed,
            traces=self.traces,
            faults=Faults(scenario.faults, seed, self.devices, scenario.days) if scenario.faults else None,
        )
        torn = 0

        def look(_world: World, _number: int, effect: object) -> None:
            nonlocal torn
            row = effect.row if isinstance(effect, effects.Save) else None
            if isinstance(row, LedgerEntry) and row.kind == "opened":
                torn += row.detail["devices"] != scenario.campaign.bloc

        world.watch(effects.Save, look)
        return of_world(world.run(), scenario.campaign.start_hour), torn

    def baseline(self, name: str, scenario: Scenario, seed: int) -> Figures:
        task = self.task(scenario, seed)
        return of_lawless(run_baseline(name, scenario, lambda: self.fleet(scenario, seed), seed, task))


def told(figures: Figures) -> str:
    """One line for whoever waits."""
    when, rounds = figures.target, figures.rounds
    return (
        f"loss 0.45 {f'after {when.hour:.2f} h' if when else 'never'}, {rounds.opened} of {rounds.tried} rounds, "
        f"yield {rounds.yield_ or 0:.3f}, Jain {rounds.jain or 0:.2f}, never served {rounds.never_served or 0:.2f}"
    )


# ---------------------------------------------------------------- rows
def hours(runs: Sequence[Figures], ends: float, which: str = "target") -> list[float]:
    """When each run reached its target; what was not reached counts as all the time there was."""
    found: list[Reached | None] = [getattr(run, which) for run in runs]
    return [reached.hour if reached else ends for reached in found]


def speeds(
    case: str, goals: Goals, ours: Sequence[Figures], lawless: Mapping[str, Sequence[Figures]], ends: float
) -> Iterator[Row]:
    """How soon, how much sooner than each baseline, and with how much less energy."""
    random = lawless["random"]
    for figure, which in (("time_to_loss_0.45_hours", "target"), ("time_to_loss_0.38_hours", "deep")):
        theirs = median(hours(random, ends, which))
        yield Row.of(figure, case, hours(ours, ends, which), "h", baseline="random", baseline_value=theirs)
    reached = [float(run.target is not None) for run in ours]
    yield Row.of("loss_0.45_reached_share", case, [sum(reached) / len(reached)], "share")
    each = [
        other / own if run.target else 0.0
        for run, own, other in zip(ours, hours(ours, ends), hours(random, ends), strict=True)
    ]
    spread = (min(each), max(each))
    yield Row("speed_over_random_worst_seed_ratio", case, min(each), spread, "x", goals.speed, "random")
    all_there = median(reached) == 1.0
    for name, runs in lawless.items():
        ratio = median(hours(runs, ends)) / median(hours(ours, ends)) if all_there else 0.0
        goal = goals.speed_over_tuned if name in TUNED else None
        figure = f"speed_over_{name.replace('-', '_')}_medians_ratio"
        yield Row.of(figure, case, [ratio], "x", goal=goal, baseline=name)
    spent = [run.target.energy_kj for run in ours if run.target]
    theirs_spent = [run.target.energy_kj for run in random if run.target]
    if spent and theirs_spent:
        energy = median(spent)
        base = median(theirs_spent)
        yield Row.of("energy_to_loss_0.45_kj", case, spent, "kJ", baseline="random", baseline_value=base)
        yield Row.of("energy_over_random_ratio", case, [energy / base], "x", goal=goals.energy)


def shares(
    case: str, goals: Goals, ours: Sequence[Figures], random: Sequence[Figures] | None
) -> Iterator[Row]:
    """What became of the work, and who took part; beside it random's, where it was run."""
    lost = "<= 0.03" if goals.opened else None
    columns: tuple[tuple[str, str, str | None, Callable[[Figures], float | None]], ...] = (
        ("opened_of_finished_share", "share", goals.opened, lambda run: run.rounds.yield_),
        ("dropped_share", "share", lost, lambda run: run.rounds.drop),
        ("wasted_energy_share", "share", lost, lambda run: run.rounds.waste),
        ("jain_index", "index", goals.jain, lambda run: run.rounds.jain),
        ("never_served_share", "share", goals.never, lambda run: run.rounds.never_served),
        ("zero_2w_participation_ratio", "x", goals.slowest, lambda run: run.slowest),
        ("rare_class_accuracy_share", "share", goals.rare, lambda run: run.rare),
    )
    for figure, unit, goal, value in columns:
        found = [value(run) or 0.0 for run in ours]
        if random is None:
            yield Row.of(figure, case, found, unit, goal=goal)
            continue
        base = median(value(run) or 0.0 for run in random)
        yield Row.of(figure, case, found, unit, goal=goal, baseline="random", baseline_value=base)


if __name__ == "__main__":
    main()
