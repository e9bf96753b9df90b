"""What a step takes in memory, worked out from the manifest, and how it is carried out so that it fits a board.

Many boards enforce no limit of memory (the kernel of a Raspberry Pi starts with that controller off), and a job that
is too large takes the whole machine down. So it is planned beforehand, and not killed in the middle (field case F20).

The ways to save, in the order in which they are tried, because the first cost nothing and change no bit:
keep the products of frozen matrices for the way back (a fifth less arithmetic, where there is room); plain
checkpoints; a smaller slice of the output matrix; fewer rows at a time (the same sum in another order); checkpoints
in half precision (1/2048 of each number); checkpoints in a file (exact, but it is written in every step, and flash
cards wear out). When nothing fits, the refusal names what would. Layers that do not train need no way back: a
classifier's head alone takes one row at a time through the layers, there and never back.

The terms are what the streamed step holds at once (`edge_agent.trainer.step`); the constants were fitted to fresh
processes by `benchmarks/training_step.py`, which prints prediction and measurement side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final, Literal

import msgspec

from edge_agent.depth import ALL, FEATURES, HEAD, lowest_layer
from fedge.errors import UnavailableError
from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import Manifest, TensorPlace

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
KEPT_BYTES_MAX: Final = 8 << 20  # of what a head alone reads: 5,400 rows of 384 numbers
_REACH_BYTES: Final = 131_072  # that the kernel maps around a row: 64 KB, or a folio; measured 50 to 230 KB
_FLOAT: Final = 4

# How many floats a position needs at the worst moment, in units of the widest matrix and of the hidden state; and how
# much of what an arena has is lost to pieces that fit nothing.
_FORWARD_WIDE, _FORWARD_HIDDEN = 3.0, 4.0
_BACKWARD_WIDE, _BACKWARD_HIDDEN = 5.0, 10.0
_ATTENTION_HIDDEN, _ATTENTION_PIECES = 10.0, 4.0
_FORWARD_SCORES: Final = 2.0  # where no way back follows
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
    """What a worker is predicted to take at its peaks, in bytes: resident, and that part of it that no file backs.

    The rest of `peak` are pages of libraries and of the weight file, which the kernel may take back and read again.
    """

    peak: int
    anonymous: int


class _Step(msgspec.Struct, frozen=True):
    """Of a step, in bytes: what is held from one phase to the next, and what the largest of them takes besides."""

    held: float
    phase: float
    tokens: int  # that go through the layers at once


def plan(
    manifest: Manifest, training: Training, memory_bytes: int, *, gauged: bool = False, depth: int = ALL
) -> Plan:
    """The best plan whose peak fits `memory_bytes`. A worker that has `gauged` holds its sessions when it reads data;
    the top `depth` layers train (`edge_agent.depth`).

    Raises UnavailableError when none does, saying what would fit.
    """
    for candidate in _candidates(manifest, training, depth):
        if fits(manifest, training, candidate, memory_bytes, gauged=gauged, depth=depth):
            return candidate
    raise _nothing_fits(manifest, training, memory_bytes, gauged=gauged, depth=depth)


def fits(
    manifest: Manifest,
    training: Training,
    chosen: Plan,
    memory_bytes: int,
    *,
    gauged: bool = False,
    depth: int = ALL,
) -> bool:
    """Whether a plan's predicted peak, with its margin, is within `memory_bytes`."""
    room = memory_bytes * (_KEEP_SHARE if chosen.keep else 1.0)
    return worker_bytes(manifest, training, chosen, gauged=gauged, depth=depth) <= room


def need(
    manifest: Manifest,
    training: Training,
    chosen: Plan | None = None,
    *,
    label_share: float = 1.0,
    gauged: bool = False,
    data: bool = True,
    depth: int = ALL,
    kept_bytes: int = KEPT_BYTES_MAX,
) -> Need:
    """The prediction for a worker that trains so; `label_share` of all positions are learnt.

    Without `data`, for a process that reads none: a gauge, or a benchmark. `kept_bytes` of what a head alone reads.
    """
    step = _step(manifest, training, chosen or Plan(), label_share, depth)
    if trains_head_once(manifest, depth):
        step = msgspec.structs.replace(step, held=step.held + kept_bytes)
    reading = 0
    if data and "tokenizer.json" in manifest.files:
        reading = manifest.files["tokenizer.json"].size * _TOKENIZER_RATIO
    held = RUNTIME_BYTES + step.held + (reading if gauged else 0)
    anonymous = max(RUNTIME_BYTES + reading, held + step.phase)
    mapped = max(anonymous + _block_pages(manifest), held + _table_pages(manifest, step.tokens))
    return Need(int(LIBRARY_BYTES + mapped), int(anonymous))


def worker_bytes(
    manifest: Manifest,
    training: Training,
    chosen: Plan | None = None,
    *,
    gauged: bool = False,
    depth: int = ALL,
) -> int:
    """What must be free for a worker that trains so (None: the plain way): its predicted peak and a margin, in bytes.

    The one figure by which a device decides and which `fedge bundle plan` tells.
    """
    return int(_MARGIN * need(manifest, training, chosen, gauged=gauged, depth=depth).peak)


