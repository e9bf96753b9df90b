"""What a batch must have, and the pieces of it that fit a board's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Inputs = NDArray[np.int64] | NDArray[np.float32]


class BatchArrays(Protocol):
    """int64 [B, S] each; `labels` shifted, negative where nothing is learnt.

    Of recordings, `ids` are their features: float32 [B, mels, frames], which become S positions.
    """

    @property
    def ids(self) -> Inputs: ...
    @property
    def mask(self) -> Ints: ...
    @property
    def labels(self) -> Ints: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a batch, without the columns that are padding in all of them."""

    ids: Inputs
    mask: Ints
    labels: Ints


def label_count(batch: BatchArrays) -> int:
    """How many positions have a label."""
    return int((batch.labels >= 0).sum())


def cut(batch: BatchArrays, at: slice) -> Piece:
    """These rows, without the columns that are padding in all of them; recordings are all of one length."""
    ids, mask = batch.ids[at], batch.mask[at]
    width = int(np.flatnonzero(mask.any(axis=0)).max(initial=0)) + 1
    return Piece(ids[:, :width] if ids.ndim == 2 else ids, mask[:, :width], batch.labels[at, :width])


def pieces(batch: BatchArrays, rows: int) -> Iterator[BatchArrays]:
    """`rows` rows at a time, 0 = the batch as it is; rows without a label are nobody's piece."""
    if rows <= 0 or rows >= len(batch.ids):
        yield batch
        return
    for at in range(0, len(batch.ids), rows):
        piece = cut(batch, slice(at, at + rows))
        if (piece.labels >= 0).any():
            yield piece
