"""The adapter of a device that trains alone: where it begins, what a rule makes of its steps, and how it is kept.

One device is a fleet of one, so a rule means here what it means in a campaign (`fedge.rules`): the hub's half is done
in place, and what travels is added at weight 1. The rule: going on from an adapter begins as that adapter's function,
whatever rule made it, and what is kept is the function that was evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from fedge.errors import UsageError
from fedge.lora import RULES
from fedge.messages import Training
from fedge.release import Manifest

if TYPE_CHECKING:
    from fedge.io.adapter_file import Floats
    from fedge.rules import Rule

ROUND_STEPS: Final = 5  # of a rule whose rounds differ: what a campaign takes where nobody says otherwise


@dataclass(frozen=True, slots=True)
class OwnAdapter:
    """An adapter file of the rule `training.rule`; `state` holds its numbers, `steps` how many were taken in all."""

    manifest: Manifest
    training: Training  # with the seed of the adapter that it goes on from
    state: Floats
    steps: int = 0

    @classmethod
    def of(cls, manifest: Manifest, training: Training, start: Path | None, weights: Path) -> OwnAdapter:
        """The untouched model, or the function of the adapter at `start`; `weights` is the bundle's file.

        Raises UnsupportedError for an unknown rule, and the refusals of `fedge.io.adapter_source.adapter_for`.
        """
        from fedge.io.adapter_source import adapter_for
        from fedge.rules import rule_of, started_from

        layout = manifest.layout
        rule = rule_of(training.rule, layout, training.a_seed)
        if start is None:
            return cls(manifest, training, rule.initial())
        adapter = adapter_for(start, manifest, weights)
        header = adapter.header
        if training.rule == "ffa" and header.a_seed and header.lora == manifest.lora:
            seeded = msgspec.structs.replace(training, a_seed=header.a_seed)
            return cls(manifest, seeded, adapter.vector, header.steps)
        state = started_from(training.rule, layout, training.a_seed, header.layout, adapter.tensors)
        return cls(manifest, training, state, header.steps)

    @property
    def rule(self) -> Rule:
        """The rule over these numbers."""
        from fedge.rules import rule_of

        return rule_of(
            self.training.rule, self.manifest.layout, self.training.a_seed, numbers=self.state.size
        )

    def rounds(self, steps: int) -> list[int]:
        """How many steps each round has. Most rules take all in one.

        `alternating` moves B and A by turns. `core` looks for its basis first, a fourth of the steps but no more than
        a round, and moves nothing meanwhile. Raises UsageError when that leaves none.
        """
        if self.training.rule == "alternating":
            count = min(steps, max(2, -(-steps // ROUND_STEPS)))
            return [steps // count + (index < steps % count) for index in range(count)]
        if not self.rule.probing(self.state):
            return [steps]
        if steps < 2:
            raise UsageError(
                "the rule core needs two steps: the first looks for its basis and moves nothing",
                field="steps",
                value=steps,
            )
        probe = min(ROUND_STEPS, max(1, steps // 4))
        return [probe, steps - probe]

    def after(self, number: int, delta: Path, steps: int) -> OwnAdapter:
        """The adapter after round `number` (from 1), of which the file `delta` holds what travels."""
        import numpy as np

        rule = self.rule
        part = rule.part(number, probing=rule.probing(self.state))
        total = np.frombuffer(delta.read_bytes(), "<f4").astype(np.float32)
        return replace(self, state=rule.apply(part, self.state, total, 1.0), steps=self.steps + steps)

    def keep(self, path: Path, made_by: str | None = None) -> None:
        """Write the adapter's file, which says that it was `made_by` a rule: "" = by none, None = by this one.

        Raises StorageError, DataError for a number that is not finite.
        """
        from fedge.io.adapter_file import adapter_of_state, write_adapter

        name = self.training.rule if made_by is None else made_by
        write_adapter(path, adapter_of_state(self.manifest, self.rule, name, self.state, steps=self.steps))


def numbered(rounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """(number from 1, steps before it, its steps) of each round."""
    done = 0
    for number, steps in enumerate(rounds, 1):
        yield number, done, steps
        done += steps


def rule_and_rate(
    rule: str | None, rate: float | None, start: Path | None, task: str = "generate"
) -> tuple[str, float]:
    """What was chosen; else the rule that the adapter file `start` was made by (a PEFT folder names none), else `ffa`,
    and the rate that suits rule and task.

    Raises the refusals of `fedge.io.adapter_file.read_adapter`.
    """
    from fedge.io.adapter_file import read_adapter
    from fedge.rules import usual_rate

    made_by = ""
    if rule is None and start is not None and not start.is_dir():
        made_by = read_adapter(start).header.rule
    chosen = rule or (made_by if made_by in RULES else RULES[0])
    return chosen, usual_rate(chosen, task) if rate is None else rate
