"""One example as tokens, and the count of what became of all examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens; those from `prompt_tokens` on are learnt, but for the spans (from, to) in `unlearnt`.

    `label` is the class of a labelled text, of which no token is learnt; -1 = none.
    """

    ids: NDArray[np.int32]
    prompt_tokens: int
    conversation: str
    unlearnt: tuple[tuple[int, int], ...] = ()
    label: int = -1

    @property
    def tokens(self) -> int:
        """How many positions of the model it takes."""
        return len(self.ids)


@dataclass(slots=True)
class Seen:
    """Counts as `edge_agent.jobs.Counts` has them."""

    examples: int = 0
    kept: int = 0
    too_long: int = 0
    empty: int = 0
    unused: int = 0
    shortened: int = 0
    trimmed: int = 0


def padded(texts: Sequence[NDArray[np.int32]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids, mask) [B, S]: texts padded on the right to the longest of them; mask 1 = a real token."""
    ids = np.full((len(texts), max(map(len, texts))), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = text, 1
    return ids, mask


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1 to `most` that fits, 0 when 1 does not; found by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
