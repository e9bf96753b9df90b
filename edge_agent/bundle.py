"""A device bundle on disk: verified first, then mapped, then read tensor by tensor.

The rule: the signature is checked before the manifest is believed, every file's SHA-256 before any of them is
opened for use, what every graph would do before a runtime gets it, so that a signed lie about the operators of a
graph is found out as well, and every tensor's place before the weights are mapped. Weights are clean pages of one
file: the kernel may drop them at any time, and `let_go` drops those of a layer at once, so that a device holds in
memory what it is computing with and not the whole model.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.jobs import VerifiedStamp
from fedge.errors import IntegrityError, NoInputError, StorageError, UnsupportedError
from fedge.graph_audit import GRAPH_BYTES_MAX, check_graph, graph_facts
from fedge.io.durable import storage_error
from fedge.limits import MANIFEST_BYTES_MAX
from fedge.lora import AdapterLayout
from fedge.release import (
    MANIFEST,
    OPERATORS_ALLOWED,
    SIGNATURE,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorPlace,
    open_manifest,
)

TRAINING_GRAPHS: Final = ("prologue", "block_fwd", "block_bwd", "norm_fwd", "norm_bwd", "rows", "ce")
DTYPES: Final = frozenset({"uint8", "int8", "float16", "float32", "int32", "int64"})
GRAPH_SUFFIX: Final = ".onnx"
_ALIGNMENT: Final = 64


@dataclass(frozen=True, slots=True)
class Bundle:
    """An open bundle. `stamp` lets the same files be opened again without hashing them."""

    folder: Path
    manifest: Manifest
    stamp: VerifiedStamp
    _weights: mmap.mmap

    def graph(self, name: str) -> Path:
        """Where the graph called `name` lies. Raises UnsupportedError when the bundle has none."""
        file = f"{name}.onnx"
        if file not in self.manifest.files:
            raise UnsupportedError("bundle lacks a graph", field="files", value=file)
        return self.folder / file

    @property
    def tokenizer(self) -> Path:
        """Where tokenizer.json lies. Raises UnsupportedError when the bundle has none."""
        if TOKENIZER not in self.manifest.files:
            raise UnsupportedError("bundle lacks a tokenizer", field="files", value=TOKENIZER)
        return self.folder / TOKENIZER

    @property
    def layout(self) -> AdapterLayout:
        """The adapter that this bundle trains."""
        return self.manifest.layout

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A read-only view of the mapped weight file. Raises UnsupportedError when there is no such tensor."""
        place = self.manifest.tensors.get(name)
        if place is None:
            raise UnsupportedError("bundle lacks a tensor", field="tensors", value=name)
        count = _numbers(place)
        flat = np.frombuffer(self._weights, dtype=place.dtype, count=count, offset=place.offset)
        return flat.reshape(place.shape)

    def span(self, names: Iterable[str]) -> tuple[int, int]:
        """The whole pages, as (start, bytes), inside the stretch of the file that these tensors take up."""
        places = [self.manifest.tensors[name] for name in names]
        start = -(-min(place.offset for place in places) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = max(place.offset + _bytes(place) for place in places) // mmap.PAGESIZE * mmap.PAGESIZE
        return start, max(0, end - start)

    def let_go(self, span: tuple[int, int]) -> None:
        """Drop these pages from our memory; they come back from the file when they are read again."""
        if span[1]:
            self._weights.madvise(mmap.MADV_DONTNEED, *span)


def open_bundle(
    folder: Path,
    *,
    publisher: bytes | None = None,
    sha256: bytes | None = None,
    verified: VerifiedStamp | None = None,
) -> Bundle:
    """Verify the bundle in `folder` and map its weights. `publisher` and `sha256` pin signer and manifest.

    Every file is hashed, unless `verified` is the stamp of an earlier opening by the same caller, has this manifest,
    and the files look exactly as then: inode, size, times of content and of inode. That spares a device the hashing
    of 112 MB each round; it catches a replaced or rewritten file, not a disk that rots, so hash after every start.

    Raises NoInputError, IntegrityError naming the file or tensor, UnsupportedError naming operator or type.
    """
    data = _read_small(folder / MANIFEST, MANIFEST_BYTES_MAX)
    manifest = open_manifest(data, _read_small(folder / SIGNATURE, 64), publisher=publisher, sha256=sha256)
    digest = hashlib.sha256(data).digest()
    for operator in manifest.operators:
        if operator not in OPERATORS_ALLOWED:
            raise UnsupportedError("operator is not allowed on a device", field="operators", value=operator)
    looks = {name: look(folder / name, entry) for name, entry in manifest.files.items()}
    stamp = VerifiedStamp(digest, looks)
    if verified != stamp:
        for name, entry in manifest.files.items():
            check_hash(folder / name, entry)
        for name in manifest.files:
            if name.endswith(GRAPH_SUFFIX):
                check_graph_file(folder, name, manifest)
    check_places(manifest)
    with (folder / WEIGHTS).open("rb") as stream:
        weights = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return Bundle(folder, manifest, stamp, weights)


def _read_small(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(bytes_max + 1)
    except FileNotFoundError as error:
        raise NoInputError(
            f"bundle is not here or not whole: no {path.name}", field="folder", value=str(path.parent)
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", field="path", value=str(path)) from error


def look(path: Path, entry: FileEntry) -> tuple[int, int, int, int]:
    """How a file of the bundle looks: inode, size, times of content and inode. Raises NoInputError, IntegrityError."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise NoInputError(
            f"bundle is not whole: no {path.name}", field="folder", value=str(path.parent)
        ) from error
    if stat.st_size != entry.size:
        raise IntegrityError("file of the bundle has another size", field=path.name, value=stat.st_size)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def check_hash(path: Path, entry: FileEntry) -> None:
    """Raises IntegrityError when the file is not what the manifest says."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry.sha256:
        raise IntegrityError(
            "file of the bundle is not what the manifest says",
            field=path.name,
            value=found,
            hint="Fetch the bundle again",
        )


def check_graph_file(folder: Path, name: str, manifest: Manifest) -> set[str]:
    """The operators of the graph `name`, which are allowed and announced. Raises UnsupportedError, IntegrityError.

    Its tensors must lie in the bundle's own weight file: no other path, absolute, relative or escaping, is followed.
    """
    path = folder / name
    try:
        if path.stat().st_size > GRAPH_BYTES_MAX:
            raise IntegrityError("graph is too large", field=name, value=path.stat().st_size)
        facts = graph_facts(path.read_bytes())
    except OSError as error:
        raise storage_error(error, path, verb="read") from error
    weights = manifest.files.get(WEIGHTS)
    check_graph(name, facts, weights_bytes=weights.size if weights else 0)
    hidden = sorted(facts.operators - set(manifest.operators))
    if hidden:
        raise IntegrityError(
            f"{name} has an operator that the manifest does not name", field="operators", value=hidden[0]
        )
    return facts.operators


def check_age(minimum: str, installed: str) -> None:
    """Raises UnsupportedError when the installed runtime is older than the bundle needs."""
    if _version(installed) < _version(minimum):
        raise UnsupportedError(
            "ONNX Runtime here is too old for this bundle",
            field="runtime_min",
            value=minimum,
            hint=f"Installed is {installed}: upgrade onnxruntime",
        )


def check_places(manifest: Manifest) -> None:
    """Raises IntegrityError or UnsupportedError naming the first tensor whose place cannot be."""
    if WEIGHTS not in manifest.files:
        raise IntegrityError("bundle lacks its weight file", field="files", value=WEIGHTS)
    size = manifest.files[WEIGHTS].size
    for name, place in manifest.tensors.items():
        if place.dtype not in DTYPES:
            raise UnsupportedError(f"element type of {name} is not known", field="dtype", value=place.dtype)
        if place.offset < 0 or place.offset % _ALIGNMENT or any(n < 1 for n in place.shape):
            raise IntegrityError("tensor has an impossible place", field=name, value=place)
        if place.offset + _bytes(place) > size:
            raise IntegrityError("tensor lies outside the weight file", field=name, value=place)


def _numbers(place: TensorPlace) -> int:
    count = 1
    for n in place.shape:  # whole numbers: a hostile shape must not wrap around
        count *= n
    return count


def _bytes(place: TensorPlace) -> int:
    return _numbers(place) * np.dtype(place.dtype).itemsize


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
