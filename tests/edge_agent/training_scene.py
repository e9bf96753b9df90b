"""Batches and adapters for tests of the trainer, and a trainer whose steps go wrong when they are told to."""

from __future__ import annotations

import numpy as np

from edge_agent.dataset import IGNORE, Batch
from edge_agent.trainer import StepResult, Trainer

SEED = bytes(range(16))


def make_batch(rows: int, width: int, *, padded: bool = False, seed: int = 0) -> Batch:
    """Random tokens; every row learns its second half, and padded rows end early by different lengths."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(1, 300, (rows, width))
    mask = np.ones_like(ids)
    labels = np.full_like(ids, IGNORE)
    labels[:, width // 2 : -1] = ids[:, width // 2 + 1 :]
    if padded:
        for row in range(1, rows):
            mask[row, width - row :] = 0
            ids[row, width - row :] = 0
            labels[row, width - row - 1 :] = IGNORE
    return Batch(ids, mask, labels)


def random_b(trainer: Trainer, scale: float = 0.05) -> np.ndarray:
    draw = np.random.default_rng(5)
    return (draw.standard_normal(trainer.layout.numbers) * scale).astype(np.float32)


class Poisoned:
    """A trainer whose steps with these numbers, from 1 on, give a gradient with one infinity."""

    def __init__(self, trainer: Trainer, numbers: set[int]) -> None:
        self._trainer, self._numbers, self._done = trainer, numbers, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._trainer, name)

    def __enter__(self) -> Poisoned:
        return self

    def __exit__(self, *_: object) -> None:
        self._numbers = set()

    def loss_and_gradients(self, *args: object) -> StepResult:
        self._done += 1
        result = self._trainer.loss_and_gradients(*args)
        if self._done in self._numbers:
            next(iter(result.gradients.values())).fill(np.inf)
            result.gradients["L0/self_attn.q_proj.B"].fill(np.inf)
        return result
