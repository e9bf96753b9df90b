"""Held-out loss after 40 and 80 steps on pooled messages: our trainer beside torch and peft, over several batch orders.

A and B of q and v train by AdamW, four messages a step; every side gets the same start and the same batches. Exact is
the bundle's own 4-bit grid, `fast` is int8 weights and int8 activations, upper half is the exact one with the upper
half of its layers trained. torch has the source's own float32 weights. One order alone moves a loss by more than what
is to be told apart, so gaps are means over the orders.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from kept import Kept
from numpy.typing import NDArray
from people import MODEL, Bench, make_bundle
from report import Row, progress

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import Batch, evaluation_batches, make_batch
from edge_agent.dataset import Row as DataRow
from edge_agent.personal import mean_loss
from edge_agent.planner import Plan
from edge_agent.trainer import Trainer
from edge_agent.trainer.round import train_round
from edge_agent.trainer.rules import Factors
from edge_agent.trainer.state import TrainState
from fedge.io.peft_folder import export_peft
from fedge.messages import Training
from fedge.rules import Fedit

MARKS: Final = (40, 80)
QUICK_MARKS: Final = (2, 4)
RATE: Final = 0.004  # of one who trains alone (learning_personal.py)
BATCH_ROWS: Final = 4
EVALUATION_ROWS: Final = 12
A_SEED: Final = bytes(16)
DECAY: Final = 0.01

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: which bundle trains, and how many of its layers."""

    name: str
    fast: bool = False
    upper_half: bool = False


EXACT, FAST, HALF = Case("exact"), Case("fast", fast=True), Case("exact, upper half", upper_half=True)
TORCH = Case("torch + peft float32")
CASES: Final = (EXACT, FAST, HALF, TORCH)


@dataclass(frozen=True, slots=True)
class Order:
    """The batches of one order, and what everybody is measured on."""

    train: list[Batch]
    heldout: list[Batch]
    marks: tuple[int, ...]


def step_rows(bench: Bench, kept: Kept, seeds: Sequence[int], fast: Path | None, *, quick: bool) -> list[Row]:
    """The losses at the marks, and the gaps: to torch, and to the exact path."""
    folders = {False: bench.bundle.folder, True: fast or make_bundle(bench.folder / "fast", "int8c")}
    bundles = {which: open_bundle(folder) for which, folder in folders.items()}
    marks = QUICK_MARKS if quick else MARKS
    found: dict[tuple[str, int], list[float]] = {}
    for seed in seeds:
        order = _order(bench, seed, marks)
        for case in CASES:
            bundle = bundles[case.fast]
            facts = {"case": case.name, "order": seed, "rate": RATE, "marks": marks, **bench.facts}
            facts["trained"] = bundle.stamp.manifest_sha256.hex()
            made = kept.result(
                f"steps {case.name} {seed}".replace(",", ""),
                facts,
                lambda case=case, bundle=bundle, order=order: {"losses": _train(bench, bundle, case, order)},
            )
            found[case.name, seed] = made["losses"]
            progress(f"{case.name}, order {seed}: {made['losses']}")
    return list(_table(found, seeds, marks))


def _table(
    found: Mapping[tuple[str, int], list[float]], seeds: Sequence[int], marks: tuple[int, ...]
) -> Iterator[Row]:
    orders = f"mean over {len(seeds)} orders"
    for place, mark in enumerate(marks):

        def gap(one: str, other: str, place: int = place) -> list[float]:
            return [statistics.fmean(found[one, s][place] - found[other, s][place] for s in seeds)]

        for name in (case.name for case in CASES):
            losses = [found[name, seed][place] for seed in seeds]
            torch = statistics.median(found[TORCH.name, seed][place] for seed in seeds)
            yield Row.of(
                "steps_heldout_loss_nats",
                f"{name}, {mark} steps",
                losses,
                "nats",
                baseline=TORCH.name,
                baseline_value=torch,
            )
        for name, other, goal in (
            (EXACT.name, TORCH.name, "<= 0.02"),
            (FAST.name, TORCH.name, "<= 0.02"),
            (FAST.name, EXACT.name, "<= 0.02"),
            (HALF.name, EXACT.name, "<= 0.04"),
        ):
            case = f"{name} to {other}, {mark} steps, {orders}"
            yield Row.of("steps_gap_nats", case, gap(name, other), "nats", goal=goal)


def _order(bench: Bench, seed: int, marks: tuple[int, ...]) -> Order:
    """Messages of all who take part in one pool, drawn anew for each step."""
    manifest, training = bench.bundle.manifest, Training()

    def rows(name: str) -> list[DataRow]:
        return [row for person in bench.groups["took part"] for row in bench.rows(person, name, training)]

    pool, draw = rows("train"), random.Random(seed)
    measured = evaluation_batches(rows("heldout"), size=EVALUATION_ROWS, pad_id=manifest.pad_id)
    return Order(
        [make_batch(draw.sample(pool, BATCH_ROWS), manifest.pad_id) for _ in range(marks[-1])],
        [batch for _, batch in measured],
        marks,
    )


def _train(bench: Bench, bundle: Bundle, case: Case, order: Order) -> list[float]:
    return _torch(bench, order) if case == TORCH else _ours(bundle, case, order)


def _ours(bundle: Bundle, case: Case, order: Order) -> list[float]:
    layers = bundle.manifest.layers
    keeps = "block_bwd_keep.onnx" in bundle.manifest.files  # the same bits in less time
    trainer = Trainer(bundle, a_seed=A_SEED, plan=Plan(keep=layers if keeps else 0))
    rule = Fedit(trainer.layout, A_SEED)
    local = Factors(rule, rule.initial(), rule.both)
    losses: list[float] = []

    def measure(state: TrainState) -> None:
        if state.progress.optimizer_steps in order.marks:
            losses.append(mean_loss(trainer, local.feeds(state.vector), order.heldout))

    train_round(
        trainer,
        local.start,
        order.train,
        a_seed=A_SEED,
        lr=RATE,
        weight_decay=DECAY,
        depth=layers // 2 if case.upper_half else 0,
        rule=local,
        keep=measure,
    )
    return losses


def _torch(bench: Bench, order: Order) -> list[float]:
    """The same from the source: our start is its start, by way of an exported adapter."""
    import torch
    from peft import PeftModel

    from quantize.source import load

    torch.set_num_threads(1)
    bundle, folder = bench.bundle, bench.folder / "start"
    rule = Fedit(bundle.layout, A_SEED)
    export_peft(
        folder,
        rule.tensors(rule.initial()),
        bundle.manifest.lora,
        bundle.manifest,
        bundle.folder / "weights.bin",
        layout=bundle.layout,
    )
    base = load(MODEL).model.float()
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)

    def loss(batch: Batch, reduction: str) -> Any:
        logits = model(
            input_ids=torch.from_numpy(batch.ids),
            attention_mask=torch.from_numpy(batch.mask),
            use_cache=False,
        ).logits
        labels = torch.from_numpy(batch.labels).flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction=reduction)

    def heldout() -> float:
        with torch.no_grad():
            total = sum(float(loss(batch, "sum")) for batch in order.heldout)
        return total / sum(int((batch.labels >= 0).sum()) for batch in order.heldout)

    losses: list[float] = []
    for number, batch in enumerate(order.train, 1):
        optimizer.zero_grad()
        loss(batch, "mean").backward()
        optimizer.step()
        if number in order.marks:
            losses.append(heldout())
    return losses
