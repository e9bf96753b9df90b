"""Loss by bytes of the federated rules at equal steps: each through the shipped codec, over several batch orders.

Rates are each rule's own default (`fedge.rules.RATES`). `ffa, upper half` adapts the upper half of the layers alone.
Bytes are a device's payload in all rounds, 16-bit words first and 8-bit ones then, as the hub would name them.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from kept import Kept
from people import Bench, bytes_of, loss_of
from report import Row, progress

from fedge.messages import Training
from fedge.rules import RATES
from fedge.update.report import report_layout
from firmware_sim.processes.reference import Reference, federated

BASELINE = "fedit"
HALF = "ffa, upper half"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    rule: str
    upper_half: bool = False


CASES = (
    Case("ffa", "ffa"),
    Case(BASELINE, "fedit"),
    Case(HALF, "ffa", upper_half=True),
    Case("alternating", "alternating"),
    Case("core", "core"),
    Case("sketch", "sketch"),
)


def training_of(rule: str, seed: int) -> Training:
    """The campaign of one order: seed of A and of the batches."""
    a_seed = hashlib.sha256(f"learning/{seed}".encode()).digest()[:16]
    return Training(rule=rule, rate=RATES[rule], a_seed=a_seed, data_seed=seed)


def train_case(bench: Bench, kept: Kept, case: Case, seed: int) -> dict[str, Any]:
    """Losses of everybody (`[nats, labels]` by person), bytes up and the adapter file (base64) of one run."""
    training = training_of(case.rule, seed)
    layers = bench.bundle.manifest.layers
    plan = bench.plan(training, depth=layers // 2 if case.upper_half else 0)

    def make() -> dict[str, Any]:
        done = federated(
            plan,
            bench.scale.bloc_devices,
            codec=True,
            seed=seed,
            processes=bench.processes,
            progress=lambda n, of: progress(f"{case.name}, order {seed}: round {n}/{of}"),
        )
        return {
            "losses": {
                name: [one.nll, one.labels] for name, one in bench.losses(done.adapter, training).items()
            },
            "bytes_up": _upper_bytes(bench, done) if case.upper_half else done.bytes_up,
            "wrapped": done.wrapped,
            "training_loss": list(done.training_loss),
            "adapter": base64.b64encode(done.adapter).decode(),
        }

    facts = {"case": case.name, "training": training, **bench.facts}
    return kept.result(f"rule {case.name} {seed}".replace(",", ""), facts, make)


def _upper_bytes(bench: Bench, done: Reference) -> int:
    """What a device sends whose bundle was made for the upper half (`fedge quantize --lora-layers`).

    Here the lower half travels along as zeros, which changes no result.
    """
    manifest = bench.bundle.manifest
    upper = tuple(range(manifest.layers // 2, manifest.layers))
    numbers = manifest.layout.like(msgspec.structs.replace(manifest.lora, layers=upper)).numbers
    bits = {figures.round: figures.bits for figures in done.sums}
    return sum(report_layout(numbers, width).size for width in bits.values())


def rule_rows(bench: Bench, kept: Kept, seeds: list[int], names: Sequence[str]) -> list[Row]:
    """The table of the cases called `names`, and the goals about them. Order by order, so that a run that is stopped
    has whole orders.
    """
    cases = [case for case in CASES if case.name in names]
    found = {(case.name, seed): train_case(bench, kept, case, seed) for seed in seeds for case in cases}
    rows = []
    baseline = found.get((BASELINE, seeds[0]))
    for case in cases:
        runs = [found[case.name, seed] for seed in seeds]
        for group, people in bench.groups.items():
            losses = [loss_of(run, people) for run in runs]
            rows.append(Row.of("rule_heldout_loss_nats", f"{case.name}, {group}", losses, "nats"))
        rows.append(
            Row.of(
                "rule_bytes_up",
                case.name,
                [bytes_of(run) for run in runs],
                "bytes a device",
                baseline=BASELINE,
                baseline_value=bytes_of(baseline) if baseline else None,
            )
        )
    part, orders = bench.groups["took part"], f"mean over {len(seeds)} orders"

    def gap(one: str, other: str, name: str, goal: str | None = None) -> list[Row]:
        if not {one, other} <= set(names):
            return []
        gaps = [loss_of(found[one, seed], part) - loss_of(found[other, seed], part) for seed in seeds]
        return [Row.of("rule_gap_nats", f"{name}, {orders}", [statistics.fmean(gaps)], "nats", goal=goal)]

    rows += gap("ffa", BASELINE, f"ffa to {BASELINE}", "<= 0.03")
    if baseline and "ffa" in names:
        share = bytes_of(found["ffa", seeds[0]]) / bytes_of(baseline)
        rows.append(Row.of("rule_bytes_share", f"ffa of {BASELINE}", [share], "ratio", goal="<= 0.41"))
    return rows + gap(HALF, "ffa", "upper half to all layers")
