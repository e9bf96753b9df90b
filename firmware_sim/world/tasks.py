"""Two things that a fleet can learn without ONNX Runtime, whose loss means something.

`bowl`: a convex quadratic of 64 numbers with another optimum on every device, in microseconds and without memory for
a device: 100,000 of them fit. `mlp`: ten classes in 24 dimensions, unlike from device to device, two of them at home
on slow boards; a scheduler that leaves slow boards out is found out by them. Both are functions of (seed, device).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedge.errors import ConfigError
from firmware_sim.parts.draw import DeviceParts
from firmware_sim.world.streams import Stream
from firmware_sim.world.task import Learned, Task, Vector

Which = Callable[[int], bool]
Count = Callable[[int], int]
Ints = NDArray[np.int64]
_LITTLE: Final = np.dtype("<f4")

SLOW_BOARDS: Final = frozenset({"zero2w", "pi3", "pi4"})  # where the rare classes live
SLOW_SHARE: Final = 0.45  # of devices, when nobody says which boards they have
SAMPLES: Final = (4.3, 0.7)  # log-normal, as a scenario's group has it
SAMPLES_RANGE: Final = (20, 600)
BATCH: Final = 16
STEP_TOKENS: Final = BATCH * 64  # a batch of 16 rows of 64 tokens on the board


def make_task(
    name: Literal["bowl", "mlp"],
    devices: int,
    seed: int,
    *,
    slow: Which | None = None,
    samples: Count | None = None,
) -> Task:
    """The task `name` over device numbers 0 … devices - 1.

    `slow` says which devices have a slow board, `samples` how many samples each has; drawn from the seed when left
    out. ConfigError for a name that is not known.
    """
    tasks: dict[str, type[Bowl] | type[Mlp]] = {"bowl": Bowl, "mlp": Mlp}
    if name not in tasks:
        raise ConfigError("no such task", field="task", value=name, hint=f"One of {', '.join(tasks)}.")
    return tasks[name](devices, seed, slow=slow, samples=samples)


def fleet_task(name: Literal["bowl", "mlp"], fleet: Sequence[DeviceParts], seed: int) -> Task:
    """The task `name` for a drawn fleet: its boards say who is slow, its draws how many samples each device has."""
    return make_task(
        name,
        len(fleet),
        seed,
        slow=lambda number: fleet[number].board.name in SLOW_BOARDS,
        samples=lambda number: fleet[number].samples,
    )


def drawn_samples(seed: int, number: int, law: tuple[float, float] = SAMPLES) -> int:
    """A device's sample count: log-normal with mean and sigma `law` of its logarithm, within SAMPLES_RANGE."""
    low, high = SAMPLES_RANGE
    return int(min(max(Stream(seed, number, "samples").lognormal(math.exp(law[0]), law[1]), low), high))


def _slow_by_share(seed: int) -> Which:
    return lambda number: Stream(seed, number, "slow").chance(SLOW_SHARE)


def _samples_by_law(seed: int) -> Count:
    return lambda number: drawn_samples(seed, number)


# ---------------------------------------------------------------- bowl
_ROWS: Final = 1_024  # of the shared table; two of them make a device's optimum: half a million optima
_NOISE: Final = 0.5  # of a gradient, relative to one curvature and one unit of distance


