"""Low-rank factors as such: what an adapter does to each matrix, whatever file it came from.

A change of a weight is scale * B A, and is never multiplied out here: its Frobenius norm, its largest singular value
and the angle between two such changes follow from r x r products. Keys are `L{layer}/{module path}`, the same for
all kinds of files, so that adapters of different origin can be laid beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Where a model keeps its blocks: `model.layers.3.`, `transformer.h.3.`, `encoder.layer.3.`, `blk.3.` …
_IN_A_BLOCK: Final = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class Factors:
    """One change of a weight: `path` from the model's root as the file has it, A (r, in), B (out, r), its scale."""

    path: str
    a: Floats
    b: Floats
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(np.sqrt(max(inner(self, self), 0.0)))

    @property
    def largest(self) -> float:
        """Largest singular value of the change: how much it can stretch an input."""
        triangle = np.linalg.qr(self.b.astype(np.float64), mode="r")
        return abs(self.scale) * float(np.linalg.norm(triangle @ self.a.astype(np.float64), 2))

    def dense(self) -> Floats:
        """The change itself, (out, in)."""
        product: Floats = (np.float32(self.scale) * (self.b @ self.a)).astype(np.float32)
        return product


@dataclass(frozen=True, slots=True)
class Opened:
    """An adapter that was opened: what it says of itself, its factors by key, what is trained in full, and notices.

    `dense_adds`: the dense tensors are changes of the base's, not what stands in their place.
    """

    kind: str  # "fedge", "peft" or "gguf"
    about: Mapping[str, object]
    factors: Mapping[str, Factors]
    dense: Mapping[str, Floats]
    bytes: int
    notices: tuple[str, ...] = ()
    dense_adds: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one module, from the first adapter to the second. `cosine` is None when one of the changes is zero."""

    key: str
    relative: float  # norm of the difference / norm of the first; infinite when the first is zero
    cosine: float | None


def key_of(path: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `L3/self_attn.q_proj`; what lies in no block keeps its path."""
    found = _IN_A_BLOCK.search(path)
    return f"L{found[1]}/{found[2]}" if found else path


def inner(one: Factors, other: Factors) -> float:
    """Frobenius inner product of the two changes, which must be of one shape."""
    left = one.b.astype(np.float64).T @ other.b.astype(np.float64)
    right = one.a.astype(np.float64) @ other.a.astype(np.float64).T
    return one.scale * other.scale * float((left * right).sum())


def difference(key: str, one: Factors, other: Factors) -> Difference:
    """How the change of a module differs between two adapters."""
    product = inner(one, other)
    squares = inner(one, one), inner(other, other)
    apart = float(np.sqrt(max(squares[0] + squares[1] - 2 * product, 0.0)))
    size = float(np.sqrt(squares[0]))
    relative = apart / size if size else (float("inf") if apart else 0.0)
    cosine = product / float(np.sqrt(squares[0] * squares[1])) if all(squares) else None
    return Difference(key, relative, cosine)
