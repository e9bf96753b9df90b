"""What a step takes in memory, worked out from the manifest, and how it is carried out so that it fits a board.

Many boards enforce no limit of memory (the kernel of a Raspberry Pi starts with that controller off), and a job that
is too large takes the whole machine down. So it is planned beforehand, and not killed in the middle (field case F20).

The ways to save, in the order in which they are tried, because the first cost nothing and change no bit:
keep the products of frozen matrices for the way back (a fifth less arithmetic, where there is room); plain
checkpoints; a smaller slice of the output matrix; fewer rows at a time (the same sum in another order); checkpoints
in half precision (1/2048 of each number); checkpoints in a file (exact, but it is written in every step, and flash
cards wear out). When nothing fits, the refusal names what would.

The terms are what the streamed step holds at once (`edge_agent.trainer.step`); the constants were fitted to fresh
processes by `benchmarks/training_step.py`, which prints prediction and measurement side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final, Literal

import msgspec

from fedge.errors import UnavailableError
from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import Manifest

RUNTIME_BYTES: Final = 34_500_000  # anonymous: interpreter, numpy, ONNX Runtime and the sessions of a step
AGENT_BYTES: Final = 40_960_000  # of an agent beside its worker, for plans made without one; measured 38 MB
LIBRARY_BYTES: Final = 50_000_000  # pages of their files that a step touches
_KEEP_SESSIONS: Final = 2_500_000
_TOKENIZER_RATIO: Final = 26  # a loaded tokenizer over its file; it is let go before the sessions are loaded
_MARGIN: Final = 1.1  # what a prediction may be wrong by
_KEEP_LAYERS: Final = (1.0, 0.75, 0.5, 0.25)  # few choices: a warm worker keeps its plan
_KEEP_SHARE: Final = 0.5  # of free memory, at most, goes into what only saves time
_PIECES_MAX: Final = 8  # of attention (quantize.pieces), where a model takes texts as long as this
_PIECES_TOKENS: Final = 512
_SMALL_SLICE: Final = 1_024  # rows of the output matrix at a time, when memory is short
_FLOAT: Final = 4

# How many floats a position needs at the worst moment, in units of the widest matrix and of the hidden state; and how
# much of what an arena has is lost to pieces that fit nothing.
_FORWARD_WIDE, _FORWARD_HIDDEN = 3.0, 4.0
_BACKWARD_WIDE, _BACKWARD_HIDDEN = 5.0, 10.0
_ATTENTION_HIDDEN, _ATTENTION_PIECES = 10.0, 4.0
_ARENA: Final = 1.12


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a step is carried out. The default is the plain way: block inputs kept in memory, a batch at once."""

    keep: int = 0  # so many layers, from the top, keep the products of their frozen matrices
    checkpoints: Literal["plain", "half", "file"] = (
        "plain"  # where the inputs of blocks wait for the way back
    )
    rows: int = 0  # rows of a batch at a time, 0 = all
    head_rows: int = 0  # rows of the output matrix at a time, 0 = as the manifest says

    @property
    def exact(self) -> bool:
        """Whether it gives the very bits of the plain way."""
        return self.checkpoints != "half" and not self.rows and not self.head_rows


class Need(msgspec.Struct, frozen=True):
    """What a worker is predicted to take, in bytes: resident at its peak, and the part of it that no file backs."""

    peak: int
    anonymous: int


def plan(manifest: Manifest, training: Training, memory_bytes: int, *, gauged: bool = False) -> Plan:
    """The best plan whose peak fits `memory_bytes`. A worker that has `gauged` holds its sessions when it reads data.

    Raises UnavailableError when none does, saying what would fit.
    """
    for candidate in _candidates(manifest, training):
        if fits(manifest, training, candidate, memory_bytes, gauged=gauged):
            return candidate
    raise _nothing_fits(manifest, training, memory_bytes, gauged=gauged)


def fits(
    manifest: Manifest, training: Training, chosen: Plan, memory_bytes: int, *, gauged: bool = False
) -> bool:
    """Whether a plan's predicted peak, with its margin, is within `memory_bytes`."""
    room = memory_bytes * (_KEEP_SHARE if chosen.keep else 1.0)
    return worker_bytes(manifest, training, chosen, gauged=gauged) <= room


def need(
    manifest: Manifest,
    training: Training,
    chosen: Plan | None = None,
    *,
    label_share: float = 1.0,
    gauged: bool = False,
    data: bool = True,
) -> Need:
    """The prediction for a worker that trains so; `label_share` of all positions are learnt.

    Without `data`, for a process that reads none: a gauge, or a benchmark.
    """
    chosen = chosen or Plan()
    step = _step_bytes(manifest, training, chosen, label_share)
    files = LIBRARY_BYTES + _mapped_bytes(manifest)
    reading = 0
    if data and "tokenizer.json" in manifest.files:
        reading = manifest.files["tokenizer.json"].size * _TOKENIZER_RATIO
    anonymous = RUNTIME_BYTES + (reading + step if gauged else max(reading, step))
    return Need(anonymous + files, anonymous)


def worker_bytes(
    manifest: Manifest, training: Training, chosen: Plan | None = None, *, gauged: bool = False
) -> int:
    """What must be free for a worker that trains so (None: the plain way): its predicted peak and a margin, in bytes.

    The one figure by which a device decides and which `fedge bundle plan` tells.
    """
    return int(_MARGIN * need(manifest, training, chosen, gauged=gauged).peak)


def row_tokens(manifest: Manifest, training: Training) -> int:
    """Positions of the longest row: the window of a campaign, or the only one that a bundle of recordings has."""
    return training.window_tokens if manifest.hears is None else manifest.positions_max