class Bowl:
    """Loss of device n: half the distance to its optimum c_n, squared and weighed by fixed curvatures.

    Local SGD on a quadratic has a closed form: after s steps the distance to c_n is (1 - rate * curvature)^s of what
    it was, plus Gaussian noise. The public loss is that of the fleet's common optimum: 1 at first, 0 at best.
    """

    name = "bowl"
    numbers = 64
    layers = 4
    step_tokens = STEP_TOKENS
    rate = 0.05

    def __init__(
        self, devices: int, seed: int, *, slow: Which | None = None, samples: Count | None = None
    ) -> None:
        self._seed = seed
        self._samples = samples or _samples_by_law(seed)
        random = np.random.default_rng(Stream(seed, "bowl").word())
        self._curvature = np.geomspace(0.1, 1.0, self.numbers).astype(np.float32)
        table = random.standard_normal((_ROWS, self.numbers)).astype(np.float32)
        table -= table.mean(axis=0)  # so that the fleet's optimum is `common`
        self._table = table
        common = random.standard_normal(self.numbers).astype(np.float32)
        self._common = common / np.sqrt(np.float32(self._height(common)))
        self._spread = np.float32(1 / math.sqrt(self._height(np.ones(self.numbers, np.float32))))
        self._moves: dict[int, tuple[Vector, Vector]] = {}
        self._optimum = lru_cache(_CACHED_DEVICES_MAX)(self._made_optimum)

    def first(self) -> bytes:
        return bytes(self.numbers * _LITTLE.itemsize)

    def samples(self, number: int) -> int:
        return self._samples(number)

    def train(self, number: int, adapter: bytes, steps: int, seed: int, depth: int) -> Learned:
        away = self._optimum(number) - np.frombuffer(adapter, _LITTLE)
        covered, noise = self._move(steps)
        delta = covered * away + noise * self._table[Stream(self._seed, number, seed).integer(_ROWS)]
        if depth:
            delta[: max(0, self.layers - depth) * self.numbers // self.layers] = 0
        labels = steps * BATCH
        return Learned(delta, self._height(away) * labels, labels)

    def evaluate(self, adapter: bytes) -> dict[str, float]:
        return {"loss": self._height(self._common - np.frombuffer(adapter, _LITTLE))}

    def losses(self, number: int, adapter: bytes) -> Vector:
        """As Mlp.losses; a bowl has one loss for all of a device's samples."""
        height = self._height(self._optimum(number) - np.frombuffer(adapter, _LITTLE))
        return np.array([height], np.float32)

    def _made_optimum(self, number: int) -> Vector:
        word = Stream(self._seed, number, "bowl").word()
        pair = self._table[word % _ROWS] + self._table[(word >> 32) % _ROWS]
        optimum: Vector = self._common + self._spread * pair
        return optimum

    def _height(self, away: Vector) -> float:
        return 0.5 * float(np.dot(self._curvature * away, away))

    def _move(self, steps: int) -> tuple[Vector, Vector]:
        """Share of the way that `steps` steps cover, and the noise that they gather, for each number."""
        if (known := self._moves.get(steps)) is None:
            keep = 1 - self.rate * self._curvature
            gathered = (1 - keep ** (2 * steps)) / (1 - keep * keep)
            noise = self.rate * _NOISE * self._curvature * np.sqrt(gathered)
            known = self._moves[steps] = (1 - keep**steps, noise)
        return known


# ---------------------------------------------------------------- mlp
CLASSES: Final = 10
INPUTS: Final = 24
HIDDEN: Final = 32
RARE: Final = (8, 9)
TESTS: Final = 4_000
_SKEW: Final = 0.3  # Dirichlet: the smaller, the fewer classes a device has
_RARE_SLOW: Final = 1.2
_RARE_FAST: Final = 0.02
GEOMETRY: Final = 9  # of the classes, the same for every seed: a loss means the same in every run
_CACHED_DEVICES_MAX: Final = 2_048  # about 20 MB of samples
_SHAPES: Final = ((INPUTS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,))
_ENDS: Final = tuple(np.cumsum([math.prod(shape) for shape in _SHAPES]).tolist())


class Mlp:
    """A layer of 32 rectified units on a mixture of ten Gaussians; plain SGD, batches of 16."""

    name = "mlp"
    numbers = _ENDS[-1]
    layers = 2
    step_tokens = STEP_TOKENS
    rate = 0.08

    def __init__(
        self, devices: int, seed: int, *, slow: Which | None = None, samples: Count | None = None
    ) -> None:
        self._seed = seed
        self._slow = slow or _slow_by_share(seed)
        self._samples = samples or _samples_by_law(seed)
        random = np.random.default_rng(GEOMETRY)
        self._centres = random.normal(0, 1.05, (CLASSES, INPUTS))
        self._shears = random.normal(0, 0.28, (CLASSES, INPUTS, INPUTS))
        self._test_labels = random.integers(0, CLASSES, TESTS)
        self._test_inputs = self._drawn(self._test_labels, random)
        scales = (INPUTS**-0.5, 0.0, HIDDEN**-0.5, 0.0)
        parts = [random.normal(0, 1, shape) * scale for shape, scale in zip(_SHAPES, scales, strict=True)]
        self._first = np.concatenate([part.reshape(-1) for part in parts]).astype(_LITTLE).tobytes()
        self._cached: OrderedDict[int, tuple[Vector, Ints]] = OrderedDict()

    def first(self) -> bytes:
        return self._first

    def samples(self, number: int) -> int:
        return self._samples(number)

    def train(self, number: int, adapter: bytes, steps: int, seed: int, depth: int) -> Learned:
        inputs, labels = self.data(number)
        vector = np.frombuffer(adapter, _LITTLE).copy()
        chosen = np.random.default_rng((self._seed, number, seed)).integers(0, len(labels), (steps, BATCH))
        loss_sum = 0.0
        weights = _split(vector)
        for rows in chosen:
            loss_sum += _descend(weights, inputs[rows], labels[rows], self.rate, whole=depth != 1)
        return Learned(vector - np.frombuffer(adapter, _LITTLE), loss_sum, steps * BATCH)

    def evaluate(self, adapter: bytes) -> dict[str, float]:
        _, shares = _forward(_split(np.frombuffer(adapter, _LITTLE)), self._test_inputs)
        right = shares.argmax(axis=1) == self._test_labels
        return {
            "loss": float(_nats(shares, self._test_labels).mean()),
            "accuracy": float(right.mean()),
            "rare_accuracy": float(right[np.isin(self._test_labels, RARE)].mean()),
        }

    def losses(self, number: int, adapter: bytes) -> Vector:
        """The loss of each of a device's samples: what lawless schedulers ask for, and ours never sees."""
        inputs, labels = self.data(number)
        return _nats(_forward(_split(np.frombuffer(adapter, _LITTLE)), inputs)[1], labels)

    def data(self, number: int) -> tuple[Vector, Ints]:
        """A device's inputs [n, 24] and labels [n], made when first wanted and kept while there is room."""
        if (known := self._cached.get(number)) is None:
            known = self._cached[number] = self._made(number)
            if len(self._cached) > _CACHED_DEVICES_MAX:
                self._cached.popitem(last=False)
        self._cached.move_to_end(number)
        return known

    def _made(self, number: int) -> tuple[Vector, Ints]:
        random = np.random.default_rng(Stream(self._seed, number, "data").word())
        skew = np.full(CLASSES, _SKEW)
        skew[list(RARE)] = _RARE_SLOW if self._slow(number) else _RARE_FAST
        labels = random.choice(CLASSES, self._samples(number), p=random.dirichlet(skew))
        return self._drawn(labels, random), labels

    def _drawn(self, labels: Ints, random: np.random.Generator) -> Vector:
        shape = (len(labels), INPUTS)
        within = random.normal(0, 1, shape)
        inputs = self._centres[labels] + random.normal(0, 1, shape)
        for label in range(CLASSES):
            rows = labels == label
            inputs[rows] += within[rows] @ self._shears[label].T
        return inputs.astype(np.float32)


def _split(vector: Vector) -> list[Vector]:
    """Views of the two layers' weights and biases."""
    return [part.reshape(shape) for part, shape in zip(np.split(vector, _ENDS[:-1]), _SHAPES, strict=True)]


def _forward(weights: list[Vector], inputs: Vector) -> tuple[Vector, Vector]:
    """Hidden units, and the classes' shares."""
    hidden = np.maximum(inputs @ weights[0] + weights[1], 0)
    scores = hidden @ weights[2] + weights[3]
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return hidden, scores


def _nats(shares: Vector, labels: Ints) -> Vector:
    losses: Vector = -np.log(shares[np.arange(len(labels)), labels] + np.float32(1e-9))
    return losses


def _descend(weights: list[Vector], inputs: Vector, labels: Ints, rate: float, *, whole: bool) -> float:
    """One step in place; `whole`: both layers, else the upper one alone. Returns the batch's loss sum."""
    hidden, shares = _forward(weights, inputs)
    loss = float(_nats(shares, labels).sum())
    shares[np.arange(len(labels)), labels] -= 1
    shares *= np.float32(rate / len(labels))
    below = shares @ weights[2].T
    weights[2] -= hidden.T @ shares
    weights[3] -= shares.sum(axis=0)
    if whole:
        below *= hidden > 0
        weights[0] -= inputs.T @ below
        weights[1] -= below.sum(axis=0)
    return loss
