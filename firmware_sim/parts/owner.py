"""What the owners of devices do: Poisson processes, one for each kind of act, merged into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from edge_agent.policy import Policy
from fedge import limits
from firmware_sim import scenario
from firmware_sim.parts.hours import DAY
from firmware_sim.world.streams import Stream

ACTIONS: Final = ("unplug", "travel", "revoke", "policy")
UNPLUGGED_SECONDS: Final = 1_200.0  # median
_STRICTER: Final = (8, 16, 32)  # blocs that an owner asks for in a later mood


def actions(owner: scenario.Owner, stream: Stream, days: float) -> Iterator[tuple[float, str]]:
    """(seconds from the world's start, one of ACTIONS), in order; none follows a revocation."""
    rates = (owner.unplugs, owner.travels, owner.revokes, owner.policy_edits)
    total = sum(rates)
    now = 0.0
    while total > 0.0:
        now += stream.exponential(DAY / total)
        if now >= days * DAY:
            return
        action = stream.pick(ACTIONS, rates)
        yield now, action
        if action == "revoke":
            return


def absence_seconds(action: str, stream: Stream) -> float:
    """How long a device is off after "unplug" (minutes) or "travel" (a day and more)."""
    if action == "travel":
        return DAY + stream.exponential(DAY)
    return stream.lognormal(UNPLUGGED_SECONDS, 1.0)


def policy_of(owner: scenario.Owner) -> Policy:
    """The policy that this kind of owner starts with."""
    return Policy(hours=owner.hours, battery_min=owner.battery_min, metered=owner.allows_metered)


def edited(policy: Policy, stream: Stream) -> Policy:
    """The policy after an edit: larger blocs asked for, metered links switched, or more of the battery kept."""
    kind = stream.integer(3)
    if kind == 0:
        bloc = min(limits.BLOC_DEVICES_MAX, stream.pick(_STRICTER))
        return msgspec.structs.replace(policy, bloc_devices_min=bloc)
    if kind == 1:
        return msgspec.structs.replace(policy, metered=not policy.metered)
    return msgspec.structs.replace(policy, battery_min=round(stream.uniform(0.1, 0.6), 2))
