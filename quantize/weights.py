"""The weight file: one flat file of named tensors that training and decoding both map into memory.

Names are `L{i}/{module}.w.q|.s|.m` and so on for the parts of a frozen matrix, `L{i}/{module}.b` for its bias,
`L{i}/{norm}.weight`, `EMB.q|.s`, `HEAD.q|.s` where the output matrix is not the embedding, `norm.weight`, `POS` or
the model's own name for what else is read, and `dense/NAME` for where a classifier's head starts. A tensor of 4 KB or
more starts on a page, a smaller one on a cache line, so that a device maps the file and feeds slices without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from fedge.errors import DataError
from fedge.lora import DENSE
from fedge.release import TensorPlace
from quantize.blocks import linears_of, matrix_of
from quantize.formats import EMBEDDING_FORMAT, FORMATS, Parts, WeightFormat, converted, decode, encode
from quantize.head import HEAD
from quantize.prologue import TABLE, outer_names
from quantize.source import Source

Tensors = Mapping[str, npt.NDArray]
Progress = Callable[[str, float], None]

_PAGE: Final = 4096
_LINE: Final = 64


def quantise(
    source: Source, fmt: WeightFormat, tell: Progress, fitted: Mapping[str, Parts] | None = None
) -> dict[str, npt.NDArray]:
    """All tensors of the weight file. The model's own weights become the dequantised ones: the gates' reference.

    `fitted` has parts that `quantize.fit` found, by parameter name; other matrices are kept exactly or rounded.
    """
    tensors: dict[str, npt.NDArray] = {}
    anatomy = source.anatomy
    for index, layer in enumerate(anatomy.layers):
        matrices = linears_of(layer)
        for name, parameter in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            full, place = f"{anatomy.layers_path}.{index}.{name}", f"L{index}/{module}"
            if module in matrices and kind == "weight":
                tensors |= _parts(source, full, matrix_of(matrices[module]), f"{place}.w", fmt, fitted)
            else:
                tensors[f"{place}.b" if module in matrices else f"L{index}/{name}"] = _floats(parameter, full)
        tell("quantise", (index + 1) / (len(anatomy.layers) + 1))
    named, outer = dict(source.model.named_parameters()), outer_names(anatomy)
    tables = {TABLE: outer.pop(TABLE)} if anatomy.embedding is not None else {}
    if anatomy.head is not None and not anatomy.head_tied:
        tables[HEAD] = next(name for name, value in named.items() if value is anatomy.head.weight)
    for place, full in tables.items():
        tensors |= _parts(source, full, named[full], place, FORMATS[EMBEDDING_FORMAT])
    for name, parameter in anatomy.norm.named_parameters():
        tensors[f"norm.{name}"] = _floats(parameter, name)
    for place, full in outer.items():
        tensors[place] = _floats(named[full], full)
    tensors |= {name: _floats(named[name], name) for name in anatomy.tail.frozen}
    tensors |= {DENSE + name: _floats(named[name], name) for name in anatomy.tail.trained}
    tell("quantise", 1.0)
    return tensors


def write_weights(path: Path, tensors: Tensors) -> dict[str, TensorPlace]:
    """Write the file, flushed to disk; returns where each tensor lies."""
    places: dict[str, TensorPlace] = {}
    with path.open("xb") as stream:
        for name, array in tensors.items():
            step = _PAGE if array.nbytes >= _PAGE else _LINE
            stream.write(b"\0" * (-stream.tell() % step))
            places[name] = TensorPlace(offset=stream.tell(), shape=tuple(array.shape), dtype=array.dtype.name)
            stream.write(np.ascontiguousarray(array).data)
        stream.flush()
        os.fsync(stream.fileno())
    return places


def _parts(
    source: Source,
    full: str,
    parameter: Any,
    place: str,
    fmt: WeightFormat,
    fitted: Mapping[str, Parts] | None = None,
) -> Iterator[tuple[str, npt.NDArray]]:
    known, weight = source.exact.get(full), _floats(parameter, full)
    kept = converted(*known, fmt) if known is not None else None
    parts = (fitted or {}).get(full) or kept or encode(weight, fmt)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(decode(parts, fmt)))
    return ((f"{place}.{part}", parts[part]) for part in fmt.suffixes)


def _floats(parameter: Any, name: str) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = parameter.detach().float().numpy()
    if not np.isfinite(values).all():
        raise DataError("the model has weights that are no numbers", field="tensor", value=name)
    return values
