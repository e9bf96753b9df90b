"""An adapter in one file: the trained numbers, and everything that says what they mean.

A safetensors file (so any tool opens it) whose metadata entry `fedge` is the JSON of an `AdapterHeader`: the bundle
it belongs to by the SHA-256 of its manifest, the rule, the seed of A, the config that gives the scale, the shapes.
Tensors are `L{i}/{module}.B`, `L{i}/{module}.A` where A does not follow from the seed, and `dense/NAME`; float32.

The rule: a file that says it holds an adapter holds all of it, unchanged, and nothing else. The header carries the
SHA-256 of the numbers, every tensor is accounted for, and a number that is not finite is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError, IntegrityError, UnsupportedError
from fedge.io import durable
from fedge.io.safetensors_file import encode_tensors, read_file, widened
from fedge.limits import ADAPTER_NUMBERS_MAX
from fedge.lora import AdapterLayout, LoraConfig
from fedge.release import Manifest, bundle_digest
from fedge.rules import Rule

Floats = NDArray[np.float32]

VERSION: Final = 1
KEY: Final = "fedge"
ADAPTER_FILE_BYTES_MAX: Final = (
    2 * 4 * ADAPTER_NUMBERS_MAX + 32 * 1024**2
)  # A and B of the largest, and headers


class AdapterHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the numbers mean. `bundle` and `numbers_sha256` are hexadecimal."""

    version: int = VERSION
    bundle: str
    model: str
    architecture: str
    heads: int
    kv_heads: int
    layers: int
    layer_path: str
    lora: LoraConfig
    lora_shapes: dict[str, tuple[int, int]]  # module path in a block -> (out, in)
    dense: dict[
        str, tuple[int, ...]
    ] = {}  # trained in full; the file holds the change from the bundle's start
    rule: str = "ffa"
    a_seed: bytes = b""  # empty: every A is in the file
    steps: int = 0
    numbers_sha256: str = ""

    @property
    def layout(self) -> AdapterLayout:
        """The adapter's layout. Raises UnsupportedError when a size is out of range."""
        return AdapterLayout.of(
            self.layers, self.lora_shapes, self.lora, layer_path=self.layer_path, dense=self.dense
        )


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in memory: every `.A` and `.B`, and every `dense/NAME`, by our names."""

    header: AdapterHeader
    tensors: dict[str, Floats]

    @property
    def vector(self) -> Floats:
        """All B and the dense part in layout order: what trains and travels under the rule `ffa`."""
        layout = self.header.layout
        return layout.join({name: self.tensors[name] for name in layout.shapes})


def adapter_of(
    manifest: Manifest,
    vector: Floats,
    *,
    a_seed: bytes = b"",
    a: Mapping[str, Floats] | None = None,
    lora: LoraConfig | None = None,
    rule: str = "ffa",
    steps: int = 0,
) -> Adapter:
    """An adapter of the bundle `manifest`: A by its seed, or given. Raises DataError when shapes do not fit."""
    layout = layout_of(manifest, lora)
    header = AdapterHeader(
        bundle=bundle_digest(manifest),
        model=manifest.model,
        architecture=manifest.architecture,
        heads=manifest.heads,
        kv_heads=manifest.kv_heads,
        layers=manifest.layers,
        layer_path=layout.layer_path,
        lora=lora or manifest.lora,
        lora_shapes=dict(manifest.lora_shapes),
        dense=dict(layout.dense),
        rule=rule,
        a_seed=b"" if a is not None else a_seed,
        steps=steps,
    )
    adapter = Adapter(header, {**(layout.frozen(a_seed) if a is None else a), **layout.split(vector)})
    _check_shapes(adapter, "adapter")
    return adapter


def adapter_of_state(manifest: Manifest, rule: Rule, name: str, state: Floats, *, steps: int) -> Adapter:
    """The adapter that a campaign's file `state` under the rule called `name` stands for: A and B of its function.

    An A that follows from the rule's seed is told by it. Raises DataError when the file has another size.
    """
    held, layout = rule.held(state), rule.layout
    follows = not any(tensor in held for tensor in layout.a_shapes)
    return adapter_of(
        manifest,
        layout.join({tensor: held[tensor] for tensor in layout.shapes}),
        a_seed=rule.a_seed,
        a=None if follows else {tensor: held[tensor] for tensor in layout.a_shapes},
        rule=name,
        steps=steps,
    )


def layout_of(manifest: Manifest, lora: LoraConfig | None = None) -> AdapterLayout:
    """The layout of the adapter that the bundle trains, or of one with another config on the same modules."""
    return manifest.layout if lora is None else manifest.layout.like(lora)


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write the file durably, whole or not at all. Raises StorageError, DataError for a number that is not finite."""
    stored = _stored(adapter)
    for name, values in stored.items():
        if not np.isfinite(values).all():
            raise DataError("adapter holds a number that is not finite", field=name)
    header = msgspec.structs.replace(adapter.header, numbers_sha256=_digest(stored))
    durable.write_bytes(
        path, encode_tensors(stored, {KEY: msgspec.json.encode(header, order="sorted").decode()})
    )


