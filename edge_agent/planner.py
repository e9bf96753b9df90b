"""What a step may cost in memory on this board, and how it is carried out so that it fits."""

from __future__ import annotations

from typing import Literal

import msgspec


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a step is carried out. The default is the plain way: block inputs kept in memory, a batch at once."""

    keep: int = 0  # so many layers, from the top, keep the products of their frozen matrices
    checkpoints: Literal["plain", "half", "file"] = (
        "plain"  # where the inputs of blocks wait for the way back
    )
    rows: int = 0  # rows of a batch at a time, 0 = all
    head_rows: int = 0  # rows of the output matrix at a time, 0 = as the manifest says
