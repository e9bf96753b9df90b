"""Texts to vectors on the device, with an adapter or without.

Each text goes through the model by itself and without padding, so that its vector has the same bits whatever else is
asked for beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.dataset import load_encoder
from edge_agent.trainer import Trainer
from fedge.errors import DataError, UsageError

Floats = NDArray[np.float32]


class Embedder:
    """An open bundle for sentence vectors. Not for use by several threads.

    `adapter` has every A and B of the bundle's layout; none is the model as it was. `cut` counts the texts that lost
    their end so far. Raises UsageError for a bundle that makes no vectors.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, adapter: Mapping[str, Floats] | None = None) -> None:
        if bundle.manifest.embeds is None:
            raise UsageError(
                "this bundle makes no vectors",
                field="task",
                value=bundle.manifest.task,
                hint="Make one that does: fedge quantize MODEL --task embed",
            )
        self.cut = 0
        self._encoder = load_encoder(bundle.tokenizer)
        self._trainer = Trainer(bundle, threads)
        shapes = bundle.layout.b_shapes
        self._adapter = adapter or {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def __call__(self, text: str) -> Floats:
        """The vector [D] of a text; what the model has no position for is cut off. Raises DataError for no text."""
        if not text.strip():
            raise DataError("a text without any letter has no vector", field="text", value=text)
        before, ids, after = self._encoder.before, self._encoder(text), self._encoder.after
        room = self._trainer.manifest.positions_max - len(before) - len(after)
        self.cut += len(ids) > room
        framed = np.array([[*before, *ids[:room], *after]], np.int64)
        found: Floats = self._trainer.vectors(framed, np.ones_like(framed), self._adapter)[0]
        return found
