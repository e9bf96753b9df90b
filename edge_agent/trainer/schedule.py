"""The learning rate of each step: up in a straight line, then flat, or down along half a cosine.

Warm-up as in Goyal et al. 2017 (arXiv 1706.02677), decay as in Loshchilov and Hutter 2017 (arXiv 1608.03983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Schedule:
    """`peak` is reached after `warmup` steps; with `cosine`, the rate falls to `floor` x peak at step `steps`."""

    peak: float
    kind: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    steps: int = 0  # of the whole run; only a cosine needs to know
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or (self.kind == "cosine" and self.steps <= self.warmup):
            raise ConfigError(
                "schedule ends before its warm-up",
                field="warmup",
                value=self.warmup,
                hint=f"Fewer than {self.steps} steps",
            )

    def rate(self, step: int) -> float:
        """Of the step with this number, from 1 on."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        if self.kind == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup - 1) / max(1, self.steps - self.warmup - 1))
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done)))
