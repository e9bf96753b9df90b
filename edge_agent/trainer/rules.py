"""A campaign's rule on the device: what of the adapter file moves in a round, and what is sent of it.

`fedge.rules` says what a file and a part are; here a part becomes a vector that `round` can train: what the graphs
are fed instead of it, and its gradient from those by A and B. A device never factorises an adapter anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.depth import lowest_layer
from edge_agent.trainer.batch import BatchArrays
from edge_agent.trainer.round import Recipe, RoundOutcome, train_round
from edge_agent.trainer.state import TrainState
from edge_agent.trainer.step import StepResult
from edge_agent.trainer.trainer import Trainer
from fedge.lora import DENSE, frozen_a, join, split
from fedge.messages import Training
from fedge.rules import Core, Rule, Shapes, Sketch, rule_of

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]
# A probe needs the gradient by A, which B = 0 does not have. So small a B moves the loss by less than it can be read
# to, and divides out exactly but for rounding.
_TINY: Final = np.float32(2.0**-13)


class LocalPart:
    """The vector that trains in one round. `shapes`: its tensors, layer by layer, and what is dense at the end."""

    shapes: Shapes
    start: Floats

    def __init__(self, rule: Rule, state: Floats) -> None:
        self.rule, self.layout = rule, rule.layout
        self.fixed: Tensors = rule.held(state)

    def moving(self, depth: int) -> slice:
        """The tail of the vector that the top `depth` layers have, 0 = all; or the head, for `HEAD_ONLY`."""
        moving = self._moving(depth)
        total = sum(map(prod, self.shapes.values()))
        return slice(total - sum(prod(self.shapes[name]) for name in moving), total)

    def feeds(self, vector: Floats) -> Mapping[str, Floats]:
        """Every B, and each A that does not follow from the campaign's seed."""
        return {**self.fixed, **split(self.shapes, vector)}

    def gradient(self, gradients: Tensors, depth: int) -> Floats:
        """By the moving part, from the gradients by A and B of the layers that train."""
        return np.concatenate([self.slope(name, gradients).reshape(-1) for name in self._moving(depth)])

    def slope(self, name: str, gradients: Tensors) -> Floats:
        """The gradient by one tensor of the vector."""
        return gradients[name]

    def sent(self, delta: Floats) -> Floats:
        """What travels, from the change of the vector."""
        return delta

    def recipe(self, recipe: Recipe) -> Recipe:
        """How the vector moves."""
        return recipe

    def rates(self, rate: float, weight_decay: float) -> tuple[float, float]:
        """Learning rate and decay, given the campaign's."""
        return rate, weight_decay

    def _moving(self, depth: int) -> list[str]:
        layers = self.layout.layers
        low = tuple(f"L{i}/" for i in range(lowest_layer(depth, layers)))
        return [name for name in self.shapes if not name.startswith(low)]


class Factors(LocalPart):
    """Some of A, B and dense themselves: `ffa`, `fedit`, `alternating`."""

    def __init__(self, rule: Rule, state: Floats, shapes: Shapes) -> None:
        super().__init__(rule, state)
        self.shapes = shapes
        self.start = join(shapes, {name: self.fixed[name] for name in shapes})


class SketchedFactors(Factors):
    """A and B train, and sketches of the change of their product travel."""

    def __init__(self, rule: Sketch, state: Floats) -> None:
        super().__init__(rule, state, rule.both)
        self._sketch = rule

    def sent(self, delta: Floats) -> Floats:
        after = {**self.fixed, **split(self.shapes, self.start + delta)}
        return self._sketch.change(self.fixed, after)


