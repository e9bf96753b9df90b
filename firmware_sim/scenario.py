"""A scenario: which devices there are, what they train, what goes wrong. One TOML file that a user copies and edits.

A file is believed only as a whole: all its mistakes are told at once, each with its key, value and line, before
anything runs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from fedge import limits
from fedge.errors import ConfigError, DataError, NoInputError
from firmware_sim.problems import LOW_HIGH, Names, Problem, line_of, lines_of, nearest, problems_of

_FILE_BYTES_MAX: Final = 1_000_000
_PROBLEMS_SHOWN: Final = 8
_HOURS: Final = r"^((([01]\d|2[0-3]):[0-5]\d)-(([01]\d|2[0-3]):[0-5]\d))?\Z"
_LOW_HIGH: Final = Meta(title=LOW_HIGH)

Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[float, Meta(gt=0, le=1_000_000)]
Name = Annotated[
    str,
    Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=40, description="small letters, digits and hyphens"),
]
Hour = Annotated[float, Meta(ge=0, le=24)]
Celsius = Annotated[float, Meta(ge=-60, le=80)]
Amount = Annotated[float, Meta(ge=0, le=100_000)]
Times = Annotated[float, Meta(ge=0, le=100)]  # a day
Amounts = Annotated[tuple[Amount, Amount], _LOW_HIGH]
Climate = Annotated[tuple[Celsius, Celsius], _LOW_HIGH]
LogNormal = tuple[Annotated[float, Meta(ge=0, le=14)], Annotated[float, Meta(ge=0, le=3)]]


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
    from_hour: Hour = 22.0
    to_hour: Hour = 6.0
    keep: Share = 1.0  # share of each session that is left of it: 0.35 makes churn
    time_zones: Annotated[int, Meta(ge=1, le=24)] = 1  # over how many hours the fleet's local time is spread


class Power(_Table, frozen=True):
    """Where the current comes from. Watt-hours and watts are drawn evenly between the two bounds."""

    kind: Literal["mains", "battery", "solar"] = "mains"
    battery_wh: Amounts = (20.0, 60.0)
    panel_watts: Amounts = (10.0, 30.0)  # peak, solar only
    charge_watts: Amount = 12.0  # of the charger of a battery
    plugged_from_hour: Hour = 22.0
    plugged_to_hour: Hour = 6.0


class LinkKind(_Table, frozen=True):
    """The way to the hub; `metered` makes an owner's policy matter."""

    kind: Literal["ethernet", "wifi", "lte", "3g", "satellite", "trace"] = "wifi"
    metered: bool = False
    loss: Share = 0.0  # chance that one message is lost, beside what the kind has


class Owner(_Table, frozen=True):
    """What people do: events per device and day, and the policy that they set."""

    unplugs: Times = 0.0
    travels: Times = 0.0  # off for a day or more
    revokes: Times = 0.0  # leaves for good
    policy_edits: Times = 0.0
    allows_metered: bool = False
    battery_min: Share = 0.25
    hours: Annotated[str, Meta(pattern=_HOURS, description='hours like "22:00-06:00", or ""')] = ""  # local


class Group(_Table, frozen=True):
    """Devices of one kind; `share` is relative to the other groups."""

    name: Name
    share: Weight = 1.0
    boards: dict[str, Weight] = msgspec.field(default_factory=lambda: {"pi5": 1.0})
    enclosure: Literal["open", "heatsink", "fan"] = "heatsink"
    ambient_celsius: Climate = (18.0, 24.0)  # coldest at 04:00, warmest at 16:00
    samples: LogNormal = (4.3, 0.7)  # mean and sigma of the logarithm
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
    quota: Annotated[float, Meta(ge=0, le=1_000_000)] = 2.5
    window_seconds: Annotated[int, Meta(ge=60, le=limits.WINDOW_SECONDS_MAX)] = 7_200
    server_rate: Annotated[float, Meta(gt=0, le=100)] = 2.0
    normalise_steps: bool = False
    start_hour: Annotated[float, Meta(ge=0, le=24 * 30)] = 0.0  # after the world begins
    bundle_mb: Annotated[float, Meta(ge=0, le=8_192)] = 94.0  # what each device downloads once


