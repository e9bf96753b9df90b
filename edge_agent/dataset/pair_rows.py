"""Pairs of texts as rows of tokens: what belongs together, and what a batch of them looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.row import Row

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
PAIRS_MIN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow(Row):
    """Two texts that belong together; `ids` are the first, the anchor. No token is learnt."""

    positive: Ids

    @property
    def tokens(self) -> int:
        """Of the longer one: both go through the model side by side."""
        return max(len(self.ids), len(self.positive))


def pair_row(anchor: Ids, positive: Ids, conversation: str = "") -> PairRow:
    """The row of two texts as tokens."""
    return PairRow(ids=anchor, prompt_tokens=len(anchor), conversation=conversation, positive=positive)


def pair_arrays(rows: Sequence[PairRow], pad_id: int) -> tuple[Ints, Ints, Ints]:
    """(ids, mask [2 P, S], which row is told from the others [2 P]): the anchors, then what belongs to each."""
    texts = [*(row.ids for row in rows), *(row.positive for row in rows)]
    ids = np.full((len(texts), max(map(len, texts))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = text, 1
    own = np.full(len(texts), -1, np.int64)
    own[: len(rows)] = np.arange(len(rows))
    return ids, mask, own


def different(rows: Sequence[Row]) -> int:
    """How many of the texts that belong to another differ: two at the least, or there is nothing to tell apart."""
    return len({row.positive.tobytes() for row in rows if isinstance(row, PairRow)})
