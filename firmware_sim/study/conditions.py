"""The fleet on which schedulers are compared: 600 devices of five boards, for twelve hours.

Boards, shares and the rule that two fifths live on a battery are those of the study from which the scheduler's rules
come. Batteries are sized so that idling takes one to three per cent an hour, as a phone's does: a board on a phone's
battery would be empty by noon, and presence would then be about nothing but charge.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from firmware_sim.parts import fitted
from firmware_sim.scenario import Campaign, Group, LinkKind, Owner, Power, Presence, Scenario

Condition = Literal["phone", "mains", "churn"]

CONDITIONS: Final[tuple[Condition, ...]] = ("phone", "mains", "churn")
DEVICES: Final = 600
HOURS: Final = 12.0
BOARDS: Final = {"zero2w": 0.10, "pi4": 0.35, "pi5": 0.30, "jetson-nano": 0.05, "orin-nano": 0.20}
RESTARTS: Final = 0.5  # of a device and day
KEEP: Final = 0.35  # of each session in `churn`
TIME_ZONES: Final = 24  # each trace has a phase of its own: the fleet has no common night
MAINS, BATTERY = 0.6, 0.4

# Generative presence: sessions and pauses as they were fitted to 100 phones.
SESSIONS: Final = Presence(
    kind="sessions",
    on_hours=fitted.ON_HOURS,
    off_hours=fitted.OFF_HOURS,
    spread=fitted.SPREAD,
    time_zones=TIME_ZONES,
)

CAMPAIGN: Final = Campaign(
    task="mlp",
    steps=20,
    form_at_share=0.3,
    form_seconds=1_800.0,
    work_seconds=120.0,
    training_share=32 / DEVICES,
    rest_seconds=300.0,
    quota=2.0,
    window_seconds=14_400,
    server_rate=2.0,
    normalise_steps=True,  # the target 8 % sooner, rare classes 0.06 better (`--reach`)
    bundle_mb=0.0,  # nobody's bundle is counted: the lawless schedulers have none
)


# Of `churn` about a quarter is on at a time: a campaign that waits for 30 % would wait for ever.
CHURN: Final = msgspec.structs.replace(CAMPAIGN, form_at_share=0.15)


def study(condition: Condition, *, traces: bool) -> Scenario:
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
        campaign=CHURN if condition == "churn" else CAMPAIGN,
        faults={} if condition == "mains" else {"power-cut": RESTARTS},  # `always` has its own restarts
    )


_BATTERY: Final = Power(kind="battery", battery_wh=(100.0, 300.0), charge_watts=40.0)


def _presence(condition: Condition, traces: bool) -> Presence:
    if condition == "mains":
        return Presence(kind="always", time_zones=TIME_ZONES)
    keep = KEEP if condition == "churn" else 1.0
    if traces:
        return Presence(kind="trace", time_zones=TIME_ZONES, keep=keep)
    return msgspec.structs.replace(SESSIONS, keep=keep)
