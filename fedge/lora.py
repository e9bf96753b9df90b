"""One config, one scale, one order of the adapter's numbers, for trainer, codec, aggregation and export.

Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * B A, with A of shape (r, in) and B of
shape (out, r).
"""

from __future__ import annotations

import math

import msgspec


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What turns A and B into the change of a weight. The only place where the scale is computed."""

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
