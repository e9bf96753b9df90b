"""Federated rules for LoRA: what an adapter file holds, what a device sends of it, what the hub makes of the sum.

Averaging A and B apart is not the average of B A: it misses the covariance of the two over the devices. Each rule but
`fedit` avoids that, and each is linear in what travels, because the hub only ever sees sums:

  ffa          A is frozen, B travels. (Sun et al. 2024, arXiv 2403.12313.) The mean of B is the mean of the updates.
  fedit        A and B travel and are averaged apart: the baseline that is usual elsewhere (Zhang et al. 2024,
               arXiv 2305.05644).
  alternating  B travels in odd rounds of a bloc, A in even ones, while the other is frozen (RoLoRA, Chen et al. 2024,
               arXiv 2409.02346). Exact.
  core         only C of U C V travels, r x r; U and V are public and frozen (Fed-SB, Singhal et al. 2025, arXiv
               2502.15436). They come from the first opened sum, of the devices' first gradients in a double sketch.
  sketch       A and B of any rank are trained; two sketches of the change of B A travel, D W and P D with public random
               W and P, from which the hub restores the mean change to rank r (Tropp et al. 2017, arXiv 1609.00048,
               section 4; FedASK, arXiv 2507.09990, in one pass).

An adapter *file* holds all that its model needs, so that one hash pins it; a *part* is what moves in a round and the
shape in which it travels. No device ever factorises an adapter anew; only the hub does, in public.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError, UnsupportedError
from fedge.lora import RULES, AdapterLayout, Slot, frozen_a, join, split
from fedge.messages import Training

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]
Shapes = dict[str, tuple[int, ...]]
RATES: Final = {"ffa": 0.016, "fedit": 0.008, "alternating": 0.008, "core": 0.016, "sketch": 0.008}
_PAIRS_RATE: Final = 1 / 8  # of that, for vectors: MiniLM's are good already, and are led astray by more
_PAIRS_ROWS: Final = 16  # every other pair of a batch is a negative, so that few teach little
# Columns of a sketch beyond the rank; the second sketch is twice as wide (Tropp, 4.6).
_OVERSAMPLED: Final = 4


def usual_rate(rule: str, task: str) -> float:
    """The learning rate where nobody names one, of a known rule and a task of `fedge.release.TASKS`."""
    return RATES[rule] * (_PAIRS_RATE if task == "embed" else 1)


def usual_rows(task: str) -> int:
    """Examples in a step where nobody says how many."""
    return _PAIRS_ROWS if task == "embed" else Training().batch_rows


def least_rows(task: str) -> int:
    """Examples that a step cannot do without: a pair by itself has nothing to be told from."""
    return 2 if task == "embed" else 1


@dataclass(frozen=True, slots=True)
class Part:
    """What travels in a round: tensors by name, in the order of the vector."""

    name: str
    shapes: Shapes

    @property
    def numbers(self) -> int:
        """How many numbers a device sends."""
        return sum(map(prod, self.shapes.values()))


class Rule(ABC):
    """One rule over one layout. `shapes`: the tensors of an adapter file, in its order."""

    shapes: Shapes

    def __init__(self, layout: AdapterLayout, a_seed: bytes) -> None:
        self.layout, self.a_seed = layout, a_seed

    @property
    def numbers(self) -> int:
        """How many numbers an adapter file has."""
        return sum(map(prod, self.shapes.values()))

    @property
    def own_a(self) -> Shapes:
        """A of every slot, for files that hold it."""
        return dict(self.layout.a_shapes)

    @property
    def dense(self) -> Shapes:
        """What is trained in full."""
        return self.layout.dense_shapes

    def split(self, state: Floats) -> dict[str, Floats]:
        """The tensors of an adapter file, as views. Raises DataError for another length."""
        return split(self.shapes, state)

    @abstractmethod
    def initial(self) -> Floats:
        """The adapter file that changes nothing in the model."""

    @abstractmethod
    def from_factors(self, tensors: Tensors) -> Floats:
        """The adapter file of the same function as these A, B and dense changes, up to rounding."""

    @abstractmethod
    def part(self, round_number: int, *, probing: bool) -> Part:
        """What travels in round `round_number` (from 1) of a bloc; `probing`: its adapter has no basis yet."""

    def probing(self, state: Floats) -> bool:
        """Whether the next sum makes the basis."""
        return False

    @abstractmethod
    def tensors(self, state: Floats) -> dict[str, Floats]:
        """Every A, B and dense change of an adapter file: what the graphs are fed, and what is exported."""

    def held(self, state: Floats) -> dict[str, Floats]:
        """The same without an A that follows from the seed."""
        return self.tensors(state)

    def apply(self, part: Part, state: Floats, total: Floats, times: float) -> Floats:
        """The adapter file after an opened sum `total` of `part`, multiplied by `times`. `state` is left as it is."""
        found = self.split(state.copy())
        for name, change in split(part.shapes, total).items():
            found[name] += change * np.float32(times)
        return join(self.shapes, found)


class Ffa(Rule):
    """A from the seed, or, in a campaign that started from an adapter, A in the file."""

    def __init__(self, layout: AdapterLayout, a_seed: bytes, *, has_a: bool = False) -> None:
        super().__init__(layout, a_seed)
        self.shapes = {**layout.shapes, **(self.own_a if has_a else {})}

    def initial(self) -> Floats:
        if self.numbers == self.layout.numbers:
            return np.zeros(self.numbers, np.float32)
        return join(self.shapes, {**_zeros(self.layout.shapes), **self.layout.frozen(self.a_seed)})

    def from_factors(self, tensors: Tensors) -> Floats:
        """A gets orthonormal rows, as the rate of this rule supposes, and B what A loses by it."""
        return join(self.shapes, {**_dense_of(tensors), **_orthonormal(self.layout, tensors)})

    def part(self, round_number: int, *, probing: bool) -> Part:
        return Part("b", dict(self.layout.shapes))

    def tensors(self, state: Floats) -> dict[str, Floats]:
        found = self.split(state)
        return found if self.numbers > self.layout.numbers else {**self.layout.frozen(self.a_seed), **found}

    def held(self, state: Floats) -> dict[str, Floats]:
        return self.split(state)


class BothFactors(Rule):
    """A file of B, dense and A: what `fedit`, `alternating` and `sketch` share."""

    def __init__(self, layout: AdapterLayout, a_seed: bytes) -> None:
        super().__init__(layout, a_seed)
        self.shapes = {**layout.shapes, **self.own_a}

    def initial(self) -> Floats:
        return join(self.shapes, {**_zeros(self.layout.shapes), **self.layout.frozen(self.a_seed)})

    def from_factors(self, tensors: Tensors) -> Floats:
        return join(self.shapes, tensors)

    def tensors(self, state: Floats) -> dict[str, Floats]:
        return self.split(state)

    @property
    def both(self) -> Shapes:
        """A and B layer by layer, and the dense part last: the top layers and it are the tail of the vector."""
        found: Shapes = {}
        for slot in self.layout.slots:
            found[f"{slot.name}.B"], found[f"{slot.name}.A"] = (slot.out, slot.r), (slot.r, slot.n_in)
        return {**found, **self.dense}


class Fedit(BothFactors):
    """The mean of A and the mean of B."""

    def part(self, round_number: int, *, probing: bool) -> Part:
        return Part("both", self.both)


class Alternating(BothFactors):
    """B first: at B = 0 there is no gradient by A."""

    def part(self, round_number: int, *, probing: bool) -> Part:
        return Part("b", dict(self.layout.shapes)) if round_number % 2 else Part("a", self.own_a)


class Core(Rule):
    """U C V, with orthonormal columns of U (out, r) and rows of V (r, in); U = 0 while there is no basis."""

    def __init__(self, layout: AdapterLayout, a_seed: bytes) -> None:
        super().__init__(layout, a_seed)
        self._cores: Shapes = {f"{slot.name}.C": (slot.r, slot.r) for slot in layout.slots}
        self._basis: Shapes = {}
        for slot in layout.slots:
            self._basis[f"{slot.name}.U"] = (slot.out, slot.r)
            self._basis[f"{slot.name}.V"] = (slot.r, slot.n_in)
        self.shapes = {**self._cores, **self.dense, **self._basis}

    def initial(self) -> Floats:
        return np.zeros(self.numbers, np.float32)

    def from_factors(self, tensors: Tensors) -> Floats:
        """B A = Q_B (R_B R_A^T) Q_A^T: the factors' own spaces become the basis, and nothing is probed."""
        found = _dense_of(tensors)
        for slot in self.layout.slots:
            u, r_b = np.linalg.qr(_wide(tensors[f"{slot.name}.B"]))
            v, r_a = np.linalg.qr(_wide(tensors[f"{slot.name}.A"]).T)
            for letter, value in (("U", u), ("V", v.T), ("C", r_b @ r_a.T)):
                found[f"{slot.name}.{letter}"] = value.astype(np.float32)
        return join(self.shapes, found)

    def part(self, round_number: int, *, probing: bool) -> Part:
        return Part("probe", self._basis) if probing else Part("core", {**self._cores, **self.dense})

    def probing(self, state: Floats) -> bool:
        return not any(self.split(state)[f"{slot.name}.U"].any() for slot in self.layout.slots)

    def tensors(self, state: Floats) -> dict[str, Floats]:
        """B = U C, A = V."""
        found = self.split(state)
        made = _dense_of(found)
        for slot in self.layout.slots:
            made[f"{slot.name}.A"] = found[f"{slot.name}.V"]
            made[f"{slot.name}.B"] = found[f"{slot.name}.U"] @ found[f"{slot.name}.C"]
        return made

    def apply(self, part: Part, state: Floats, total: Floats, times: float) -> Floats:
        """The first sum makes the basis. What probed beside it came too late, and changes nothing."""
        if part.name != "probe":
            return super().apply(part, state, total, times)
        if not self.probing(state):
            return state
        found, sketches = self.split(state.copy()), split(part.shapes, total)
        for slot in self.layout.slots:
            u, _ = np.linalg.qr(_wide(sketches[f"{slot.name}.U"]))
            v, _ = np.linalg.qr(_wide(sketches[f"{slot.name}.V"]).T)
            found[f"{slot.name}.U"], found[f"{slot.name}.V"] = u.astype(np.float32), v.T.astype(np.float32)
        return join(self.shapes, found)


