"""Which weight format a source gets, and why: what keeps its weights exactly comes before anything that refits them.

Judged by KL to the source, not by weight error, the order of the refits is int8g (0.001 nats a token), int4d, int4gz;
`benchmarks/formats.py` prints the table. `int8c` and `nf4` are taken only when asked for: the first computes another
approximation on each instruction set, the second is there for people who compare with bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fedge.errors import UnsupportedError
from quantize.blocks import linears_of, matrix_of
from quantize.formats import EMBEDDING_FORMAT, FORMATS, WeightFormat, converted
from quantize.source import Source

AUTO: Final = "auto"
_EXACT: Final = ("int4d", "int8g", "int8d")  # by size
_REFITS: Final = ("int8g", "int4d", "int4gz")  # by quality
_MEGABYTE: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """A format, whether it keeps the source's weights, and one sentence that says why it was taken."""

    format: WeightFormat
    exact: bool
    reason: str


def choose(source: Source, requested: str | None = None, *, memory_bytes: int | None = None) -> Choice:
    """The format of the blocks: `requested` if given and not "auto", else the best that suits.

    `memory_bytes` is that of the smallest board that shall train the model. Weights are read from the file layer by
    layer and need not stay in memory, but a board whose page cache holds them all trains much faster: so they get
    half of it. Raises UnsupportedError for a format that does not exist or does not fit the model's sizes.
    """
    if requested not in (None, AUTO):
        return _asked_for(source, str(requested))
    known = kept_by(source)
    limit = None if memory_bytes is None else memory_bytes // 2
    exact = next((name for name in _EXACT if name in known), None)
    if exact is not None and _fits(source, exact, limit):
        return Choice(FORMATS[exact], True, f"{exact} holds every weight of the source as it is")
    candidates = [name for name in _REFITS if _fits(source, name, limit)]
    name = candidates[0] if candidates else _REFITS[-1]
    size = f"{weight_bytes(source, FORMATS[name]) / _MEGABYTE:.0f} MB of weights"
    if exact is not None:
        why = f"{exact} would keep the source exactly but does not fit"
    elif source.exact:
        why = "the source mixes grids that no format holds exactly"
    else:
        why = "the source is not on a grid of ours"
    if not candidates:
        return Choice(
            FORMATS[name], False, f"{why}; nothing fits in half the memory, {name} is smallest: {size}"
        )
    best = "costs least" if name == _REFITS[0] else "is the best that fits in half the memory"
    return Choice(FORMATS[name], False, f"{why}; {name} {best}: {size}")


def kept_by(source: Source) -> frozenset[str]:
    """The formats that hold every matrix of the blocks exactly as the source has it."""
    kept = set(_EXACT)
    for name in matrix_names(source):
        known = source.exact.get(name)
        kept = {fmt for fmt in kept if known is not None and converted(*known, FORMATS[fmt]) is not None}
        if not kept:
            break
    return frozenset(kept)


def is_exact(source: Source, format_name: str) -> bool:
    """Whether this format holds every matrix of the blocks exactly as the source has it."""
    return format_name in kept_by(source)


def weight_bytes(source: Source, fmt: WeightFormat) -> int:
    """Bytes of all matrices of a bundle in this format, embedding and head included."""
    anatomy, total = source.anatomy, 0.0
    for layer in anatomy.layers:
        for module in linears_of(layer).values():
            rows, columns = matrix_of(module).shape
            total += rows * columns * fmt.bits_per_weight(columns) / 8
    tables = 1 if anatomy.head_tied or anatomy.head is None else 2
    embedding = FORMATS[EMBEDDING_FORMAT].bits_per_weight() / 8
    return int(total + tables * anatomy.vocabulary * anatomy.hidden * embedding)


def matrix_names(source: Source) -> Iterator[str]:
    """Parameter name of every matrix of the blocks, layer by layer."""
    anatomy = source.anatomy
    for index, layer in enumerate(anatomy.layers):
        yield from (f"{anatomy.layers_path}.{index}.{name}.weight" for name in linears_of(layer))


def _asked_for(source: Source, requested: str) -> Choice:
    if requested not in FORMATS:
        raise UnsupportedError(
            "no such weight format",
            field="format",
            value=requested,
            hint=f"Known: {AUTO}, {', '.join(FORMATS)}",
        )
    fmt = FORMATS[requested]
    for name, module in linears_of(source.anatomy.layers[0]).items():
        columns = matrix_of(module).shape[1]
        if fmt.block and columns % fmt.block:
            raise UnsupportedError(
                f"{requested} needs rows of a multiple of {fmt.block} weights; {name} has others",
                field="format",
                value=columns,
                hint=f"Known: {AUTO}, {', '.join(FORMATS)}",
            )
    exact = is_exact(source, requested)
    return Choice(fmt, exact, "asked for" + ("; it holds the source exactly" if exact else ""))


def _fits(source: Source, name: str, limit: int | None) -> bool:
    return limit is None or weight_bytes(source, FORMATS[name]) <= limit
