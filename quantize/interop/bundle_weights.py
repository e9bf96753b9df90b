"""The weights that a bundle's devices compute with, decoded to floats one at a time, under transformers' names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.errors import IntegrityError, NoInputError
from fedge.io.weight_file import map_weights
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, open_manifest
from quantize.formats import FORMATS, decode

_TABLE, _HEAD = "EMB", "HEAD"


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle folder, its signature checked. Raises NoInputError, IntegrityError, UnsupportedError."""
    try:
        data, signature = (bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoInputError(
            "no bundle here",
            field="bundle",
            value=str(bundle),
            hint="`fedge quantize MODEL --out DIR` makes one",
        ) from error
    return open_manifest(data, signature)


class Matrices(Mapping[str, NDArray[np.float32]]):
    """Place in the weight file (`L3/self_attn.q_proj`, `EMB`, `HEAD`) -> (out, in) float32, decoded when asked for.

    Raises IntegrityError when the weight file is another one than the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        check_hash(folder, manifest)
        self._tensors = map_weights(folder / WEIGHTS, manifest.tensors)
        self._manifest = manifest
        self._stems = {
            name.removesuffix(".q").removesuffix(".w"): name.removesuffix("q")
            for name in manifest.tensors
            if name.endswith(".q")
        }

    def __getitem__(self, place: str) -> NDArray[np.float32]:
        prefix, outer = self._stems[place], place in (_TABLE, _HEAD)
        fmt = FORMATS[self._manifest.embedding_format if outer else self._manifest.weights_format]
        parts = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        decoded: NDArray[np.float32] = decode(parts, fmt)
        return decoded

    def __iter__(self) -> Iterator[str]:
        return iter(self._stems)

    def __len__(self) -> int:
        return len(self._stems)


class BundleWeights(Mapping[str, NDArray[np.float32]]):
    """The same by parameter name; `model` says what embedding and head are called."""

    def __init__(self, folder: Path, manifest: Manifest, model: Any) -> None:
        self._matrices = Matrices(folder, manifest)
        self._places = {_parameter(place, manifest, model): place for place in self._matrices}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._matrices[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _parameter(place: str, manifest: Manifest, model: Any) -> str:
    if place == _TABLE:
        return _weight_of(model, model.get_input_embeddings())
    if place == _HEAD:
        return _weight_of(model, model.get_output_embeddings())
    layer, _, path = place.partition("/")
    return f"{manifest.layer_path}.{layer[1:]}.{path}.weight"


def _weight_of(model: Any, module: Any) -> str:
    return next(f"{name}.weight" for name, found in model.named_modules() if found is module)


def check_hash(folder: Path, manifest: Manifest) -> None:
    """Raises NoInputError or IntegrityError unless the weight file is the one that the manifest says."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise NoInputError("bundle is not whole", field="bundle", value=str(path))
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != manifest.files[WEIGHTS].sha256:
        raise IntegrityError("file of the bundle is not what the manifest says", field=WEIGHTS, value=found)