class Sketch(BothFactors):
    """`.Y` (out, k) = D W^T and `.Z` (l, in) = P D of a change D; W (k, in), P (l, out) have orthonormal rows."""

    def part(self, round_number: int, *, probing: bool) -> Part:
        shapes: Shapes = {}
        for slot in self.layout.slots:
            k, width = sketch_sizes(slot)
            shapes[f"{slot.name}.Y"], shapes[f"{slot.name}.Z"] = (slot.out, k), (width, slot.n_in)
        return Part("sketch", {**shapes, **self.dense})

    def change(self, before: Tensors, after: Tensors) -> Floats:
        """What a device sends: sketches of B' A' - B A, and the dense change. The two may differ in rank."""
        part = self.part(1, probing=False)
        made = {name: after[name] - before[name] for name in self.dense}
        for slot in self.layout.slots:
            w, p = self._probes(slot)
            ends = [(_wide(t[f"{slot.name}.B"]), _wide(t[f"{slot.name}.A"])) for t in (before, after)]
            (b, a), (b2, a2) = ends
            made[f"{slot.name}.Y"] = (b2 @ (a2 @ w.T) - b @ (a @ w.T)).astype(np.float32)
            made[f"{slot.name}.Z"] = ((p @ b2) @ a2 - (p @ b) @ a).astype(np.float32)
        return join(part.shapes, made)

    def apply(self, part: Part, state: Floats, total: Floats, times: float) -> Floats:
        """The sketches of the whole B A, old and change, give back its best rank: it is nearly of rank r."""
        found, change = self.split(state.copy()), split(part.shapes, total)
        for name in self.dense:
            found[name] += change[name] * np.float32(times)
        for slot in self.layout.slots:
            w, p = self._probes(slot)
            b, a = _wide(found[f"{slot.name}.B"]), _wide(found[f"{slot.name}.A"])
            y = b @ (a @ w.T) + times * change[f"{slot.name}.Y"]
            z = (p @ b) @ a + times * change[f"{slot.name}.Z"]
            new_b, new_a = restored(y, z, p, slot.r)
            found[f"{slot.name}.B"], found[f"{slot.name}.A"] = new_b, new_a
        return join(self.shapes, found)

    def _probes(self, slot: Slot) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        k, width = sketch_sizes(slot)
        w = frozen_a(self.a_seed, f"{slot.name}.W", k, slot.n_in)
        return _wide(w), _wide(frozen_a(self.a_seed, f"{slot.name}.P", width, slot.out))


