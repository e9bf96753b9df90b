"""The fleet on which schedulers are compared, and how two runs are compared: 600 devices of five boards, twelve hours.

Boards, shares and the rule that two fifths live on a battery are those of the study from which the scheduler's rules
come. Batteries are sized so that idling takes one to three per cent an hour, as a phone's does: a board on a phone's
battery would be empty by noon, and presence would then be about nothing but charge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from firmware_sim.scenario import Campaign, Group, LinkKind, Owner, Power, Presence, Scenario
from firmware_sim.world.outcome import Point

Condition = Literal["phone", "mains", "churn"]

CONDITIONS: Final[tuple[Condition, ...]] = ("phone", "mains", "churn")
DEVICES: Final = 600
HOURS: Final = 12.0
TARGET: Final = 0.45  # loss of the task `mlp`; never having trained has 2.9, everybody's data together 0.31
EVALUATIONS: Final = 3  # in a row, whose mean must be below the target
BOARDS: Final = {"zero2w": 0.10, "pi4": 0.35, "pi5": 0.30, "jetson-nano": 0.05, "orin-nano": 0.20}
RESTARTS: Final = 0.5  # of a device and day
KEEP: Final = 0.35  # of each session in `churn`
TIME_ZONES: Final = 24  # each trace has a phase of its own: the fleet has no common night
MAINS, BATTERY = 0.6, 0.4

# 100 phones of FLASH: on for log-normal times, which fits the share that is on and the time it stays (fits.py).
SESSIONS: Final = Presence(kind="sessions", on_hours=2.2, off_hours=0.8, spread=1.8, time_zones=TIME_ZONES)

CAMPAIGN: Final = Campaign(
    task="mlp",
    steps=20,
    form_at_share=0.3,
    form_seconds=1_800.0,
    work_seconds=120.0,
    training_share=32 / DEVICES,
    rest_seconds=300.0,
    quota=2.5,
    window_seconds=7_200,
    server_rate=2.0,
    bundle_mb=0.0,  # nobody's bundle is counted: the lawless schedulers have none
)


def study(condition: Condition, *, traces: bool, campaign: Campaign = CAMPAIGN) -> Scenario:
    """The study's scenario. With `traces` presence and links are those of --traces, else generative models."""
    presence = _presence(condition, traces)
    link = LinkKind(kind="trace" if traces else "wifi")
    supplies = (("plugged", MAINS, Power()), ("battery", BATTERY, _BATTERY))
    return Scenario(
        name=f"study-{condition}",
        about=f"The scheduler's study, {condition}: {DEVICES} devices of five boards for {HOURS:g} hours.",
        devices=DEVICES,
        days=HOURS / 24,
        groups=tuple(
            Group(
                name=name,
                share=share,
                boards=BOARDS,
                presence=presence,
                power=power,
                link=link,
                owner=Owner(),
            )
            for name, share, power in supplies
        ),
        campaign=campaign,
        faults={} if condition == "mains" else {"power-cut": RESTARTS},  # `always` has its own restarts
    )


_BATTERY: Final = Power(kind="battery", battery_wh=(100.0, 300.0), charge_watts=40.0)


def _presence(condition: Condition, traces: bool) -> Presence:
    if condition == "mains":
        return Presence(kind="always", time_zones=TIME_ZONES)
    keep = KEEP if condition == "churn" else 1.0
    if traces:
        return Presence(kind="trace", time_zones=TIME_ZONES, keep=keep)
    return Presence(
        kind="sessions",
        on_hours=SESSIONS.on_hours,
        off_hours=SESSIONS.off_hours,
        spread=SESSIONS.spread,
        time_zones=TIME_ZONES,
        keep=keep,
    )


# ---------------------------------------------------------------- comparing runs
@dataclass(frozen=True, slots=True)
class Reached:
    """When a run's loss was at its target, and the energy that it had spent by then."""

    hour: float
    energy_kj: float


def first_below(points: Sequence[Point], target: float, figure: str = "loss") -> Reached | None:
    """The first evaluation at or below the target: how lawless schedulers are dated, which favours them."""
    found = (Reached(point.hour, point.energy_kj) for point in points if point.figures[figure] <= target)
    return next(found, None)


def settled_below(points: Sequence[Point], target: float, figure: str = "loss") -> Reached | None:
    """The last of the first EVALUATIONS in a row whose mean is at or below the target: how ours is dated."""
    for end in range(EVALUATIONS, len(points) + 1):
        run = points[end - EVALUATIONS : end]
        if sum(point.figures[figure] for point in run) <= EVALUATIONS * target:
            return Reached(run[-1].hour, run[-1].energy_kj)
    return None


def at_the_end(points: Sequence[Point], figure: str) -> float:
    """Mean of the last EVALUATIONS evaluations; infinitely many nats, or none right, when there was none."""
    last = [point.figures[figure] for point in points[-EVALUATIONS:]]
    return sum(last) / len(last) if last else float("nan")


def jain(served: Sequence[int]) -> float:
    """Jain's index of fairness (1984): 1 when all are served alike, 1/n when one is; 0 when nobody is."""
    squares = sum(count * count for count in served)
    return sum(served) ** 2 / (len(served) * squares) if squares else 0.0
