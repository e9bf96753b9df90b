"""The end of a sentence encoder's step: vectors of texts, and the loss of pairs among all the texts of a batch.

A batch of P pairs is P anchors, then the text that belongs to each, then what else is there to be confused with. Each
anchor is to find its own among all texts behind the anchors: cross-entropy of their cosines times 20 (Henderson et al.
2017, arXiv 1705.00652, section 4.4; MultipleNegativesRankingLoss of sentence-transformers, which goes from anchors to
the others and not back). The label of row i < P is i, of all others -1.

The rule: what is no negative is none. A text that stands twice, and what belongs to an anchor that stands twice, is
left out of the sum for those to whom it belongs; sentence-transformers keeps such pairs apart by its batch sampler.

The loss needs all vectors of a batch at once, and the layers do not: where a batch does not fit, its vectors are made
piece by piece, then the loss, and then each piece again with the gradient of its own vectors (Gao et al. 2021,
arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.trainer.batch import BatchArrays, Inputs, label_count
from edge_agent.trainer.classify import Answer
from edge_agent.trainer.sessions import Floats, Graph, Tensor
from fedge.errors import DataError

Ints = NDArray[np.int64]
TASK: Final = "embed"
POOL, POOL_BACKWARD = "pool", "pool_bwd"
SCALE: Final = np.float32(20)
_LENGTH_MIN: Final = np.float32(1e-12)
_NOWHERE: Final = -1  # stands for padding: no token has this number


@dataclass(frozen=True, slots=True)
class Slopes:
    """Some texts of a batch whose loss is known: `gradient` [B, D] by their vectors. None has a label."""

    ids: Inputs
    mask: Ints
    labels: Ints
    gradient: Floats


@dataclass(frozen=True, slots=True)
class PairLoss:
    """Of P pairs: losses in nats (P,), similarities (P, C) with what is no negative, and `gradient` of the *sum* of
    the losses by every vector of the batch.
    """

    nll: Floats
    scores: Floats
    gradient: Floats


class Pooling:
    """What a bundle makes of the last block's output, and the loss of it."""

    def __init__(self, there: Graph, back: Graph) -> None:
        self._there, self._back = there, back

    def run(
        self,
        h: Floats,
        batch: BatchArrays,
        adapter: Mapping[str, Floats],
        outside: Mapping[str, Tensor],
    ) -> Answer:
        """The loss of the pairs whose last block's output is `h` [B, S, D], or what is known of it, and its gradient.

        Nothing here trains, so that `adapter` is not read.
        """
        if isinstance(batch, Slopes):
            none = np.zeros(0, np.float32)
            found = PairLoss(none, none.reshape(0, 0), batch.gradient)
        else:
            found = in_batch(self.vectors(h, batch, outside), batch)
        feeds = {**_feeds(h, batch, outside), "gv": found.gradient}
        gradient = self._back.run(feeds, last=True)["gh"]
        return Answer(found.nll, found.scores, np.arange(len(found.nll)), gradient, {})

    def vectors(self, h: Floats, batch: BatchArrays, outside: Mapping[str, Tensor]) -> Floats:
        """[B, D]."""
        return self._there.run(_feeds(h, batch, outside), last=True)["v"]


def _feeds(h: Floats, batch: BatchArrays, outside: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**outside, "h": h, "input_ids": batch.ids, "attention_mask": batch.mask}


def in_batch(vectors: Floats, batch: BatchArrays) -> PairLoss:
    """The loss of a batch of pairs with these vectors [B, D], of any length; sums are in an order of numpy's own."""
    count = label_count(batch)
    lengths = np.maximum(np.sqrt(np.einsum("bd,bd->b", vectors, vectors)), _LENGTH_MIN)[:, None]
    units = vectors / lengths
    anchors, others = units[:count], units[count:]
    scores = SCALE * np.einsum("pd,cd->pc", anchors, others)
    scores[_no_negatives(batch, count)] = -np.inf
    top = scores.max(axis=1, keepdims=True)
    slopes = np.exp(scores - top)
    total = slopes.sum(axis=1, keepdims=True)
    own = np.arange(count)
    nll = (top + np.log(total))[:, 0] - scores[own, own]
    slopes /= total
    slopes[own, own] -= 1
    slopes *= SCALE
    gradient = np.concatenate(
        [np.einsum("pc,cd->pd", slopes, others), np.einsum("pc,pd->cd", slopes, anchors)]
    )
    gradient -= units * np.einsum("bd,bd->b", gradient, units)[:, None]
    return PairLoss(nll, scores, gradient / lengths)


def _no_negatives(batch: BatchArrays, count: int) -> NDArray[np.bool_]:
    """(P, C): the texts that are not an anchor's own, and yet belong to it."""
    _, number = np.unique(np.where(batch.mask > 0, batch.ids, _NOWHERE), axis=0, return_inverse=True)
    texts = number.reshape(-1)
    anchors, others = texts[:count], texts[count:]
    found: NDArray[np.bool_] = (anchors[:, None] == others) | (others[:count, None] == others)
    found[:, :count] |= anchors[:, None] == anchors
    np.fill_diagonal(found, val=False)
    return found


def check_pairs(batch: BatchArrays) -> None:
    """Raises DataError unless the labels are those of pairs: row i is told from the others by row P + i."""
    count = label_count(batch)
    expected = np.full((len(batch.ids), 1), -1, np.int64)
    expected[:count, 0] = np.arange(count)
    if 2 * count > len(batch.ids) or not np.array_equal(batch.labels, expected):
        raise DataError(
            "rows are no pairs: anchors first, then what belongs to each", field="labels", value=count
        )


def in_pieces(batch: BatchArrays, rows: int) -> Iterator[slice]:
    """Which rows are carried through the layers at a time."""
    for at in range(0, len(batch.ids), rows):
        yield slice(at, at + rows)