def sketch_sizes(slot: Slot) -> tuple[int, int]:
    """(k, l): columns of the first sketch and rows of the second."""
    k = min(slot.r + _OVERSAMPLED, slot.n_in, slot.out)
    return k, min(2 * k, slot.out)


def restored(
    y: NDArray[np.float64], z: NDArray[np.float64], p: NDArray[np.float64], r: int
) -> tuple[Floats, Floats]:
    """(B, A) of rank r from `y` = D W^T (out, k) and `z` = P D (l, in); A has orthonormal rows."""
    q, _ = np.linalg.qr(y)
    core, *_ = np.linalg.lstsq(p @ q, z, rcond=None)
    u, s, v = np.linalg.svd(core, full_matrices=False)
    return ((q @ u[:, :r]) * s[:r]).astype(np.float32), v[:r].astype(np.float32)


def rule_of(name: str, layout: AdapterLayout, a_seed: bytes, *, numbers: int = 0) -> Rule:
    """The rule called `name`, for an adapter file of `numbers` numbers; 0 = one as it begins.

    Raises UnsupportedError for an unknown name, DataError for a file of another size.
    """
    if name not in RULES:
        raise UnsupportedError(
            "rule is not known here", field="rule", value=name, hint=f"One of {', '.join(RULES)}"
        )
    rule = _make(name, layout, a_seed, has_a=numbers > layout.numbers)
    if numbers not in (0, rule.numbers):
        raise DataError("adapter vector has another length than its layout", field="numbers", value=numbers)
    return rule


