"""The end of a classifier's step: what its head answers, and the gradients of everything in it.

A classifier's label is a class of a whole row, so the labels of a batch are [B, 1] from here on, and everything that
counts, cuts or sums labels is the same as for a language model. The head is trained in full; its numbers in an adapter
are *changes* from where the bundle says that it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.trainer.batch import BatchArrays, Piece
from edge_agent.trainer.sessions import Floats, Graph, Tensor
from fedge.lora import DENSE
from fedge.release import Manifest

Ints = NDArray[np.int64]
TASK = "classify"


@dataclass(frozen=True, slots=True)
class Answer:
    """Of M labelled rows: losses in nats (M,) and logits (M, C). `gradient` [B, S, D] by the hidden states and
    `gradients` by `dense/NAME` are of the sum of the losses; rows without a label have none.
    """

    nll: Floats
    logits: Floats
    labels: Ints
    gradient: Floats
    gradients: dict[str, Floats]

    @property
    def rows(self) -> Ints:
        """Labels by row (M,): one each."""
        return np.ones(len(self.nll), np.int64)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(M,) Whether the first choice is the label."""
        found: NDArray[np.bool_] = self.logits.argmax(axis=1) == self.labels
        return found


class Classifier:
    """The head of a bundle, from the last block's output on."""

    def __init__(self, bundle: Bundle, graph: Graph) -> None:
        self._bundle, self._graph = bundle, graph
        self._dense = [DENSE + name for name in bundle.manifest.dense]

    def run(
        self,
        h: Floats,
        batch: BatchArrays,
        adapter: Mapping[str, Floats],
        outside: Mapping[str, Tensor],
    ) -> Answer:
        """What the head makes of the last block's output `h` [B, S, D]; at least one row has a label."""
        at = np.flatnonzero(batch.labels[:, 0] >= 0)
        every = len(at) == len(h)
        feeds: dict[str, Tensor] = {
            "h": h if every else h[at],
            "input_ids": batch.ids if every else batch.ids[at],
            "attention_mask": batch.mask if every else batch.mask[at],
            "labels": batch.labels[at, 0],
        }
        out = self._graph.run({**outside, **self.values(adapter), **feeds}, last=True)
        nll, logits, gradient = out.pop("nll"), out.pop("logits"), out.pop("gh")
        if not every:
            whole = np.zeros_like(h)
            whole[at] = gradient
            gradient = whole
        gradients = {name.removeprefix("g:"): v for name, v in out.items()}
        return Answer(nll, logits, batch.labels[at, 0], gradient, gradients)

    def values(self, adapter: Mapping[str, Floats]) -> dict[str, Floats]:
        """The head's own numbers: where it starts, and what the adapter adds."""
        found = {}
        for name in self._dense:
            start = self._bundle.tensor(name).astype(np.float32)
            found[name] = start + adapter[name] if name in adapter else start
        return found


def by_class(batch: BatchArrays) -> BatchArrays:
    """A batch whose rows have classes, with these as its labels, [B, 1]; any other as it is."""
    classes: Ints | None = getattr(batch, "classes", None)
    return batch if classes is None else Piece(batch.ids, batch.mask, classes[:, None])


def labelled(batch: BatchArrays, manifest: Manifest) -> BatchArrays:
    """The batch with the labels that this bundle learns: one a row of a class or a pair, -1 = none."""
    if manifest.task == "generate":
        return batch
    found = by_class(batch)
    if found.labels.shape[1:] == (1,):
        return found
    return Piece(batch.ids, batch.mask, np.full((len(batch.ids), 1), -1, np.int64))


def label_limit(manifest: Manifest) -> int:
    """Labels of tokens or classes are below this."""
    return len(manifest.classes) if manifest.task == TASK else manifest.vocabulary
