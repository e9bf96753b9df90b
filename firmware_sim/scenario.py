"""A scenario: which devices there are, what they train, what goes wrong. One TOML file that a user copies and edits."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedge import limits

Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[float, Meta(gt=0, le=1e6)]
Range = tuple[float, float]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all tables of a scenario file."""


class Presence(_Table, frozen=True):
    """When devices are switched on and linked. Times are local hours.

    `always`: except for rare restarts. `sessions`: on and off for log-normal times. `night`: plugged in for the night
    and on then, with sessions by day. `day`: on while the sun is up or people work. `trace`: intervals of --traces.
    """

    kind: Literal["always", "sessions", "night", "day", "trace"] = "always"
    on_hours: Annotated[float, Meta(gt=0, le=10_000)] = 6.0  # median length of a session
    off_hours: Annotated[float, Meta(gt=0, le=10_000)] = 2.0
    spread: Annotated[float, Meta(ge=0, le=3)] = 1.0  # sigma of the log-normals
    from_hour: Annotated[float, Meta(ge=0, le=24)] = 22.0
    to_hour: Annotated[float, Meta(ge=0, le=24)] = 6.0
    keep: Share = 1.0  # share of each session that is left of it: 0.35 makes churn
    time_zones: Annotated[int, Meta(ge=1, le=24)] = 1  # over how many hours the fleet's local time is spread


class Power(_Table, frozen=True):
    """Where the current comes from. Watt-hours and watts are drawn evenly between the two bounds."""

    kind: Literal["mains", "battery", "solar"] = "mains"
    battery_wh: Range = (20.0, 60.0)
    panel_watts: Range = (10.0, 30.0)  # peak, solar only
    charge_watts: float = 12.0  # of the charger of a battery
    plugged_from_hour: Annotated[float, Meta(ge=0, le=24)] = 22.0
    plugged_to_hour: Annotated[float, Meta(ge=0, le=24)] = 6.0


class LinkKind(_Table, frozen=True):
    """The way to the hub; `metered` makes an owner's policy matter."""

    kind: Literal["ethernet", "wifi", "lte", "3g", "satellite", "trace"] = "wifi"
    metered: bool = False
    loss: Share = 0.0  # chance that one message is lost, beside what the kind has


class Owner(_Table, frozen=True):
    """What people do: events per device and day, and the policy that they set."""

    unplugs: Annotated[float, Meta(ge=0, le=100)] = 0.0
    travels: Annotated[float, Meta(ge=0, le=100)] = 0.0  # off for a day or more
    revokes: Annotated[float, Meta(ge=0, le=100)] = 0.0  # leaves for good
    policy_edits: Annotated[float, Meta(ge=0, le=100)] = 0.0
    allows_metered: bool = False
    battery_min: Share = 0.25
    hours: str = ""  # "22:00-06:00", local; empty = any


class Group(_Table, frozen=True):
    """Devices of one kind; `share` is relative to the other groups."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=40)]
    share: Weight = 1.0
    boards: dict[str, Weight] = msgspec.field(default_factory=lambda: {"pi5": 1.0})
    enclosure: Literal["open", "heatsink", "fan"] = "heatsink"
    ambient_celsius: Range = (18.0, 24.0)  # coldest at 04:00, warmest at 16:00
    samples: Range = (4.3, 0.7)  # log-normal: mean and sigma of the logarithm
    presence: Presence = Presence()
    power: Power = Power()
    link: LinkKind = LinkKind()
    owner: Owner = Owner()


class Campaign(_Table, frozen=True):
    """What is trained, and the scheduler's knobs (hub.scheduler). Shares are of all devices."""

    task: Literal["bowl", "mlp", "real"] = "bowl"
    steps: Annotated[int, Meta(ge=1, le=limits.STEPS_MAX)] = 20
    rounds: Annotated[int, Meta(ge=1, le=limits.ROUNDS_MAX)] = limits.ROUNDS_MAX
    bloc: Annotated[int, Meta(ge=limits.BLOC_DEVICES_MIN, le=limits.BLOC_DEVICES_MAX)] = 8
    form_at_share: Share = 0.3  # blocs are first formed when this many are READY
    form_seconds: Annotated[float, Meta(ge=10, le=604_800)] = 1_800.0
    work_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 120.0
    training_share: Share = 0.05  # devices that train at once; 0 = no bound
    rest_seconds: Annotated[float, Meta(ge=0, le=604_800)] = 300.0
    quota: Annotated[float, Meta(ge=0, le=1e6)] = 2.5
    window_seconds: Annotated[int, Meta(ge=60, le=limits.WINDOW_SECONDS_MAX)] = 7_200
    server_rate: Annotated[float, Meta(gt=0, le=100)] = 2.0
    normalise_steps: bool = False
    start_hour: Annotated[float, Meta(ge=0, le=24 * 30)] = 0.0  # after the world begins
    bundle_mb: Annotated[float, Meta(ge=0, le=8_192)] = 94.0  # what each device downloads once


class Scenario(_Table, frozen=True, kw_only=True):
    """The whole file. `faults`: how often each fault of firmware_sim.faults strikes, per device and day."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=40)]
    about: Annotated[str, Meta(max_length=2_000)] = ""
    devices: Annotated[int, Meta(ge=1, le=10_000_000)] = 100  # unless --devices says otherwise
    days: Annotated[float, Meta(gt=0, le=3_650)] = 1.0
    groups: Annotated[tuple[Group, ...], Meta(min_length=1, max_length=50)]
    campaign: Campaign = Campaign()
    faults: dict[str, Annotated[float, Meta(ge=0, le=1e6)]] = {}