class Scenario(_Table, frozen=True, kw_only=True):
    """The whole file. `faults`: how often each fault of firmware_sim.faults.strikes strikes, per device and day."""

    name: Name
    about: Annotated[str, Meta(max_length=2_000)] = ""
    devices: Annotated[int, Meta(ge=1, le=10_000_000)] = 100  # unless --devices says otherwise
    days: Annotated[float, Meta(gt=0, le=3_650)] = 1.0
    groups: Annotated[tuple[Group, ...], Meta(min_length=1, max_length=50)]
    campaign: Campaign = Campaign()
    faults: dict[str, Annotated[float, Meta(ge=0, le=1_000_000)]] = {}


# ---------------------------------------------------------------- files
def ready() -> list[str]:
    """The names of the scenarios that come with Fedge."""
    folder = resources.files("firmware_sim").joinpath("scenarios")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def ready_text(name: str) -> str:
    """The file of a ready scenario, to copy and edit. Raises NoInputError."""
    if name not in ready():
        raise _no_scenario(name)
    return resources.files("firmware_sim").joinpath(f"scenarios/{name}.toml").read_text("utf-8")


def load_scenario(source: str | Path) -> Scenario:
    """The scenario in the file `source`, or the ready one of that name.

    Raises NoInputError (no such file or name), DataError (not TOML), ConfigError (all that is wrong with it).
    """
    path = Path(source)
    if isinstance(source, str) and path.suffix != ".toml" and not path.is_file():
        return parse_scenario(ready_text(source), source)
    try:
        with path.open("rb") as stream:
            data = stream.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise NoInputError(
            f"cannot read {path}: {error.strerror}",
            field="scenario",
            value=str(source),
            hint="`fedge sim scenarios` lists the ready ones",
        ) from error
    if len(data) > _FILE_BYTES_MAX:
        raise DataError(
            f"{path} is larger than a scenario can be", field="bytes", value=f"> {_FILE_BYTES_MAX:,}"
        )
    return parse_scenario(data.decode("utf-8", "replace"), str(path))


def parse_scenario(text: str, where: str) -> Scenario:
    """The scenario in TOML `text`; `where` is its name in errors. Raises DataError, ConfigError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(
            f"{where} is not TOML: {error}", hint="A table begins with [name], text is quoted"
        ) from error
    names: Names = {(Group, "boards"): known_boards, (Scenario, "faults"): known_faults}
    problems = problems_of(values, Scenario, names) or _contradictions(values)
    if problems:
        raise _refused(problems, text, where)
    return msgspec.convert(values, Scenario)


def known_boards() -> Iterable[str]:
    """The boards that a group may have."""
    from firmware_sim.parts.board import BOARDS

    return BOARDS


def known_faults() -> Iterable[str]:
    """The faults that may strike."""
    from firmware_sim.faults.strikes import FAULTS

    return FAULTS


def _contradictions(values: dict[str, Any]) -> list[Problem]:
    names = [group["name"] for group in values["groups"]]
    return [
        Problem(("groups", place, "name"), name, "is the name of an earlier group as well")
        for place, name in enumerate(names)
        if name in names[:place]
    ]


def _refused(problems: list[Problem], text: str, where: str) -> ConfigError:
    """The first problem as every error of ours is told; the others after it."""
    lines = lines_of(text)
    first, rest = problems[0], problems[1:]
    line = line_of(first.path, lines)
    told = [_told(problem, line_of(problem.path, lines)) for problem in rest[: _PROBLEMS_SHOWN - 1]]
    if left := len(rest) - len(told):
        told.append(f"and {left} more")
    return ConfigError(
        f"{where}{f', line {line}' if line else ''}: {first.text}",
        field=first.key,
        value=first.value,
        hint=f"{len(problems)} problems in all: {'; '.join(told)}" if rest else "",
    )


def _told(problem: Problem, line: int | None) -> str:
    value = "" if problem.value is None else f" = {_shown(problem.value)}"
    return f"{f'line {line}: ' if line else ''}{problem.key}{value}: {problem.text}"


def _shown(value: object) -> str:
    """The value as it stands in the file, or nearly so."""
    text = msgspec.json.encode(value, enc_hook=str).decode() if not isinstance(value, float) else f"{value:g}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_scenario(name: str) -> NoInputError:
    close = nearest(name, ready())
    return NoInputError(
        f"no such scenario{close or '; ready: ' + ', '.join(ready())}",
        field="scenario",
        value=name,
        hint="" if close else "A file of your own ends with .toml",
    )
