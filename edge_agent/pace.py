"""The pace before the first round: blocs are formed by it, and the first plan follows from it.

A bundle that has just come is timed (`edge_agent.gauge`, in the worker) before the machine hears that it is here, so
that the device's first READY says how fast it is. A pace that a round has measured is better, and ends all this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edge_agent.agent import Agent
from edge_agent.effects import Fetched
from edge_agent.round import Phase

PACE_MAX: Final = 1e6  # seconds; no READY may say more


@dataclass(frozen=True, slots=True)
class Pace:
    """What became of a gauge: `seconds` per step, or 0 and the reason, for the owner, why it is not known."""

    manifest: bytes
    seconds: float = 0.0
    reason: str = ""


def is_lacking(agent: Agent, here: Fetched) -> bool:
    """Whether what is here is the bundle that the machine waits for, and no round has measured the pace yet."""
    return (
        agent.phase is Phase.FETCHING
        and here.sha256 == agent.announcement.manifest.sha256
        and not agent.state.seconds_per_step
    )


def coarse(seconds: float) -> float:
    """The pace as it may be known: two significant digits."""
    return float(f"{min(max(seconds, 0.0), PACE_MAX):.2g}")
