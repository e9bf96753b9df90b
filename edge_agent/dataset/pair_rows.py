"""Pairs of texts as rows of tokens: what belongs together, and what a batch of them looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.row import Row, padded

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
PAIRS_MIN: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow(Row):
    """Two texts that belong together; `ids` are the first, the anchor. No token is learnt. `negative` is there to be
    confused with `positive`, where there is one.
    """

    positive: Ids
    negative: Ids | None = None

    @property
    def texts(self) -> list[Ids]:
        """Two or three."""
        return [self.ids, self.positive, *([] if self.negative is None else [self.negative])]

    @property
    def tokens(self) -> int:
        """Of the longest one: they go through the model side by side."""
        return max(map(len, self.texts))


def pair_row(anchor: Ids, positive: Ids, conversation: str = "", *, negative: Ids | None = None) -> PairRow:
    """The row of texts as tokens."""
    return PairRow(
        ids=anchor,
        prompt_tokens=len(anchor),
        conversation=conversation,
        positive=positive,
        negative=negative,
    )


def pair_arrays(rows: Sequence[PairRow], pad_id: int) -> tuple[Ints, Ints, Ints]:
    """(ids, mask [B, S], what each row is to find [B]): the anchors, then what belongs to each, then what does not."""
    texts = [*(row.ids for row in rows), *(row.positive for row in rows)]
    texts += [row.negative for row in rows if row.negative is not None]
    ids, mask = padded(texts, pad_id)
    own = np.full(len(texts), -1, np.int64)
    own[: len(rows)] = np.arange(len(rows))
    return ids, mask, own


def different(rows: Sequence[Row]) -> int:
    """How many of the texts to choose from differ: two at the least, or there is nothing to tell apart."""
    pairs = (row for row in rows if isinstance(row, PairRow))
    return len({text.tobytes() for row in pairs for text in row.texts[1:]})
