"""What a fleet learns in a simulated world: the part of training that is not time, heat or energy."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


class Learned(msgspec.Struct, frozen=True):
    """One device's local training: the change of the trained numbers, and its loss in nats over `labels`."""

    delta: Vector
    loss_sum: float
    labels: int


class Task(Protocol):
    """Data of every device, and the training on it. Deterministic: the same arguments give the same bytes."""

    name: str
    numbers: int  # length of the adapter vector
    layers: int
    step_tokens: int  # processed in one step: what a step costs on a board
    rate: float  # of the local optimiser: the first codec's clip follows from it

    def first(self) -> bytes:
        """The adapter with which a campaign begins, little-endian float32."""

    def samples(self, number: int) -> int:
        """How many samples device `number` has."""

    def train(self, number: int, adapter: bytes, steps: int, seed: int, depth: int) -> Learned:
        """`steps` local steps of device `number` from `adapter`; `depth` as in an OPEN, 0 = all layers."""

    def evaluate(self, adapter: bytes) -> dict[str, float]:
        """Figures of a public test set; "loss" is among them."""
