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

TEMPLATE: Final = """\
# What this device's owner allows. Every line is optional; these are the defaults.

# bloc_devices_min = 5      # the hub sees only sums over at least this many devices (5 to 64)
# plan_share_max = 2.0      # no device may do more than this many times its even share of a round's work (1 to 2)
# publishers = []           # if set, only bundles signed by these keys (64 hexadecimal digits each)
# threads_max = 0           # processor threads for training; 0 = all that this process may use
# memory_mb_max = 0         # training that grows above this is stopped; 0 = no bound
"""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The owner's bounds; zero means that there is no bound of the owner's own."""

    bloc_devices_min: Annotated[int, Meta(ge=limits.BLOC_DEVICES_MIN, le=limits.BLOC_DEVICES_MAX)] = (
        limits.BLOC_DEVICES_MIN
    )
    plan_share_max: Annotated[float, Meta(ge=1, le=limits.PLAN_SHARE_MAX)] = limits.PLAN_SHARE_MAX
    publishers: tuple[_Publisher, ...] = ()
    threads_max: Annotated[int, Meta(ge=0, le=1_024)] = 0
    memory_mb_max: Annotated[int, Meta(ge=0)] = 0


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