def _make(name: str, layout: AdapterLayout, a_seed: bytes, *, has_a: bool) -> Rule:
    if name == "ffa":
        return Ffa(layout, a_seed, has_a=has_a)
    kinds: dict[str, Callable[[AdapterLayout, bytes], Rule]] = {
        "fedit": Fedit,
        "alternating": Alternating,
        "core": Core,
        "sketch": Sketch,
    }
    return kinds[name](layout, a_seed)


def started_from(
    rule: str, layout: AdapterLayout, a_seed: bytes, theirs: AdapterLayout, tensors: Tensors
) -> Floats:
    """The first adapter file of a campaign that starts from an adapter of the layout `theirs`.

    B and A keep their product: a smaller rank is filled up with B = 0, and B bears the change of scale. Raises
    UnsupportedError naming a matrix that the bundle does not adapt, or adapts at a lower rank.
    """
    known = {slot.name: slot for slot in layout.slots}
    filled: dict[str, Floats] = {**_zeros(layout.shapes), **layout.frozen(a_seed)}
    for slot in theirs.slots:
        own = known.get(slot.name)
        if own is None or own.r < slot.r:
            raise UnsupportedError(
                "the bundle has no room for this part of the adapter",
                field=slot.name,
                value=f"rank {slot.r}",
                hint="Make a bundle with these targets and this rank: fedge quantize --help",
            )
        filled[f"{slot.name}.B"][:, : slot.r] = tensors[f"{slot.name}.B"] * np.float32(slot.scale / own.scale)
        filled[f"{slot.name}.A"][: slot.r] = tensors[f"{slot.name}.A"]
    filled.update({name: tensors[name] for name in theirs.dense_shapes})
    return _make(rule, layout, a_seed, has_a=True).from_factors(filled)


def _orthonormal(layout: AdapterLayout, tensors: Tensors) -> dict[str, Floats]:
    """B and A of the same product, A with orthonormal rows: A^T = Q R, so B A = (B R^T) Q^T."""
    found = {}
    for slot in layout.slots:
        q, r = np.linalg.qr(_wide(tensors[f"{slot.name}.A"]).T)
        found[f"{slot.name}.A"] = q.T.astype(np.float32)
        found[f"{slot.name}.B"] = (_wide(tensors[f"{slot.name}.B"]) @ r.T).astype(np.float32)
    return found


def _wide(tensor: Floats) -> NDArray[np.float64]:
    return tensor.astype(np.float64)


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _dense_of(tensors: Tensors) -> dict[str, Floats]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("dense/")}
