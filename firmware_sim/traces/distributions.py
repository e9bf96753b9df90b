"""Log-normal models and how well they fit: parameters, Kolmogorov-Smirnov distance, quantiles beside the data's.

Numbers are positive; everything is done on their logarithms. Two-component mixtures are found by expectation
maximisation (Dempster, Laird, Rubin 1977) from a fixed start, so the same data give the same fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
EM_ROUNDS: Final = 300
_SIGMA_MIN: Final = 0.05  # a component never collapses onto one value
_ROOT_TWO: Final = math.sqrt(2.0)


@dataclass(frozen=True, slots=True)
class Component:
    """One log-normal, and its share of the whole."""

    share: float
    median: float
    sigma: float

    @property
    def mean(self) -> float:
        return self.median * math.exp(self.sigma**2 / 2.0)


Model = tuple[Component, ...]


def lognormal(values: Floats) -> Model:
    """The log-normal of highest likelihood."""
    logs = np.log(values)
    return (Component(1.0, math.exp(float(logs.mean())), max(_SIGMA_MIN, float(logs.std()))),)


def mixture(values: Floats) -> Model:
    """Two log-normals, the larger share last. At least 10 values."""
    logs = np.log(values)
    share = np.array([0.5, 0.5])
    mean = np.quantile(logs, [0.25, 0.75])
    sigma = np.full(2, max(_SIGMA_MIN, float(logs.std()) / 2.0))
    for _ in range(EM_ROUNDS):
        density = share * np.exp(-0.5 * ((logs[:, None] - mean) / sigma) ** 2) / sigma
        belongs = density / np.maximum(density.sum(1, keepdims=True), 1e-300)
        count = np.maximum(belongs.sum(0), 1e-9)
        share = count / len(logs)
        mean = (belongs * logs[:, None]).sum(0) / count
        spread = (belongs * (logs[:, None] - mean) ** 2).sum(0) / count
        sigma = np.maximum(_SIGMA_MIN, np.sqrt(spread))
    found = zip(share.tolist(), mean.tolist(), sigma.tolist(), strict=True)
    return tuple(sorted((Component(w, math.exp(m), s) for w, m, s in found), key=lambda each: each.share))


def below(model: Model, value: float) -> float:
    """The share of the model below `value`."""
    return sum(
        each.share * 0.5 * (1.0 + math.erf(math.log(value / each.median) / each.sigma / _ROOT_TWO))
        for each in model
    )


def distance(model: Model, values: Floats) -> float:
    """Kolmogorov and Smirnov: the largest gap between the model's and the data's distribution functions."""
    ordered = np.sort(values)
    levels = np.array([below(model, float(value)) for value in ordered])
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.max(steps[1:] - levels), np.max(levels - steps[:-1])))


def quantile(model: Model, level: float) -> float:
    """The value with `level` of the model below it, by halving."""
    low = min(each.median * math.exp(-10.0 * each.sigma) for each in model)
    high = max(each.median * math.exp(10.0 * each.sigma) for each in model)
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if below(model, middle) < level else (low, middle)
    return math.sqrt(low * high)
