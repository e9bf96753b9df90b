"""From logits to the next token: penalties, temperature, top-k, top-p, in transformers' order, from one seed.

Greedy unless a temperature is given. Ids that stand for no text are never chosen. The same logits and seed give the
same token on every machine: probabilities are computed in double precision, ties go to the lowest id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedge.errors import UsageError

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen. Raises UsageError for a value that means nothing.

    `temperature` 0 is greedy. `top_k` 0 is all; `top_p` keeps the most likely tokens that together reach it (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751). `repetition_penalty` divides the logits of tokens that were
    read or written, multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858); 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, "from 0 to 100", 0 <= self.temperature <= 100)
        _require("top-k", self.top_k, "0 or more", self.top_k >= 0)
        _require("top-p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1)
        _require(
            "repetition-penalty",
            self.repetition_penalty,
            "above 0, to 100",
            0 < self.repetition_penalty <= 100,
        )
        _require("seed", self.seed, "0 or more", self.seed >= 0)


class Sampler:
    """Chooses tokens one after the other. `silent` (V,) is True for ids that stand for no text."""

    def __init__(self, sampling: Sampling, silent: NDArray[np.bool_], seen: Iterable[int] = ()) -> None:
        self._sampling, self._silent = sampling, np.flatnonzero(silent)
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(seen)

    def choose(self, logits: Floats) -> int:
        """The next token after `logits` (V,); it counts as seen from now on."""
        scores = logits.copy()
        scores[self._silent] = -np.inf
        self._penalise(scores)
        token = self._draw(scores) if self._sampling.temperature > 0 else int(scores.argmax())
        self._seen.add(token)
        return token

    def _penalise(self, scores: Floats) -> None:
        penalty = self._sampling.repetition_penalty
        if penalty != 1 and self._seen:
            at = np.fromiter(self._seen, np.int64)
            scores[at] = np.where(scores[at] > 0, scores[at] / penalty, scores[at] * penalty)

    def _draw(self, scores: Floats) -> int:
        # Stable, so that ties are in the order of ids; a partial sort suffices where top-k says so.
        kept = _largest(scores, self._sampling.top_k or scores.size)
        found = scores[kept].astype(np.float64)
        p = np.exp((found - found[0]) / self._sampling.temperature)
        p /= p.sum()
        mass = np.cumsum(p)
        count = int(np.searchsorted(mass, self._sampling.top_p)) + 1  # the first always stays
        p = p[:count] / p[:count].sum()
        place = int(np.searchsorted(np.cumsum(p), self._random.random(), side="right"))
        return int(kept[min(place, len(p) - 1)])


def _largest(scores: Floats, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest finite scores, largest first, ties by id."""
    candidates = np.flatnonzero(np.isfinite(scores))
    if count < candidates.size:
        values = scores[candidates]
        edge = np.partition(values, values.size - count)[values.size - count]
        candidates = candidates[values >= edge]
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order][:count]


def _require(field: str, value: float, allowed: str, fits: bool) -> None:
    if not fits:  # a NaN fits nothing
        raise UsageError(f"{field} must be {allowed}", field=field, value=value)
