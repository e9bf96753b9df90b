"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), step for step as torch has it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_BETA1: Final = 0.9
_BETA2: Final = 0.999
_EPSILON: Final = 1e-8


class AdamW:
    """Holds the two moments of one vector; made anew each round."""

    def __init__(self, numbers: int, *, rate: float, weight_decay: float) -> None:
        self._rate, self._decay = rate, weight_decay
        self._mean = np.zeros(numbers, np.float32)
        self._square = np.zeros(numbers, np.float32)
        self._steps = 0

    def step(self, vector: Floats, gradient: Floats) -> None:
        """Move `vector` (float32) in place, against `gradient`."""
        self._steps += 1
        self._mean += (gradient - self._mean) * np.float32(1 - _BETA1)
        self._square *= np.float32(_BETA2)
        self._square += gradient * gradient * np.float32(1 - _BETA2)
        vector *= np.float32(1 - self._rate * self._decay)
        scale = self._rate / (1 - _BETA1**self._steps)
        width = np.sqrt(self._square) / np.float32((1 - _BETA2**self._steps) ** 0.5) + np.float32(_EPSILON)
        vector -= np.float32(scale) * self._mean / width
