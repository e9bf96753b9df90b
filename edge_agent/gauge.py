"""The fixed micro-benchmark: how long one training step of a campaign's shape takes on this board.

It is a whole batch of whole rows with a label everywhere, the most that a step can take, through the shipped trainer.
The tokens are made up: nothing of the owner's data is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from edge_agent.dataset import IGNORE, Batch, Row, make_batch
from edge_agent.dataset.pair_rows import pair_row
from edge_agent.trainer import Trainer, train_round
from fedge.audio import AudioInput
from fedge.messages import Training
from fedge.release import Manifest

COLD_SECONDS_MAX: Final = 2.0  # a first step as short as this is mostly page faults: the next one tells
_STRIDE: Final = 7_919  # a prime: tokens from all over the embedding, as text has them


def step_seconds(trainer: Trainer, training: Training) -> float:
    """Wall seconds of one step over all layers; of the faster of two where a step is short. Raises ConfigError."""
    took: list[float] = []
    train_round(
        trainer,
        np.zeros(trainer.layout.numbers, np.float32),
        _timed(_batch(trainer.manifest, training), took),
        a_seed=training.a_seed,
        lr=training.rate,
        weight_decay=training.weight_decay,
    )
    return min(took)


def _batch(manifest: Manifest, training: Training) -> Batch:
    if manifest.hears is not None:
        return silent_batch(training, manifest.hears)
    if manifest.task == "embed":
        return pairs_of_nothing(training, manifest.vocabulary)
    return synthetic_batch(training, manifest.vocabulary, 0 if manifest.task == "classify" else -1)


def synthetic_batch(training: Training, vocabulary: int, label: int = -1) -> Batch:
    """`batch_rows` x `window_tokens` ids below `vocabulary`, the same everywhere, each of class `label`."""
    shape = training.batch_rows, training.window_tokens
    ids = (np.arange(shape[0] * shape[1]) * _STRIDE % vocabulary).astype(np.int32).reshape(shape)
    return make_batch([Row(row, 0, "", label=label) for row in ids], pad_id=0)


def pairs_of_nothing(training: Training, vocabulary: int) -> Batch:
    """`batch_rows` pairs of `window_tokens` ids each, no two alike."""
    rows = synthetic_batch(training, vocabulary).ids.astype(np.int32)
    return make_batch([pair_row(row, (row + 1) % vocabulary) for row in rows], pad_id=0)


def silent_batch(training: Training, audio: AudioInput) -> Batch:
    """`batch_rows` recordings of nothing, of the first class."""
    features = np.zeros((training.batch_rows, audio.mels, audio.frames), np.float32)
    mask = np.ones((training.batch_rows, audio.positions), np.int64)
    return Batch(features, mask, np.full_like(mask, IGNORE), np.zeros(training.batch_rows, np.int64))


def _timed(batch: Batch, took: list[float]) -> Iterator[Batch]:
    """Gives the batch once or twice, and notes how long whoever took it was busy with it."""
    while not took or (len(took) == 1 and took[0] < COLD_SECONDS_MAX):
        began = time.monotonic()
        yield batch
        took.append(time.monotonic() - began)
