"""How a model is called: with token ids and a mask, or with the features of sound, of which it takes one window.

transformers says which in `main_input_name`. A model that hears takes one length and no other, so that of its
example and of its graphs only the batch may change.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

FEATURES: Final = "input_features"
IDS: Final = "input_ids"
MASK: Final = "attention_mask"
_PADDED: Final = 4  # positions of an example's last row that are padding


def hears(model: Any) -> bool:
    """Whether the model takes features of sound."""
    return bool(getattr(model, "main_input_name", IDS) == FEATURES)


def name_of(model: Any) -> str:
    """Name of the first input."""
    return FEATURES if hears(model) else IDS


def words_of(model: Any, given: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The call of the model with ids [B, S], or features [B, mels, frames]. A model that hears takes no mask."""
    return {FEATURES: given} if hears(model) else {IDS: given, MASK: mask}


def example(model: Any, count: int, length: int) -> tuple[Tensor, Tensor]:
    """(ids or features, mask of as many positions) at random, the same every time; sound has its own length."""
    draw = torch.Generator().manual_seed(length)
    if hears(model):
        positions, mels = int(model.config.max_source_positions), int(model.config.num_mel_bins)
        features = torch.randn(count, mels, frames_of(positions), generator=draw)
        return features, torch.ones(count, positions, dtype=torch.long)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (count, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, -_PADDED:] = 0
    return ids, mask


def sizes(model: Any, batch: Any, length: Any) -> dict[int, Any]:
    """Which axes of an input of [B, S, ...] may change, as torch's exporter wants it."""
    return {0: batch} if hears(model) else {0: batch, 1: length}


def frames_of(positions: int) -> int:
    """Columns of features that become so many positions: the second convolution takes two steps at a time."""
    return 2 * positions