def is_adapter_file(path: Path) -> bool:
    """Whether `path` is a file that says it is one of ours; it may still be refused by `read_adapter`."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(512)
    return b'"__metadata__"' in head and f'"{KEY}"'.encode() in head


def read_adapter(path: Path, manifest: Manifest | None = None) -> Adapter:
    """The adapter in `path`; with `manifest`, only when it belongs to that bundle.

    Raises NoInputError, StorageError, DataError naming what is wrong in which tensor, IntegrityError when the numbers
    or the bundle are others than the header says, UnsupportedError for a newer version.
    """
    found = read_file(path, bytes_max=ADAPTER_FILE_BYTES_MAX)
    header = _header(path, found.metadata)
    if manifest is not None and header.bundle != bundle_digest(manifest):
        raise IntegrityError(
            f"{path} belongs to another bundle",
            field="bundle",
            value=header.bundle,
            hint=f"It was made from {header.model}; this bundle is {bundle_digest(manifest)}",
        )
    values = {name: widened(path, name, raw) for name, raw in found.tensors.items()}
    for name, tensor in values.items():
        if not np.isfinite(tensor).all():
            raise DataError(f"{path} holds a number that is not finite", field=name)
    if _digest(values) != header.numbers_sha256:
        raise IntegrityError(
            f"{path}: the numbers are not those that were written",
            field="numbers_sha256",
            value=_digest(values),
        )
    if header.a_seed:
        values = {**header.layout.frozen(header.a_seed), **values}
    adapter = Adapter(header, values)
    _check_shapes(adapter, str(path))
    return adapter


def _header(path: Path, metadata: Mapping[str, str]) -> AdapterHeader:
    text = metadata.get(KEY)
    if text is None:
        raise DataError(f"{path} is no adapter file of fedge", field="metadata", value=sorted(metadata)[:4])
    try:
        version = msgspec.json.decode(text, type=_Version).version
        if version > VERSION:
            raise UnsupportedError(
                f"{path} is newer than this version of fedge",
                field="version",
                value=version,
                hint="Update fedge",
            )
        return msgspec.json.decode(text, type=AdapterHeader)
    except msgspec.MsgspecError as error:
        raise DataError(f"{path}: the header cannot be read: {error}", field=KEY) from error


class _Version(msgspec.Struct):
    version: int


def _stored(adapter: Adapter) -> dict[str, Floats]:
    """What goes into the file: an A that follows from the seed stays out."""
    return {n: t for n, t in adapter.tensors.items() if not (adapter.header.a_seed and n.endswith(".A"))}


def _check_shapes(adapter: Adapter, where: str) -> None:
    layout, found = adapter.header.layout, adapter.tensors
    expected: dict[str, tuple[int, ...]] = {**layout.a_shapes, **layout.shapes}
    for name in [*expected, *found]:
        shape = found[name].shape if name in found else None
        if expected.get(name) != shape:
            missing = "is missing" if shape is None else "is misshapen"
            what = missing if name in expected else "belongs nowhere"
            raise DataError(f"{where}: a tensor {what}", field=name, value=shape)


def _digest(tensors: Mapping[str, Floats]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {tensors[name].shape}\n".encode())
        whole.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return whole.hexdigest()
