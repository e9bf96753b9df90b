"""The micro-benchmark itself: the campaign's shape, made-up tokens, and a first step that does not count."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent import gauge
from edge_agent.bundle import open_bundle
from edge_agent.gauge import COLD_SECONDS_MAX, step_seconds, synthetic_batch
from edge_agent.trainer import BatchArrays, StepResult, Trainer
from fedge.messages import Training

TRAINING = Training(batch_rows=3, window_tokens=40)


def test_the_batch_has_the_campaigns_shape_and_a_label_everywhere_but_at_the_end() -> None:
    batch = synthetic_batch(TRAINING, 304)
    assert batch.ids.shape == (3, 40)
    assert batch.mask.all()
    assert 0 <= batch.ids.min() < batch.ids.max() < 304
    np.testing.assert_array_equal(batch.labels[:, :-1], batch.ids[:, 1:])
    assert (batch.labels[:, -1] < 0).all()


def test_only_whole_steps_of_that_shape_over_all_layers_are_timed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(tiny_bundle)
    trainer = Trainer(bundle)
    seen: list[tuple[int, ...]] = []
    step = trainer.loss_and_gradients

    def watched(batch: BatchArrays, b: Mapping[str, NDArray[np.float32]], depth: int = 0) -> StepResult:
        seen.append((*batch.ids.shape, depth))
        return step(batch, b, depth)

    monkeypatch.setattr(trainer, "loss_and_gradients", watched)
    assert step_seconds(trainer, TRAINING) > 0
    assert set(seen) == {(3, 40, 0)}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([1.5, 0.2], 0.2), ([1.5, 1.8], 1.5), ([COLD_SECONDS_MAX, 0.2], COLD_SECONDS_MAX), ([30.0, 0.2], 30.0)],
)
def test_the_faster_of_two_short_steps_counts_and_a_long_one_is_done_once(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, steps: list[float], expected: float
) -> None:
    clock = [0.0]

    def training(trainer: Trainer, vector: object, batches: Iterable[BatchArrays], **_: object) -> None:
        for _batch, seconds in zip(batches, steps, strict=False):
            clock[0] += seconds
            done.append(seconds)

    done: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gauge, "train_round", training)
    found = step_seconds(Trainer(open_bundle(tiny_bundle)), TRAINING)
    assert found == pytest.approx(expected)
    assert len(done) == (2 if steps[0] < COLD_SECONDS_MAX else 1)
