"""How much memory a round will take, worked out from the manifest before a worker is started.

Many boards enforce no limit of memory (the kernel of a Raspberry Pi starts with that controller off), and a job that
is too large takes the whole machine down. So it is refused beforehand, and not killed in the middle.

The terms are what the streamed step holds at once (edge_agent.trainer.step), the constants were fitted to the peaks of
fresh workers (VmHWM; SmolLM2-135M in int4d, 4 x 64 tokens: 145 MB measured, 151 MB before the margin; 8 x 256: 500 MB
and 505 MB; a two-layer model: 89 MB and 91 MB).
"""

from __future__ import annotations

from math import prod
from typing import Final

from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import Manifest, TensorPlace

RUNTIME_BYTES: Final = 88_000_000  # interpreter, numpy, ONNX Runtime and its sessions
_TOKENIZER_RATIO: Final = 26  # a loaded tokenizer over its file; it is let go before the sessions are loaded
_MARGIN: Final = 1.15  # what real data adds: rows, ragged batches, holes in the arena
_FLOAT: Final = 4
_BYTES: Final = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}


def worker_bytes(manifest: Manifest, training: Training, *, gauged: bool = False) -> int:
    """The predicted peak of resident memory of a worker that trains so, in bytes.

    One that has `gauged` already holds its sessions when it reads the data: both are there at once.
    """
    reading = (
        manifest.files["tokenizer.json"].size * _TOKENIZER_RATIO if "tokenizer.json" in manifest.files else 0
    )
    step = _step_bytes(manifest, training)
    return int(_MARGIN * (RUNTIME_BYTES + (reading + step if gauged else max(reading, step))))


def _step_bytes(manifest: Manifest, training: Training) -> int:
    """One block and one slice of the head with its floats, the adapter, and what a batch's tokens take."""
    block = sum(_size(place) for name, place in manifest.tensors.items() if name.startswith("L0/"))
    head = manifest.head_rows * manifest.hidden * (1 + _FLOAT)
    return block + head + _adapter_bytes(manifest) + _batch_bytes(manifest, training)


def _adapter_bytes(manifest: Manifest) -> int:
    """A, B, its gradient, both moments, the delta and a copy on its way to the disk."""
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r)
    frozen = sum(map(prod, layout.a_shapes.values()))
    return _FLOAT * (6 * layout.numbers + frozen)


def _batch_bytes(manifest: Manifest, training: Training) -> int:
    """Each block's input is kept; a block's way back needs its inner tensors and scores, the head two slices."""
    tokens = training.batch_rows * training.window_tokens
    inner = max(max(place.shape) for name, place in manifest.tensors.items() if name.startswith("L0/"))
    kept = manifest.layers * manifest.hidden
    working = 6 * inner + 8 * manifest.hidden + 2 * manifest.head_rows
    scores = 4 * manifest.heads * training.window_tokens
    return _FLOAT * tokens * (kept + working + scores)


def _size(place: TensorPlace) -> int:
    return prod(place.shape) * _BYTES.get(place.dtype, _FLOAT)
