"""Who, when, how much: a pure function of public facts, in its first honest form.

Blocs are formed once per campaign, by presence (how long a device expects to stay) and speed class, ties broken by a
public beacon, and never again: a second partition would let the hub tell devices apart (law 1). A bloc is opened when
all of its members are READY, whichever other blocs are running: each has its own timeline. No device's loss,
gradient or exact count is ever looked at.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

from fedge.messages import Ready

WORK_SECONDS: Final = 120.0  # target time of a member's local training: small and short beats large and slow
WORK_FLOOR: Final = 0.15  # of the planned steps, so that no slow board is idled out of the sum
_STAY_BUCKETS: Final = (600, 3_600, 4 * 3_600)
_SPEED_BUCKETS: Final = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def form_blocs(ready: Mapping[str, Ready], devices: int, beacon: bytes) -> list[tuple[str, ...]]:
    """Cuts the devices that are present into blocs of exactly `devices`; a tail that fills none waits.

    Deterministic given the READYs and the beacon, so that anyone can check it.
    """

    def key(device: str) -> tuple[int, int, bytes]:
        facts = ready[device]
        return (
            -_bucket(facts.stay_seconds, _STAY_BUCKETS),
            _bucket(facts.facts.seconds_per_step, _SPEED_BUCKETS),
            hashlib.sha256(beacon + device.encode()).digest(),
        )

    order = sorted(ready, key=key)
    whole = len(order) // devices * devices
    return [tuple(order[start : start + devices]) for start in range(0, whole, devices)]


def plan_steps(ready: Ready, steps: int) -> int:
    """A member's local steps: all of them, or as many as fit the target time, never less than the floor."""
    pace = ready.facts.seconds_per_step
    if pace <= 0:
        return steps
    least = max(1, math.ceil(WORK_FLOOR * steps))
    return max(least, int(min(steps, WORK_SECONDS / pace)))  # a tiny pace divides to infinity


def balance(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Cuts plans down until nobody has more than 2/k of the work: what every device demands of an OPEN."""
    plan = list(steps)
    while max(plan) * len(plan) > 2 * sum(plan):
        plan[plan.index(max(plan))] -= 1
    return tuple(plan)


def _bucket(value: float, edges: tuple[float, ...]) -> int:
    return sum(value >= edge for edge in edges)
