"""What torch says: loss, gradients and log-probabilities through transformers' own modules.

The adapter is added by hooks on the untouched model, not by the rewritten block that is exported, so that a mistake
in the rewriting cannot hide in its own reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedge.lora import LoraConfig
from quantize.anatomy import Anatomy
from quantize.blocks import adapted_modules
from quantize.prologue import Prologue
from quantize.runner import IGNORE, Array
from quantize.source import build_model
from quantize.watching import layers_of

_CUT_LAYERS: Final = 2
_POSITIONS_ANY: Final = 131_072  # where a configuration sets no limit


class Inputs(Protocol):
    """What a model is given: ids and mask, int64 [B, S]; or features and a mask of the positions they become."""

    @property
    def ids(self) -> Array: ...
    @property
    def mask(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, attention mask and shifted labels (IGNORE where none), int64 [B, S], padded on the right."""

    ids: Array
    mask: Array
    labels: Array

    @staticmethod
    def of(rows: Sequence[Sequence[int]], pad: int) -> Batch:
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(mask[:, 1:] > 0, ids[:, 1:], IGNORE)
        return Batch(ids, mask, labels)


def layers_of_every_kind(anatomy: Anatomy) -> list[int]:
    """Two layers or more, in order, every kind among them."""
    chosen = {index for index, _ in anatomy.readers.values()}
    for index in range(len(anatomy.layers)):
        if len(chosen) < _CUT_LAYERS:
            chosen.add(index)
    return sorted(chosen)


def cut(config: Any, layers: Sequence[int], vocabulary: int) -> Any:
    """The same architecture with these layers alone, a small vocabulary and random weights."""
    small = cut_config(config, layers, vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(small)


def cut_config(config: Any, layers: Sequence[int], vocabulary: int) -> Any:
    """The configuration of that."""
    small = copy.deepcopy(config)
    for name, value in vars(config).items():  # what the configuration says layer by layer
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(small, name, [value[index] for index in layers])
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = len(layers), vocabulary, None
    return small


def random_adapter(
    model: Any, lora: LoraConfig, random: np.random.Generator, *, scale: float
) -> dict[str, npt.NDArray[np.float32]]:
    """A and B of every layer, B not zero: with B = 0 the gradient of A would vanish and prove nothing."""
    adapter = {}
    for index in range(len(layers_of(model))):
        for name, (rows, columns) in sorted(adapted_modules(model, lora).items()):
            r = lora.rank_of(name)
            a = random.standard_normal((r, columns)) / columns**0.5
            b = random.standard_normal((rows, r)) * scale
            adapter[f"L{index}/{name}.A"] = a.astype(np.float32)
            adapter[f"L{index}/{name}.B"] = b.astype(np.float32)
    return adapter


def torch_gradients(
    model: Any, lora: LoraConfig, adapter: Mapping[str, Array], batch: Batch
) -> tuple[float, dict[str, Array]]:
    """Loss and adapter gradients by torch autograd through transformers' own modules."""
    leaves = {name: torch.from_numpy(value).clone().requires_grad_() for name, value in adapter.items()}
    model.requires_grad_(False)
    with adapted(model, lora, leaves):
        logits = model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), ignore_index=IGNORE
        )
        found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {name: value.numpy() for name, value in zip(leaves, found, strict=True)}


def features(anatomy: Anatomy, batch: Batch) -> Array:
    """What the model's own last norm gives for a batch, [B, S, D]."""
    caught: list[Tensor] = []
    handle = anatomy.norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        log_probabilities(anatomy.model, batch)
    finally:
        handle.remove()
    found: Array = caught[-1].numpy()
    return found


def outer_inputs(anatomy: Anatomy, batch: Inputs) -> dict[str, Array]:
    """x and the aux tensors as the model's own modules hand them to its layers."""
    start = Prologue(anatomy)
    named = dict(anatomy.model.named_parameters())
    with torch.no_grad():
        found = start(
            torch.from_numpy(batch.ids),
            torch.from_numpy(batch.mask),
            *(named[full] for full in start.outer.values()),
        )
    return {n: value.numpy() for n, value in zip(("x", *anatomy.aux_outputs), found, strict=True)}


def positions_max(config: Any) -> int:
    """How long a text may be: the rows of the position table, or what the rotary tables were made for."""
    return int(getattr(config, "max_position_embeddings", None) or _POSITIONS_ANY)


def largest_window(config: Any) -> int:
    """The longest stretch of positions that a layer with a sliding window sees, 0 when there is none."""
    found = (
        getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")
    )
    return max((value for value in found if isinstance(value, int)), default=0)


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """log p [B, S, V] of the plain model."""
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
        return torch.log_softmax(logits, -1)


@contextmanager
def adapted(model: Any, lora: LoraConfig, leaves: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, every adapted matrix adds the product of its A and B."""

    def hook(prefix: str, scale: float) -> Any:
        a, b = leaves[f"{prefix}.A"], leaves[f"{prefix}.B"]
        return lambda module, inputs, output: output + scale * (inputs[0] @ a.t() @ b.t())

    handles = []
    for index, layer in enumerate(layers_of(model)):
        for name in adapted_modules(model, lora):
            change = hook(f"L{index}/{name}", lora.scale_of(name))
            handles.append(layer.get_submodule(name).register_forward_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
