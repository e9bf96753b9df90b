"""GGUF: a model's tensors and configuration out of one file, nothing guessed.

Where a tensor's grid is ours (`quantize.gguf_blocks`) its codes are kept for the weight file; the model itself always
gets the values that the gguf library dequantises, so that what an import costs can be measured against the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

from fedge.errors import DataError, UnsupportedError
from quantize import tokenizer as tokenizers
from quantize.formats import BLOCK, Parts
from quantize.gguf_blocks import read_blocks
from quantize.gguf_families import Family, Fields, config_of, family_of, is_shifted, is_turned, row_order
from quantize.source import Source, build_model, file_digest
from quantize.supported import check_config

_SUFFIXES = (".weight", ".bias")
# Finished tables that the configuration says already (checked there), and a head that is the embedding once more.
_NOT_PARAMETERS = frozenset({"rope_freqs.weight", "output.weight"})


def load_gguf(path: Path, *, licence: str = "") -> Source:
    """The model of a GGUF. Raises UnsupportedError or DataError before any weight is read."""
    try:
        reader = GGUFReader(path)
        fields = Fields({name: value.contents() for name, value in reader.fields.items()})
    except (ValueError, IndexError, KeyError) as error:
        raise DataError("the GGUF cannot be read", field="model", value=f"{path.name}: {error}") from error
    config = config_of(fields, {tensor.name: tensor for tensor in reader.tensors})
    check_config({key: value for key, value in config.to_diff_dict().items() if value is not None})
    vocabulary = tokenizers.from_gguf(fields)
    tokenizers.check_ids(vocabulary, config.vocab_size)
    model, exact = read_model(reader, fields, config)
    return Source(
        model=model,
        architecture=config.architectures[0],
        tokenizer=vocabulary,
        name=str(fields.get("general.basename") or fields.get("general.name") or path.stem),
        licence=licence or str(fields.get("general.license", "unknown")),
        sha256=file_digest(path),
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        exact=exact,
    )


def read_model(reader: GGUFReader, fields: Fields, config: Any) -> tuple[Any, dict[str, tuple[str, Parts]]]:
    """(model, matrices whose codes were kept) with every tensor of the file in its place.

    Raises UnsupportedError for a tensor without a place or of a type that cannot be read, DataError for one missing.
    """
    architecture, family = family_of(fields)
    model = build_model(config)
    parameters = dict(model.named_parameters())
    places = _places(architecture, int(fields[f"{architecture}.block_count"]), parameters)
    exact: dict[str, tuple[str, Parts]] = {}
    filled = set()
    for tensor in reader.tensors:
        name = places.get(tensor.name)
        if name is None and tensor.name in _NOT_PARAMETERS:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        turned = is_turned(family, tensor.name)
        if name is None or tuple(parameters[name].shape) != (shape[::-1] if turned else shape):
            raise UnsupportedError("this GGUF tensor is not handled", field=tensor.name, value=shape)
        order = row_order(family, tensor.name, shape[0], config)
        values = _values(tensor, shape, family)[order]
        if len(shape) == 2 and shape[1] % BLOCK == 0:
            known = read_blocks(tensor.tensor_type, np.asarray(tensor.data).reshape(shape[0], -1)[order])
            if known is not None:
                exact[name] = known
        with torch.no_grad():
            parameters[name].copy_(torch.from_numpy(np.array(values.T if turned else values)))
        filled.add(name)
    missing = sorted(parameters.keys() - filled)
    if missing:
        raise DataError("the GGUF lacks tensors", field="tensors", value=missing[:4])
    return model, exact


def _places(architecture: str, layers: int, parameters: dict[str, Any]) -> dict[str, str]:
    """GGUF tensor name -> parameter name, by the gguf library's own table."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(kind, layers)
    places: dict[str, str] = {}
    for name in parameters:
        tensor = table.get_name(name, _SUFFIXES)
        if tensor is None or tensor in places:
            raise UnsupportedError("a GGUF has no name for this parameter", field="parameter", value=name)
        places[tensor] = name
    return places


def _values(tensor: Any, shape: tuple[int, ...], family: Family) -> npt.NDArray[np.float32]:
    """What a tensor means, in transformers' convention, rows still in the file's order."""
    try:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(shape)
    except NotImplementedError as error:
        raise UnsupportedError(
            "this GGUF type cannot be read", field=tensor.name, value=tensor.tensor_type.name
        ) from error
    return values - np.float32(1) if is_shifted(family, tensor.name) else values
