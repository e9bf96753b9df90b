"""Randomness that replays: one splitmix64 stream for each (seed, device, purpose).

A stream's state is one integer, so a hundred thousand devices may own several, and no draw of one device moves the
draws of another (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final, TypeVar

Item = TypeVar("Item")

_MASK: Final = 2**64 - 1
_GAMMA: Final = 0x9E3779B97F4A7C15
_UNIT: Final = 2.0**-53


class Stream:
    """Draws that depend on the path alone: `Stream(seed, device, "link")`."""

    __slots__ = ("_state",)

    def __init__(self, *path: int | str) -> None:
        text = "/".join(map(str, path)).encode()
        self._state = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def word(self) -> int:
        """64 random bits."""
        self._state = z = (self._state + _GAMMA) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """In [low, high)."""
        return low + (high - low) * ((self.word() >> 11) * _UNIT)

    def integer(self, below: int) -> int:
        """In 0 … below - 1."""
        return self.word() % below

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def exponential(self, mean: float) -> float:
        return -mean * math.log(1.0 - self.uniform())

    def normal(self) -> float:
        """Mean 0, variance 1 (Box and Muller 1958)."""
        return math.sqrt(-2.0 * math.log(1.0 - self.uniform())) * math.cos(2.0 * math.pi * self.uniform())

    def lognormal(self, median: float, sigma: float) -> float:
        return median * math.exp(sigma * self.normal())

    def bytes(self, count: int) -> bytes:
        if count <= 8:
            return self.word().to_bytes(8, "little")[:count]
        words = b"".join(self.word().to_bytes(8, "little") for _ in range((count + 7) // 8))
        return words[:count]

    __call__ = bytes  # as the machines ask for entropy: an object less than a bound method

    def pick(self, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
        """One of `items`, each as likely as its weight says."""
        if weights is None:
            return items[self.integer(len(items))]
        at = self.uniform(0.0, sum(weights))
        for item, weight in zip(items, weights, strict=True):
            at -= weight
            if at < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Fisher and Yates."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(i + 1)
            out[i], out[j] = out[j], out[i]
        return out
