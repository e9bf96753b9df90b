"""The weight file of a bundle, read as it lies: tensors as read-only views of one mapping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedge.lora import DENSE
from fedge.release import Manifest, TensorPlace

Floats = NDArray[np.float32]


def map_weights(path: Path, places: Mapping[str, TensorPlace]) -> dict[str, NDArray[np.generic]]:
    """The tensors at `places` by name. The file is taken to be checked."""
    if not places:
        return {}
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return {name: _view(data, place) for name, place in places.items()}


def dense_starts(path: Path, manifest: Manifest) -> dict[str, Floats]:
    """`dense/NAME` -> where a bundle begins with what is trained in full; an adapter holds the change of it."""
    places = {DENSE + name: manifest.tensors[DENSE + name] for name in manifest.dense}
    return {name: np.array(tensor, np.float32) for name, tensor in map_weights(path, places).items()}


def _view(data: NDArray[np.uint8], place: TensorPlace) -> NDArray[np.generic]:
    dtype = np.dtype(place.dtype)
    end = place.offset + int(np.prod(place.shape)) * dtype.itemsize
    return data[place.offset : end].view(dtype).reshape(place.shape)
