"""Cross-entropy over the whole vocabulary without ever holding its logits.

Only positions with a label are looked at. The vocabulary passes in slices; running maximum m, sum z of exponentials
and z-weighted sum of rows give the loss and the gradient of the features (online softmax, Milakov and Gimelshein
2018, arXiv 1805.02867):  nll = m + log z - f·w_label,  d nll / d f = acc / z - w_label. Where the model caps its
logits, the graph caps those of a slice, and the label's is capped here, with the derivative 1 - tanh².
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.trainer.sessions import Floats, Graph

_MINUS_INFINITY: Final = -1e30  # finite, so that exp(m - m2) of the first slice is 0 and not NaN


@dataclass(frozen=True, slots=True)
class HeadResult:
    """For each of M labels: its loss in nats (M,), and the gradient of that loss by the features (M, D)."""

    nll: Floats
    gradient: Floats


class Head:
    """The streamed output layer: a matrix of its own where the bundle has one, else the embedding."""

    def __init__(self, bundle: Bundle, rows: Graph, cross_entropy: Graph) -> None:
        self._bundle, self._rows, self._cross_entropy = bundle, rows, cross_entropy
        tensors = bundle.manifest.tensors
        table = "EMB." if bundle.manifest.head_tied else "HEAD."
        self._parts = {f"W.{name.removeprefix(table)}": name for name in tensors if name.startswith(table)}
        self._spans = [bundle.span([name]) for name in self._parts.values()]

    def run(
        self, features: Floats, labels: NDArray[np.int64], slice_rows: int = 0
    ) -> Generator[None, None, HeadResult]:
        """`features` (M, D) and `labels` (M,), M > 0. Yields after every pass over a slice.

        `slice_rows` of the vocabulary at a time, 0 = as many as the manifest says: fewer take less memory.
        """
        manifest = self._bundle.manifest
        table = {part: self._bundle.tensor(name) for part, name in self._parts.items()}
        label_rows = self._rows.run({"ids": labels, **self._named(table)})["rows"]
        self._let_go()
        yield
        count, height = len(labels), min(slice_rows or manifest.head_rows, manifest.head_rows)
        m = np.full((count, 1), _MINUS_INFINITY, np.float32)
        z = np.zeros((count, 1), np.float32)
        acc = np.zeros_like(features)
        for start in range(0, manifest.vocabulary, height):
            end = min(start + height, manifest.vocabulary)
            part = {name: tensor[start:end] for name, tensor in table.items()}
            feeds = {"f": features, "m": m, "z": z, "acc": acc, **part}
            out = self._cross_entropy.run(feeds, last=end == manifest.vocabulary)
            m, z, acc = out["m2"], out["z2"], out["acc2"]
            self._let_go()
            yield
        at_label = np.einsum("md,md->m", features, label_rows)
        if manifest.logit_cap:
            bent = np.tanh(at_label / np.float32(manifest.logit_cap))
            at_label = np.float32(manifest.logit_cap) * bent
            label_rows = label_rows * (1 - bent * bent)[:, None]
        return HeadResult((m + np.log(z))[:, 0] - at_label, acc / z - label_rows)

    def _let_go(self) -> None:
        """A row that is read has the kernel map its neighbours, too: a few hundred rows are most of the table."""
        for span in self._spans:
            self._bundle.let_go(span)

    def _named(self, table: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        return {self._parts[part]: tensor for part, tensor in table.items()}
