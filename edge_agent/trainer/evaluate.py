"""Losses by row: what an evaluation adds up, and what tells one person from another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def by_row(nll: Floats, labels: Ints) -> tuple[NDArray[np.float64], Ints]:
    """Sums of `nll` (one for each label >= 0 of [B, S], in reading order) and label counts, both (B,)."""
    learnt = labels >= 0
    sums = np.zeros(len(labels), np.float64)
    np.add.at(sums, np.nonzero(learnt)[0], nll)
    return sums, learnt.sum(axis=1)
