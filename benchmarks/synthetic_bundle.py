"""A bundle of a large model's shape without the model: graphs of two small-vocabulary layers, weights at random.

For figures of memory and time alone. All layers read the same stretch of the weight file, and so do all rows of the
embedding that a step touches; what a step holds in memory does not depend on it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.lora import LoraConfig
from fedge.release import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorPlace,
    encode_manifest,
    sign_manifest,
)

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-3.2-3b": {
        "hidden_size": 3_072,
        "intermediate_size": 8_192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151_936,
    },
}
_PATTERN_VOCABULARY: Final = 256  # graphs take any height of the embedding
_HEAD_ROWS: Final = 4_096
_PAGE: Final = 4_096


def write_bundle(shape: str, out: Path, lora: LoraConfig, format_name: str) -> Path:
    """The folder `out`, a bundle that opens and trains; its predictions mean nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantize.anatomy import dissect
    from quantize.blocks import adapted_modules
    from quantize.bundle import RUNTIME_MIN
    from quantize.formats import EMBEDDING_FORMAT, FORMATS
    from quantize.graph import operators
    from quantize.training import training_graphs

    sizes = SHAPES[shape]
    small = {**sizes, "num_hidden_layers": 2, "vocab_size": _PATTERN_VOCABULARY}
    config = LlamaConfig(**small, max_position_embeddings=8_192, tie_word_embeddings=True, use_cache=False)
    config._attn_implementation = "eager"
    anatomy = dissect(LlamaForCausalLM(config).eval())
    graphs = training_graphs(anatomy, lora, FORMATS[format_name], lambda *_: None)
    modules = adapted_modules(anatomy.model, lora)
    out.mkdir(parents=True)
    for name, graph in graphs.items():
        (out / name).write_bytes(graph.SerializeToString(deterministic=True))
    places = _write_weights(out / WEIGHTS, anatomy, sizes, format_name, EMBEDDING_FORMAT)
    key = Ed25519PrivateKey.generate()
    manifest = Manifest(
        format=FORMAT,
        model=f"random {shape}",
        architecture="LlamaForCausalLM",
        licence="none",
        source_sha256="0" * 64,
        weights_format=format_name,
        embedding_format=EMBEDDING_FORMAT,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        vocabulary=sizes["vocab_size"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        positions_max=8_192,
        head_tied=True,
        eos_id=0,
        pad_id=0,
        lora=lora,
        lora_shapes=modules,
        aux=anatomy.aux_outputs,
        head_rows=_HEAD_ROWS,
        operators=tuple(sorted(set[str]().union(*map(operators, graphs.values())))),
        runtime_min=RUNTIME_MIN,
        tensors=places,
        files={path.name: _entry(path) for path in sorted(out.iterdir())},
        gates={},
        publisher=key.public_key().public_bytes_raw().hex(),
    )
    data = encode_manifest(manifest)
    (out / MANIFEST).write_bytes(data)
    (out / SIGNATURE).write_bytes(sign_manifest(data, key))
    return out


def _write_weights(
    path: Path, anatomy: Any, sizes: dict[str, Any], blocks: str, embedding: str
) -> dict[str, TensorPlace]:
    """One layer, the embedding and the last norm; every layer's tensors lie where the first one's do."""
    from quantize.blocks import linears_of, matrix_of
    from quantize.formats import FORMATS

    layer = anatomy.layers[0]
    wanted: list[tuple[str, tuple[int, ...], str]] = []
    linears = linears_of(layer)
    for name, module in linears.items():
        rows, columns = matrix_of(module).shape
        for part in FORMATS[blocks].parts:
            wanted.append((f"{name}.w.{part.suffix}", tuple(map(int, part.shape(rows, columns))), part.dtype))
    for name, value in layer.named_parameters():
        if name.rpartition(".")[0] not in linears:
            wanted.append((name, tuple(value.shape), "float32"))
    outer = [("norm.weight", (sizes["hidden_size"],), "float32")]
    for part in FORMATS[embedding].parts:
        shape = tuple(map(int, part.shape(sizes["vocab_size"], sizes["hidden_size"])))
        outer.append((f"EMB.{part.suffix}", shape, part.dtype))
    random = np.random.default_rng(0)
    places: dict[str, TensorPlace] = {}
    with path.open("xb") as stream:
        for name, size, dtype in wanted + outer:
            stream.write(b"\0" * (-stream.tell() % _PAGE))
            place = TensorPlace(offset=stream.tell(), shape=size, dtype=dtype)
            stream.write(_numbers(random, name, size, dtype).tobytes())
            if (name, size, dtype) in outer:
                places[name] = place
            else:
                places |= {f"L{i}/{name}": place for i in range(sizes["num_hidden_layers"])}
    return places


def _numbers(random: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    if np.dtype(dtype).kind in "ui":
        return random.integers(0, 127, shape, np.uint8).astype(dtype)
    small = 1.0 if name.endswith("norm.weight") or "layernorm" in name else 1e-4
    return np.full(shape, small, dtype)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(size=path.stat().st_size, sha256=digest)
