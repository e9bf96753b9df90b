"""Cross-entropy over the whole vocabulary without ever holding its logits.

Only positions with a label are looked at. The vocabulary passes in slices; running maximum m, sum z of exponentials
and z-weighted sum of rows give the loss and the gradient of the features (online softmax, Milakov and Gimelshein
2018, arXiv 1805.02867):  nll = m + log z - f·w_label,  d nll / d f = acc / z - w_label.
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
    """The streamed output layer. The embedding is the output matrix, too."""

    def __init__(self, bundle: Bundle, rows: Graph, cross_entropy: Graph) -> None:
        self._bundle, self._rows, self._cross_entropy = bundle, rows, cross_entropy
        self._names = [name for name in bundle.manifest.tensors if name.startswith("EMB.")]
        self._spans = [bundle.span([name]) for name in self._names]

    def run(self, features: Floats, labels: NDArray[np.int64]) -> Generator[None, None, HeadResult]:
        """`features` (M, D) and `labels` (M,), M > 0. Yields after every pass over a slice."""
        manifest = self._bundle.manifest
        table = {name: self._bundle.tensor(name) for name in self._names}
        label_rows = self._rows.run({"ids": labels, **table})["rows"]
        yield
        count = len(labels)
        m = np.full((count, 1), _MINUS_INFINITY, np.float32)
        z = np.zeros((count, 1), np.float32)
        acc = np.zeros_like(features)
        for start in range(0, manifest.vocabulary, manifest.head_rows):
            end = min(start + manifest.head_rows, manifest.vocabulary)
            part = {f"W{name.removeprefix('EMB')}": tensor[start:end] for name, tensor in table.items()}
            out = self._cross_entropy.run({"f": features, "m": m, "z": z, "acc": acc, **part})
            m, z, acc = out["m2"], out["z2"], out["acc2"]
            for span in self._spans:
                self._bundle.let_go(span)
            yield
        nll = (m + np.log(z))[:, 0] - np.einsum("md,md->m", features, label_rows)
        return HeadResult(nll, acc / z - label_rows)
