"""AdamW and SGD with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), step for step as torch's.

Only what trains has state: an optimiser is made for so many numbers and sees no others. `moments` is all that it
remembers beside the number of steps, so that a run can be taken up again with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError

Floats = NDArray[np.float32]
Kind = Literal["adamw", "sgd"]
_BETA1: Final = 0.9
_BETA2: Final = 0.999
_EPSILON: Final = 1e-8


class Optimizer(Protocol):
    """What moves a vector against its gradient."""

    steps: int  # taken so far

    @property
    def moments(self) -> tuple[Floats, ...]: ...
    def step(self, vector: Floats, gradient: Floats, rate: float | None = None) -> None: ...
    def resume(self, steps: int, moments: Sequence[Floats]) -> None: ...


class AdamW:
    """Holds the two moments of one vector; made anew each round."""

    def __init__(self, numbers: int, *, rate: float, weight_decay: float) -> None:
        self._rate, self._decay = rate, weight_decay
        self._mean = np.zeros(numbers, np.float32)
        self._square = np.zeros(numbers, np.float32)
        self.steps = 0

    @property
    def moments(self) -> tuple[Floats, ...]:
        """Running means of the gradient and of its square."""
        return self._mean, self._square

    def step(self, vector: Floats, gradient: Floats, rate: float | None = None) -> None:
        """Move `vector` (float32) in place, against `gradient`, at `rate` where it differs from the usual one."""
        rate = self._rate if rate is None else rate
        self.steps += 1
        self._mean += (gradient - self._mean) * np.float32(1 - _BETA1)
        self._square *= np.float32(_BETA2)
        self._square += gradient * gradient * np.float32(1 - _BETA2)
        vector *= np.float32(1 - rate * self._decay)
        scale = rate / (1 - _BETA1**self.steps)
        width = np.sqrt(self._square) / np.float32((1 - _BETA2**self.steps) ** 0.5) + np.float32(_EPSILON)
        vector -= np.float32(scale) * self._mean / width

    def resume(self, steps: int, moments: Sequence[Floats]) -> None:
        """Go on from what `steps` and `moments` once were. Raises DataError when they are of another run."""
        self.steps = _fill(self.moments, steps, moments)


class Sgd:
    """Gradient descent with heavy-ball momentum; without momentum it remembers nothing."""

    def __init__(self, numbers: int, *, rate: float, weight_decay: float, momentum: float = 0.0) -> None:
        self._rate, self._decay, self._momentum = rate, weight_decay, momentum
        self._velocity = np.zeros(numbers if momentum else 0, np.float32)
        self.steps = 0

    @property
    def moments(self) -> tuple[Floats, ...]:
        """The velocity, when there is momentum."""
        return (self._velocity,) if self._momentum else ()

    def step(self, vector: Floats, gradient: Floats, rate: float | None = None) -> None:
        """Move `vector` (float32) in place, against `gradient`."""
        rate = self._rate if rate is None else rate
        self.steps += 1
        if self._momentum:
            self._velocity *= np.float32(self._momentum)
            self._velocity += gradient
            gradient = self._velocity
        vector *= np.float32(1 - rate * self._decay)
        vector -= np.float32(rate) * gradient

    def resume(self, steps: int, moments: Sequence[Floats]) -> None:
        """Go on from what `steps` and `moments` once were. Raises DataError when they are of another run."""
        self.steps = _fill(self.moments, steps, moments)


def make_optimizer(
    kind: Kind, numbers: int, *, rate: float, weight_decay: float, momentum: float = 0.0
) -> Optimizer:
    """The optimiser of this kind for so many numbers; `momentum` is SGD's."""
    if kind == "sgd":
        return Sgd(numbers, rate=rate, weight_decay=weight_decay, momentum=momentum)
    return AdamW(numbers, rate=rate, weight_decay=weight_decay)


def clip(gradient: Floats, norm_max: float) -> float:
    """Scale `gradient` in place so that its Euclidean norm is at most `norm_max`, 0 = no bound; the norm before."""
    norm = float(np.sqrt(np.square(gradient, dtype=np.float64).sum()))
    if 0 < norm_max < norm:
        gradient *= np.float32(norm_max / norm)
    return norm


def _fill(own: Sequence[Floats], steps: int, moments: Sequence[Floats]) -> int:
    if [moment.shape for moment in own] != [moment.shape for moment in moments]:
        raise DataError("saved moments are of another optimiser", field="moments", value=len(moments))
    for mine, saved in zip(own, moments, strict=True):
        mine[:] = saved
    return steps
