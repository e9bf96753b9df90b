"""What federating, compressing and masking cost in held-out loss, on a real model and real people's messages.

SmolLM2-135M in 4 bits, BYU chit-chat by person, the demo's own settings. Four adapters: none; the fleet's rounds with
float deltas; the same rounds through the shipped codec (clip, 16 bits and then 8); and the pooled reference of equal
data and equal compute. Masks cancel exactly and are left out. Seeds of the runs are --seed, --seed + 1, and so on.
A full run makes 640 steps of a device for each of the three trained adapters.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

for _variable in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
):  # before numpy loads its BLAS; children inherit it
    os.environ[_variable] = "1"

from kept import Kept  # noqa: E402
from learning_personal import personal_rows  # noqa: E402
from learning_rules import CASES, rule_rows, training_of  # noqa: E402
from learning_steps import step_rows  # noqa: E402
from people import QUICK, Bench, Scale, make_bundle, told  # noqa: E402
from report import Row, parser, print_report  # noqa: E402

from fedge.messages import Training  # noqa: E402
from firmware_sim.processes.evaluation import PersonLoss, pooled, spread  # noqa: E402
from firmware_sim.processes.reference import Reference, federated  # noqa: E402
from firmware_sim.processes.reference import pooled as pooled_reference  # noqa: E402

EARLIER = "prototype, seeds 2 and 3"
PARTS = ("codec", "rules", "personal", "steps")


@dataclass(frozen=True, slots=True)
class Losses:
    """Of every person under one adapter; those who took part and those never seen."""

    part: dict[str, PersonLoss]
    unseen: dict[str, PersonLoss]

    def of(self, group: str) -> dict[str, PersonLoss]:
        """The group called "took part" or "never seen"."""
        return self.part if group == "took part" else self.unseen


@dataclass(frozen=True, slots=True)
class Run:
    """Everything measured with one seed."""

    zero: Losses
    exact: Losses
    coded: Losses
    pooled: Losses
    reference: Reference  # of the coded run
    cpu: dict[str, float]


def main() -> None:
    flags = parser(__doc__.split("\n")[0], runs=1, seed=2)
    flags.add_argument("--bundle", type=Path, help="a SmolLM2-135M bundle; made anew when left out")
    flags.add_argument("--fast-bundle", type=Path, help="one in int8c; made anew when left out")
    flags.add_argument(
        "--train-fast",
        action="store_true",
        help="devices train on the int8c one; losses are of the exact one",
    )
    flags.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    flags.add_argument("--part", action="append", choices=PARTS, help="which tables (all)")
    flags.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="which of the rules (all)"
    )
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep finished runs here, and go on from them"
    )
    flags.add_argument("--devices", type=int, default=16, metavar="N", help="blocs of 8 people (16)")
    args = flags.parse_args()
    scale = QUICK if args.quick else Scale(devices=args.devices)
    wanted = args.part or PARTS
    seeds = [args.seed + place for place in range(args.runs)]
    with tempfile.TemporaryDirectory(prefix="fedge-learning-") as folder:
        fast = args.fast_bundle
        if args.train_fast and fast is None:
            fast = make_bundle(Path(folder) / "fast", "int8c")
        bench = Bench(
            args.bundle, scale, Path(folder), args.processes, trained=fast if args.train_fast else None
        )
        kept, found = Kept(args.keep), list[Row]()
        if "codec" in wanted:
            found += rows(CodecBench(bench).runs(seeds))
        if "rules" in wanted:
            found += rule_rows(bench, kept, seeds, args.case or [case.name for case in CASES])
        if "personal" in wanted:
            found += personal_rows(bench, kept, args.seed)
        if "steps" in wanted:
            found += step_rows(bench, kept, seeds, fast, quick=args.quick)
    print_report("learning", found, args)


class CodecBench:
    """The adapters that show what federating and compressing cost."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._zero = self._measure(bytes(4 * bench.bundle.layout.numbers), Training())  # whatever A is

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """One for each seed."""
        return [self.run(seed) for seed in seeds]

    def run(self, seed: int) -> Run:
        """Train and measure three adapters."""
        scale, processes, cpu = self._bench.scale, self._bench.processes, {}
        training = training_of("ffa", seed)
        plan = self._bench.plan(training)
        work: dict[str, Callable[[], Reference]] = {
            "float": lambda: federated(
                plan, scale.bloc_devices, codec=False, processes=processes, progress=told("float")
            ),
            "8 bits": lambda: federated(
                plan,
                scale.bloc_devices,
                codec=True,
                seed=seed,
                processes=processes,
                progress=told("8 bits"),
            ),
            "pooled": lambda: pooled_reference(plan, processes=processes, progress=told("pooled")),
        }
        found = {}
        for name, train in work.items():
            before = _children_cpu()
            found[name] = train()
            cpu[name] = _children_cpu() - before
        losses = {name: self._measure(found[name].adapter, training) for name in found}
        return Run(self._zero, losses["float"], losses["8 bits"], losses["pooled"], found["8 bits"], cpu)

    def _measure(self, adapter: bytes, training: Training) -> Losses:
        found, groups = self._bench.losses(adapter, training), self._bench.groups
        return Losses(
            {name: found[name] for name in groups["took part"]},
            {name: found[name] for name in groups["never seen"]},
        )