def encodes_once(manifest: Manifest) -> bool:
    """Whether a head that trains alone needs each row once: the bundle has the graphs for what it reads of a row."""
    return {f"{name}.onnx" for name in (FEATURES, HEAD)} <= manifest.files.keys()


def trains_head_once(manifest: Manifest, depth: int) -> bool:
    """Whether a step is one of a head alone that needs each row once."""
    return lowest_layer(depth, manifest.layers) == manifest.layers and encodes_once(manifest)


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


def _candidates(manifest: Manifest, training: Training, depth: int) -> Iterator[Plan]:
    back = lowest_layer(depth, manifest.layers) < manifest.layers
    if trains_head_once(manifest, depth):  # a row at a time, and nothing waits: no other way takes less
        yield Plan()
        return
    if back and "block_bwd_keep.onnx" in manifest.files:
        for share in _KEEP_LAYERS:
            if layers := int(manifest.layers * share):
                yield Plan(keep=layers)
    yield Plan()
    small = min(_SMALL_SLICE, manifest.head_rows)
    ways: tuple[Literal["plain", "half", "file"], ...] = ("plain", "half", "file")
    for where in ways if back else ways[:1]:
        rows = step_rows(manifest, training)
        yield Plan(checkpoints=where, head_rows=small)
        while rows > 1:
            rows = -(-rows // 2)
            yield Plan(checkpoints=where, head_rows=small, rows=rows)


def _nothing_fits(
    manifest: Manifest, training: Training, memory_bytes: int, *, gauged: bool, depth: int
) -> UnavailableError:
    def least(tokens: int) -> int:
        shorter = msgspec.structs.replace(training, window_tokens=tokens)
        return min(
            worker_bytes(manifest, shorter, candidate, gauged=gauged, depth=depth)
            for candidate in _candidates(manifest, shorter, depth)
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


def _step(manifest: Manifest, training: Training, chosen: Plan, label_share: float, depth: int) -> _Step:
    """Adapter and what waits for the way back are held; the phases follow each other."""
    rows, length = step_rows(manifest, training), row_tokens(manifest, training)
    trained = manifest.layers - lowest_layer(depth, manifest.layers)
    alone = trains_head_once(manifest, depth)
    at_once = 1 if alone else min(chosen.rows or rows, rows)
    tokens = at_once * length
    hidden = tokens * manifest.hidden * _FLOAT
    share = {"plain": 1.0, "half": 0.5, "file": 0.0}[chosen.checkpoints]
    kept = min(chosen.keep, trained) * tokens * _kept_floats(manifest) * _FLOAT
    aux = len(set(manifest.layer_kinds) or {""}) * at_once * length * length * _FLOAT
    sums = _adapter_bytes(manifest, pieces=at_once < rows and not alone)
    held = sums + trained * hidden * share + kept + aux + 3 * hidden
    phase = max(
        _blocks(manifest, at_once, length, back=trained > 0),
        _head(manifest, int(label_share * tokens) + 1, chosen.head_rows),
    )
    return _Step(held + (_KEEP_SESSIONS if chosen.keep else 0), _ARENA * phase, tokens)


def _blocks(manifest: Manifest, rows: int, length: int, *, back: bool) -> float:
    """The working memory of a block, there and `back`."""
    shapes, tokens = matrices(manifest), rows * length
    dense = max((prod(shape) for shape in shapes), default=0)
    wide, hidden = max((shape[0] for shape in shapes), default=0), manifest.hidden
    long = manifest.positions_max >= _PIECES_TOKENS and not manifest.logit_cap and manifest.hears is None
    pieces = min(_PIECES_MAX, manifest.kv_heads) if long else 1
    scores = rows * -(-manifest.heads // pieces) * length * length
    there = dense + tokens * (_FORWARD_WIDE * wide + _FORWARD_HIDDEN * hidden)
    if not back:
        return _FLOAT * max(there, tokens * _FORWARD_HIDDEN * hidden + _FORWARD_SCORES * scores)
    floats = max(
        there,
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


def _adapter_bytes(manifest: Manifest, *, pieces: bool) -> int:
    """A and its gradient; the vector, its gradient, both moments, the delta and a copy on its way to the disk.

    Of a batch in `pieces`, the gradients so far beside those of a piece.
    """
    layout: AdapterLayout = manifest.layout
    frozen = sum(map(prod, layout.a_shapes.values()))
    return _FLOAT * (6 * layout.numbers + 2 * frozen + pieces * (layout.numbers + frozen))


def _block_pages(manifest: Manifest) -> int:
    """Pages of the weight file that are ours while a block works."""
    return sum(_bytes(place) for name, place in manifest.tensors.items() if name.startswith("L0/"))


def _table_pages(manifest: Manifest, tokens: int) -> int:
    """The same while rows of so many tokens are read from the embedding, or from the output matrix."""

    def of(table: str) -> int:
        parts = [_bytes(place) for name, place in manifest.tensors.items() if name.startswith(table)]
        return sum(min(part, tokens * _REACH_BYTES) for part in parts)

    return max(of("EMB."), of("HEAD."))


def _bytes(place: TensorPlace) -> int:
    return prod(place.shape) * _WIDTH.get(place.dtype, _FLOAT)


_WIDTH: Final = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4}
