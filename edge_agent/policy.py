"""What the device's owner allows. The agent enforces it below everything a hub asks (law 3).

The policy is a small TOML file that only the owner writes; without one the defaults hold, which are already the
strictest that a fleet can work with. An owner may demand more than the laws, never less.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fedge import limits
from fedge.errors import ConfigError, StorageError

_Publisher = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_Hours = Annotated[str, Meta(pattern=rf"^({_CLOCK}-{_CLOCK})?\Z")]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Count = Annotated[int, Meta(ge=0, le=2**62)]

TEMPLATE: Final = """\
# What this device's owner allows. Every line is optional; these are the defaults.

# bloc_devices_min = 5      # the hub sees only sums over at least this many devices (5 to 64)
# plan_share_max = 2.0      # no device may do more than this many times its even share of a round's work (1 to 2)
# publishers = []           # if set, only bundles signed by these keys (64 hexadecimal digits each)
# threads_max = 0           # processor threads for training; 0 = all that this process may use
# memory_mb_max = 0         # training that would need more is refused, and stopped if it grows above; 0 = no bound

# When this device may work. Outside, it stays in its fleet and says no more than "not now".
# hours = ""                # local time, as "22:00-06:00"; empty = any
# battery_min = 0.25        # on battery, only while it is charged at least so far (0 to 1)
# metered = false           # true = also where the network counts every byte
# celsius_max = 0           # not while the board is warmer; 0 = no bound of yours
# bytes_per_day_max = 0     # up and down together, from midnight to midnight UTC; 0 = no bound
# rounds_max = 0            # rounds in this device's life that may hold your data; 0 = no bound
"""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's bounds; zero means that there is no bound of the owner's own."""

    bloc_devices_min: Annotated[int, Meta(ge=limits.BLOC_DEVICES_MIN, le=limits.BLOC_DEVICES_MAX)] = (
        limits.BLOC_DEVICES_MIN
    )
    plan_share_max: Annotated[float, Meta(ge=1, le=limits.PLAN_SHARE_MAX)] = limits.PLAN_SHARE_MAX
    publishers: tuple[_Publisher, ...] = ()
    threads_max: Annotated[int, Meta(ge=0, le=1_024)] = 0
    memory_mb_max: _Count = 0
    hours: _Hours = ""
    battery_min: _Share = 0.25
    metered: bool = False
    celsius_max: Annotated[float, Meta(ge=0, le=150)] = 0
    bytes_per_day_max: _Count = 0
    rounds_max: _Count = 0


def load_policy(path: Path) -> Policy:
    """The policy in `path`, or the defaults when there is no file. ConfigError names the field that is wrong.

    A policy that cannot be read is never replaced by the defaults: the owner may have meant less.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"cannot read {path}: {error}", hint="correct it, or remove it for the defaults"
        ) from error
    try:
        return msgspec.convert(tomllib.loads(text), Policy)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}", hint="each line reads `name = value`") from error
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the owner's policy cannot be followed: {error}",
            field="path",
            value=str(path),
            hint=f"the fields are {', '.join(Policy.__struct_fields__)}",
        ) from error