def rows(runs: Sequence[Run]) -> list[Row]:
    """All figures, each over the runs."""
    found: list[Row] = []
    goals = {"took part": ("<= 3.85", ">= 0.75"), "never seen": ("<= 3.90", ">= 0.72")}
    for group, (loss_goal, drop_goal) in goals.items():

        def token(pick: Callable[[Run], Losses], group: str = group) -> list[float]:
            return [pooled(pick(run).of(group).values()) for run in runs]

        zero, exact = token(lambda run: run.zero), token(lambda run: run.exact)
        coded, reference = token(lambda run: run.coded), token(lambda run: run.pooled)
        found += [
            Row.of("heldout_loss_nats", f"zero-shot, {group}", zero, "nats"),
            Row.of("heldout_loss_nats", f"float, {group}", exact, "nats"),
            Row.of(
                "heldout_loss_nats",
                f"8 bits and clip, {group}",
                coded,
                "nats",
                goal=loss_goal,
                baseline="zero-shot",
                baseline_value=zero[0],
            ),
            Row.of("heldout_loss_nats", f"pooled, {group}", reference, "nats"),
            Row.of("heldout_drop_nats", group, _gaps(zero, coded), "nats", goal=drop_goal, baseline=EARLIER),
            Row.of(
                "codec_gap_nats", group, _apart(coded, exact), "nats", goal="<= 0.02", baseline="float deltas"
            ),
            Row.of(
                "pooled_gap_nats", group, _apart(coded, reference), "nats", goal="<= 0.05", baseline="pooled"
            ),
            *_spread_rows(runs, group),
        ]
    return found + _codec_rows(runs) + _cpu_rows(runs)


def _spread_rows(runs: Sequence[Run], group: str) -> list[Row]:
    spreads = [spread(_pairs(run.zero.of(group), run.coded.of(group))) for run in runs]
    return [
        Row.of("drop_sd_nats", f"over people, {group}", [found.sd for found in spreads], "nats"),
        Row.of(
            "smallest_drop_nats",
            f"over people, {group}",
            [found.smallest for found in spreads],
            "nats",
            goal=">= 0.35",
        ),
        Row.of(
            "people_not_improved_count",
            group,
            [float(found.people - found.improved) for found in spreads],
            "people",
            goal="== 0",
        ),
    ]


def _codec_rows(runs: Sequence[Run]) -> list[Row]:
    found = []
    for bits, goal in ((16, "<= 0.015"), (8, "<= 0.006")):
        sums = [figures for run in runs for figures in run.reference.sums if figures.bits == bits]
        if sums:
            predicted = sum(figures.predicted for figures in sums) / len(sums)
            found.append(
                Row.of(
                    "sum_error_energy_ratio",
                    f"decoded sum against the plain one, {bits} bits",
                    [figures.error for figures in sums],
                    "of the sum's energy",
                    goal=goal,
                    baseline="predicted",
                    baseline_value=predicted,
                )
            )
    wrapped = [float(run.reference.wrapped) for run in runs]
    return [*found, Row.of("sums_wrapped_count", "8 bits and clip", wrapped, "sums", goal="== 0")]


def _cpu_rows(runs: Sequence[Run]) -> list[Row]:
    return [
        Row.of(
            "training_cpu_s",
            name,
            [run.cpu[name] for run in runs],
            "s",
            goal="<= 360" if name == "8 bits" else None,
        )
        for name in runs[0].cpu
    ]


def _pairs(before: Mapping[str, PersonLoss], after: Mapping[str, PersonLoss]) -> list[tuple[float, float]]:
    return [(before[name].per_token, after[name].per_token) for name in before]


def _gaps(high: Sequence[float], low: Sequence[float]) -> list[float]:
    return [above - below for above, below in zip(high, low, strict=True)]


def _apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(gap) for gap in _gaps(one, other)]


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
