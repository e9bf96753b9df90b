"""Which weight format a source gets, and why: what keeps its weights exactly comes before anything that refits them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedge.errors import UnsupportedError
from quantize.blocks import layers_of, linears_of
from quantize.formats import FORMATS, WeightFormat
from quantize.source import Source


@dataclass(frozen=True, slots=True)
class Choice:
    """A format and one sentence that says why it was taken, for the person who asked."""

    format: WeightFormat
    reason: str


def choose(source: Source, requested: str | None) -> Choice:
    """The format of the blocks: what was asked for; else one that keeps the source exactly, else int8g."""
    if requested not in (None, "auto"):
        if requested not in FORMATS:
            raise UnsupportedError(
                "no such weight format", field="format", value=requested, hint=f"Known: {', '.join(FORMATS)}"
            )
        return Choice(FORMATS[requested], "asked for")
    if is_exact(source, "int4d"):
        return Choice(FORMATS["int4d"], "every matrix of the source lies on its grid: exact")
    return Choice(FORMATS["int8g"], "no 4-bit grid holds the source; 8 bits cost at most 0.005 nats")


def is_exact(source: Source, format_name: str) -> bool:
    """Whether every matrix of the blocks came from the source on this format's grid."""
    found = [source.exact.get(f"{name}.weight") for name in matrix_names(source.model)]
    return all(entry is not None and entry[0] == format_name for entry in found)


def matrix_names(model: Any) -> Iterator[str]:
    """Module path of every matrix of the blocks, layer by layer."""
    for index, layer in enumerate(layers_of(model)):
        yield from (f"model.layers.{index}.{name}" for name in linears_of(layer))