def step_rows(manifest: Manifest, training: Training) -> int:
    """Rows that go through the layers in a step: a pair is two texts."""
    return training.batch_rows * (2 if manifest.task == "embed" else 1)


def matrices(manifest: Manifest) -> list[tuple[int, int]]:
    """(rows, columns) of each frozen matrix of a block."""
    packed = 2 if "4" in manifest.weights_format else 1
    shapes = [
        place.shape
        for name, place in manifest.tensors.items()
        if name.startswith("L0/") and name.endswith(".w.q")
    ]
    return [(shape[0], packed * prod(shape[1:])) for shape in shapes]


def _candidates(manifest: Manifest, training: Training) -> Iterator[Plan]:
    if "block_bwd_keep.onnx" in manifest.files:
        for share in _KEEP_LAYERS:
            if layers := int(manifest.layers * share):
                yield Plan(keep=layers)
    yield Plan()
    small = min(_SMALL_SLICE, manifest.head_rows)
    where: Literal["plain", "half", "file"]
    for where in ("plain", "half", "file"):
        rows = step_rows(manifest, training)
        yield Plan(checkpoints=where, head_rows=small)
        while rows > 1:
            rows = -(-rows // 2)
            yield Plan(checkpoints=where, head_rows=small, rows=rows)


def _nothing_fits(
    manifest: Manifest, training: Training, memory_bytes: int, *, gauged: bool
) -> UnavailableError:
    def least(tokens: int) -> int:
        shorter = msgspec.structs.replace(training, window_tokens=tokens)
        return min(
            worker_bytes(manifest, shorter, candidate, gauged=gauged)
            for candidate in _candidates(manifest, shorter)
        )

    window = training.window_tokens
    while window > 8 and least(window) > memory_bytes:
        window //= 2
    lean = least(training.window_tokens)
    fits = manifest.hears is None and window < training.window_tokens and least(window) <= memory_bytes
    return UnavailableError(
        f"a round would take about {lean // 10**6} MB at the least, {memory_bytes // 10**6} MB can be had",
        field="memory",
        value=memory_bytes,
        hint=f"A window of {window} tokens would fit"
        if fits
        else "No window is short enough for this model here",
    )


def _step_bytes(manifest: Manifest, training: Training, chosen: Plan, label_share: float) -> int:
    """Adapter, what waits for the way back, and the largest of the phases: they follow each other."""
    rows = step_rows(manifest, training)
    rows = min(chosen.rows or rows, rows)
    length = row_tokens(manifest, training)
    tokens = rows * length
    hidden = tokens * manifest.hidden * _FLOAT
    share = {"plain": 1.0, "half": 0.5, "file": 0.0}[chosen.checkpoints]
    waiting = manifest.layers * hidden * share + chosen.keep * tokens * _kept_floats(manifest) * _FLOAT
    aux = len(set(manifest.layer_kinds) or {""}) * rows * length * length * _FLOAT
    phase = max(
        _blocks(manifest, rows, length), _head(manifest, int(label_share * tokens) + 1, chosen.head_rows)
    )
    sessions = _KEEP_SESSIONS if chosen.keep else 0
    return int(_adapter_bytes(manifest) + waiting + aux + 3 * hidden + _ARENA * phase + sessions)


def _blocks(manifest: Manifest, rows: int, length: int) -> float:
    """The working memory of a block, there and back."""
    shapes, tokens = matrices(manifest), rows * length
    dense = max((prod(shape) for shape in shapes), default=0)
    wide, hidden = max((shape[0] for shape in shapes), default=0), manifest.hidden
    long = manifest.positions_max >= _PIECES_TOKENS and not manifest.logit_cap and manifest.hears is None
    pieces = min(_PIECES_MAX, manifest.kv_heads) if long else 1
    scores = rows * -(-manifest.heads // pieces) * length * length
    floats = max(
        dense + tokens * (_FORWARD_WIDE * wide + _FORWARD_HIDDEN * hidden),
        dense + tokens * (_BACKWARD_WIDE * wide + _BACKWARD_HIDDEN * hidden) + (scores if pieces == 1 else 0),
        tokens * _ATTENTION_HIDDEN * hidden + _ATTENTION_PIECES * scores,
    )
    return _FLOAT * floats


def _head(manifest: Manifest, labels: int, slice_rows: int) -> float:
    """A slice of the output matrix, its logits with two copies, and what runs along."""
    height = min(slice_rows or manifest.head_rows, manifest.head_rows, manifest.vocabulary)
    return _FLOAT * (height * manifest.hidden + 3.0 * labels * height + 5.0 * labels * manifest.hidden)


def _kept_floats(manifest: Manifest) -> int:
    """Per position, of a layer that keeps: the products of all matrices but the last, whose product nobody reads."""
    return max(0, sum(shape[0] for shape in matrices(manifest)) - manifest.hidden)


def _adapter_bytes(manifest: Manifest) -> int:
    """A, the vector, its gradient, both moments, the delta and a copy on its way to the disk."""
    layout: AdapterLayout = manifest.layout
    return _FLOAT * (6 * layout.numbers + sum(map(prod, layout.a_shapes.values())))


def _mapped_bytes(manifest: Manifest) -> int:
    """Pages of the weight file that are ours at once: a block, or some rows of the embedding."""
    block = [
        prod(place.shape) * _WIDTH.get(place.dtype, _FLOAT)
        for name, place in manifest.tensors.items()
        if name.startswith("L0/")
    ]
    return sum(block)


_WIDTH: Final = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}