class CoreFactors(LocalPart):
    """C between U and V: B is U C, so the gradient by C is U^T times that by B."""

    def __init__(self, rule: Core, state: Floats) -> None:
        super().__init__(rule, state)
        found = rule.split(state)
        self.shapes = rule.part(1, probing=False).shapes
        self.start = join(self.shapes, {name: found[name] for name in self.shapes})
        self._u = {f"{s.name}.C": found[f"{s.name}.U"] for s in rule.layout.slots}

    def feeds(self, vector: Floats) -> Mapping[str, Floats]:
        fed = dict(self.fixed)
        for name, value in split(self.shapes, vector).items():
            if name in self._u:
                fed[f"{name.removesuffix('.C')}.B"] = self._u[name] @ value
            else:
                fed[name] = value
        return fed

    def slope(self, name: str, gradients: Tensors) -> Floats:
        if name not in self._u:
            return gradients[name]
        product: Floats = self._u[name].T @ gradients[f"{name.removesuffix('.C')}.B"]
        return product


class Probe(LocalPart):
    """The first gradient G of every matrix, as G W^T and P G: nothing moves, and the sum of the steps is sent.

    Sent at a length that fits the first codec of the campaign, the same for every device: only the spaces matter.
    """

    def __init__(self, rule: Core, state: Floats, rate: float) -> None:
        super().__init__(rule, state)
        self.shapes = rule.part(1, probing=True).shapes
        self.start = np.zeros(sum(map(prod, self.shapes.values())), np.float32)
        self._length = rate * self.start.size**0.5
        probes = {name: value for name, value in self.fixed.items() if name.startswith(DENSE)}
        for slot in rule.layout.slots:
            probes[f"{slot.name}.A"] = frozen_a(rule.a_seed, f"{slot.name}.A", slot.r, slot.n_in)
            p = frozen_a(rule.a_seed, f"{slot.name}.P", slot.r, slot.out)
            probes[f"{slot.name}.B"] = np.ascontiguousarray(p.T) * _TINY
        self.fixed = probes

    def feeds(self, vector: Floats) -> Mapping[str, Floats]:
        return self.fixed

    def slope(self, name: str, gradients: Tensors) -> Floats:
        path, letter = name[:-1], name[-1]
        return gradients[f"{path}B"] if letter == "U" else gradients[f"{path}A"] / _TINY

    def sent(self, delta: Floats) -> Floats:
        norm = float(np.linalg.norm(delta))
        return delta * np.float32(self._length / norm) if norm else delta

    def recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe, optimizer="sgd", momentum=0.0, schedule=None, clip_norm=0.0)

    def rates(self, rate: float, weight_decay: float) -> tuple[float, float]:
        return 1.0, 0.0


def local_part(rule: Rule, state: Floats, round_number: int, rate: float) -> LocalPart:
    """What trains in round `round_number` (from 1) on the adapter file `state`."""
    if isinstance(rule, Sketch):
        return SketchedFactors(rule, state)
    probing = rule.probing(state)
    if isinstance(rule, Core):
        return Probe(rule, state, rate) if probing else CoreFactors(rule, state)
    return Factors(rule, state, rule.part(round_number, probing=probing).shapes)


def campaign_rule(trainer: Trainer, training: Training, state: Floats) -> Rule:
    """The rule of the adapter file `state`. Raises UnsupportedError for an unknown one, DataError for a wrong size."""
    return rule_of(training.rule, trainer.layout, training.a_seed, numbers=state.size)


def train_by_rule(
    trainer: Trainer,
    state: Floats,
    batches: Iterable[BatchArrays],
    training: Training,
    *,
    round_number: int = 1,
    depth: int = 0,
    recipe: Recipe | None = None,
    after_step: Callable[[int, StepResult], None] | None = None,
    resume: TrainState | None = None,
    keep: Callable[[TrainState], None] | None = None,
) -> RoundOutcome:
    """A round of local training on the adapter file `state`; the outcome's delta is what travels under the rule.

    Raises what `train_round` and `campaign_rule` raise.
    """
    rule = campaign_rule(trainer, training, state)
    local = local_part(rule, state, round_number, training.rate)
    rate, decay = local.rates(training.rate, training.weight_decay)
    done = train_round(
        trainer,
        local.start,
        batches,
        a_seed=training.a_seed,
        lr=rate,
        weight_decay=decay,
        depth=depth,
        recipe=local.recipe(recipe or Recipe()),
        rule=local,
        after_step=after_step,
        resume=resume,
        keep=keep,
    )
    return replace(done, delta=local.sent(done.delta))
