"""The shipped trainer on a real bundle as a world's task: few devices, real gradients, virtual time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch, Row, batches, load_dataset, load_encoder, make_batch
from edge_agent.trainer import Trainer, train_round
from fedge.errors import NoInputError
from fedge.messages import Training
from firmware_sim.world.task import Learned

_LITTLE: Final = np.dtype("<f4")
TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"
TEST_ROWS: Final = 96  # held-out rows an evaluation reads, as many of each person
TEST_BATCH: Final = 12


class RealTask:
    """Device n trains on person n's rows, modulo the people that there are.

    `data` holds a folder for each person with `train.jsonl` and `heldout.jsonl`, as `fedge sim demo` writes them.
    Raises NoInputError without people, and what opening a bundle and reading data raise.
    """

    name = "real"

    def __init__(self, bundle: Path, data: Path, training: Training | None = None) -> None:
        self.training = training or Training()
        self._bundle = open_bundle(bundle)
        self._encode = load_encoder(self._bundle.tokenizer)
        self._trainer = Trainer(self._bundle, a_seed=self.training.a_seed)
        self._people = sorted(path.parent for path in data.glob(f"*/{TRAIN}"))
        if not self._people:
            raise NoInputError(
                "no data for real training",
                field="data",
                value=str(data),
                hint=f"One folder for each person, with {TRAIN} and {HELD_OUT}: `fedge sim demo` makes such.",
            )
        self.numbers = self._trainer.layout.numbers
        self.layers = self._bundle.manifest.layers
        self.step_tokens = self.training.batch_rows * self.training.window_tokens
        self.rate = self.training.rate
        self._rows: dict[Path, tuple[Row, ...]] = {}
        self._tests: list[Batch] = []

    def first(self) -> bytes:
        return bytes(self.numbers * _LITTLE.itemsize)

    def samples(self, number: int) -> int:
        return len(self._rows_of(self._person(number) / TRAIN))

    def train(self, number: int, adapter: bytes, steps: int, seed: int, depth: int) -> Learned:
        rows = self._rows_of(self._person(number) / TRAIN)
        size, pad = self.training.batch_rows, self._bundle.manifest.pad_id
        done = train_round(
            self._trainer,
            np.frombuffer(adapter, _LITTLE),
            islice(batches(rows, size=size, seed=seed, pad_id=pad), steps),
            a_seed=self.training.a_seed,
            lr=self.rate,
            weight_decay=self.training.weight_decay,
            depth=depth,
        )
        return Learned(done.delta, done.loss_sum, done.labels)

    def evaluate(self, adapter: bytes) -> dict[str, float]:
        """Held-out loss in nats per token, over rows of everybody."""
        weights = self._trainer.layout.split(np.frombuffer(adapter, _LITTLE))
        nll, labels = 0.0, 0
        for batch in self._test_batches():
            sums, counts = self._trainer.row_losses(batch, weights)
            nll, labels = nll + float(sums.sum()), labels + int(counts.sum())
        return {"loss": nll / labels}

    def _person(self, number: int) -> Path:
        return self._people[number % len(self._people)]

    def _rows_of(self, path: Path) -> tuple[Row, ...]:
        if path not in self._rows:
            manifest, training = self._bundle.manifest, self.training
            self._rows[path] = load_dataset(
                path, training.template, self._encode, eos_id=manifest.eos_id, window=training.window_tokens
            ).rows
        return self._rows[path]

    def _test_batches(self) -> list[Batch]:
        if not self._tests:
            each = max(1, TEST_ROWS // len(self._people))
            rows = [row for person in self._people for row in self._rows_of(person / HELD_OUT)[:each]]
            rows.sort(key=lambda row: len(row.ids))
            pad = self._bundle.manifest.pad_id
            self._tests = [
                make_batch(rows[at : at + TEST_BATCH], pad) for at in range(0, len(rows), TEST_BATCH)
            ]
        return self._tests
