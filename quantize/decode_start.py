"""What a decoding step needs before its first layer: rows of the embedding, rotary tables and masks at any position.

Training starts every text at position 0, decoding goes on where the cache ends. So the model's own code is traced
once more with its positions as an input. The mask is written anew from positions: position p sees j <= p and, with a
window w, j > p - w. Whether that is the model's mask is not assumed but compared with what the model computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.export import Dim

from fedge.errors import UnsupportedError
from quantize.anatomy import Anatomy
from quantize.graph import GraphWriter
from quantize.joint import EXAMPLE, to_onnx
from quantize.prologue import TABLE, Prologue, _plain_tables, outer_names
from quantize.tracing import tracing

MASK: Final = "mask"
ROTARY: Final = ("cos", "sin")
# A mask of so many squared is 85 MB; beyond, a window is taken on trust.
_COMPARED_POSITIONS_MAX: Final = 4_608
_BEYOND: Final = 9  # positions past a window that are compared
_ROWS: Final = 17  # of the traced embedding


def undecodable(what: str, value: object) -> UnsupportedError:
    """The refusal of a model whose inference graph cannot be written."""
    return UnsupportedError(f"no inference graph for this model: {what}", field="infer", value=value)


class _Start(Prologue):
    """(ids, positions, outer tensors) -> x and the rotary tables, in the order of `start_outputs`."""

    def forward(self, ids: Tensor, positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        x, *aux = self.run(words, *tensors)
        names = self._anatomy[0].aux_outputs
        return x, *(value for name, value in zip(names, aux, strict=True) if _base(name) != MASK)


def start_outputs(anatomy: Anatomy) -> tuple[str, ...]:
    """x, and the names of the rotary tables."""
    return ("x", *(name for name in anatomy.aux_outputs if _base(name) != MASK))


def check_arguments(anatomy: Anatomy) -> None:
    """Raise UnsupportedError unless layers read nothing but a mask and rotary tables, and positions can be given."""
    if odd := set(anatomy.aux) - {MASK, *ROTARY}:
        raise undecodable("its layers read more than a mask and rotary tables", sorted(odd))
    if anatomy.call.cache is None:
        raise undecodable("its layers take no key/value cache", anatomy.layers_path)
    if "position_ids" not in inspect.signature(anatomy.model.forward).parameters:
        raise undecodable("its positions cannot be given", type(anatomy.model).__name__)


def export_start(anatomy: Anatomy) -> onnx.ModelProto:
    """Inputs ids, positions, EMB and other outer tensors by name; outputs `start_outputs`."""
    program = _Start(anatomy)
    own = dict(program.skeleton.named_parameters())
    tensors = tuple(
        torch.randn(_ROWS, anatomy.hidden) if name == TABLE else own[full].detach()
        for name, full in program.outer.items()
    )
    ids = torch.zeros(EXAMPLE, dtype=torch.long)
    positions = torch.arange(EXAMPLE[1])[None].repeat(EXAMPLE[0], 1)
    auto = Dim.AUTO
    try:
        with torch.no_grad(), tracing():
            exported = torch.export.export(
                program,
                (ids, positions, *tensors),
                dynamic_shapes=(
                    {0: auto, 1: auto},
                    {0: auto, 1: auto},
                    tuple({0: auto} if name == TABLE else None for name in program.outer),
                ),
                strict=False,
            )
    except Exception as error:  # whatever the model's own code may raise under the exporter
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise undecodable("what comes before its layers cannot be traced with positions", line) from error
    return _plain_tables(
        to_onnx(exported, ("ids", "positions", *outer_names(anatomy)), start_outputs(anatomy))
    )


def mask_windows(anatomy: Anatomy) -> dict[str, int]:
    """Window of each mask among the aux outputs, 0 = all of the past. Raises UnsupportedError for any other mask."""
    names = [name for name in anatomy.aux_outputs if _base(name) == MASK]
    if not names:
        return {}
    config = anatomy.model.config
    window = getattr(config, "sliding_window", None) or 0
    longest = int(getattr(config, "max_position_embeddings", 0) or 4 * _BEYOND)
    count = min(longest, window + _BEYOND if window else 4 * _BEYOND, _COMPARED_POSITIONS_MAX)
    found = _masks(anatomy, count)
    return {name: _window(name, found[name], window) for name in names}


def _masks(anatomy: Anatomy, count: int) -> dict[str, Tensor]:
    program = Prologue(anatomy)
    own = dict(program.skeleton.named_parameters())
    ids = torch.zeros(1, count, dtype=torch.long)
    with torch.no_grad():
        _, *aux = program(ids, torch.ones_like(ids), *(own[full] for full in program.outer.values()))
    return dict(zip(anatomy.aux_outputs, aux, strict=True))


def _window(name: str, mask: Tensor, declared: int) -> int:
    seen = mask[0, 0] > -1 if mask.is_floating_point() else mask[0, 0]
    count = seen.shape[-1]
    row, column = torch.arange(count)[:, None], torch.arange(count)[None]
    for window in dict.fromkeys((0, declared)):
        expected = (column <= row) & (column > row - window if window else True)
        if seen.shape == expected.shape and torch.equal(seen, expected):
            sliding = declared and name.partition("@")[2].startswith("sliding")
            return declared if sliding else window
    raise undecodable("its mask is neither causal nor a sliding window", name)


def write_masks(writer: GraphWriter, windows: Mapping[str, int], cache: str) -> dict[str, str]:
    """Aux output -> mask [B, 1, S, T] to add to scores; T = the length of `cache` (axis 2) and the new tokens."""
    if not windows:
        return {}
    past = writer.add("Shape", [cache], start=2, end=3)
    total = writer.add("Add", [past, writer.add("Shape", ["ids"], start=1, end=2)])
    one, zero = (writer.constant(np.array(value, np.int64)) for value in (1, 0))
    columns = writer.add("Range", [zero, writer.add("Squeeze", [total]), one])
    rows = writer.add("Unsqueeze", ["positions", writer.integers(1, 3)])  # [B, 1, S, 1]
    seen, lowest = writer.constant(np.float32(0)), writer.constant(np.finfo(np.float32).min)
    masks, causal = {}, writer.add("LessOrEqual", [columns, rows])
    for window in sorted(set(windows.values())):
        allowed = causal
        if window:
            first = writer.add("Sub", [rows, writer.constant(np.array(window, np.int64))])
            allowed = writer.add("And", [causal, writer.add("Greater", [columns, first])])
        masks[window] = writer.add("Where", [allowed, seen, lowest])
    return {name: masks[window] for name, window in windows.items()}


def _base(name: str) -> str:
    return name.partition("@")[0]
