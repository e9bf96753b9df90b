"""How much of a model trains: all of its layers, so many from the top, or none of them and the head alone."""

from __future__ import annotations

from typing import Final

ALL: Final = 0
HEAD_ONLY: Final = -1
# Graphs of a bundle whose head alone needs each row once: what it reads of a row, and what it makes of that.
FEATURES: Final = "features"
HEAD: Final = "head"


def lowest_layer(depth: int, layers: int) -> int:
    """The number of the lowest layer that trains, of `layers`; `layers` itself when it is the head alone."""
    if depth == HEAD_ONLY:
        return layers
    return layers - min(depth or layers, layers)
