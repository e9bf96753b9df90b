"""How a hub is set up: `config.toml` in its folder, overridden by flags, checked together before anything starts.

A port of 0 means: choose a free one once and remember it, because devices keep the address they joined at.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from fedge.errors import ConfigError, NoInputError

FILE: Final = "config.toml"
BROKERS: Final = ("auto", "mosquitto", "embedded")
_HOST_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")

Port = Annotated[int, Meta(ge=0, le=65_535)]


class HubConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything an operator may choose. `public_names` are the names and addresses that devices use."""

    home: str
    bind: str = "0.0.0.0"  # noqa: S104 devices come from other machines; mTLS and tokens are the gate
    https_port: Port = 8443
    mqtt_port: Port = 8883
    broker: str = "auto"  # or mosquitto, embedded, mqtts://host:port
    public_names: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The hub's folder."""
        return Path(self.home)

    @property
    def address(self) -> str:
        """The name that devices are told: the first public one."""
        return self.public_names[0] if self.public_names else "localhost"

    @property
    def foreign_broker(self) -> tuple[str, int] | None:
        """Host and port of a broker that somebody else runs, if one is configured."""
        if "://" not in self.broker:
            return None
        url = urlsplit(self.broker)
        return url.hostname or "", url.port or 8883


def default_home() -> Path:
    """`~/.local/share/fedge/hub`, or where XDG_DATA_HOME says."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
    return Path(base) / "fedge" / "hub"


def load_config(home: Path, flags: Mapping[str, object]) -> HubConfig:
    """The configuration of the hub in `home`; `flags` that are None do not count.

    Raises ConfigError naming the field, NoInputError when the folder does not exist.
    """
    if not home.is_dir():
        raise NoInputError(
            f"{home} does not exist", hint=f"Create the hub first: fedge hub init --home {home}"
        )
    chosen = {name: value for name, value in flags.items() if value is not None}
    return _checked({**_from_file(home / FILE), **chosen, "home": str(home.resolve())})


def _from_file(path: Path) -> dict[str, object]:
    try:
        return dict(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", field=FILE) from error


def _checked(fields: dict[str, object]) -> HubConfig:
    try:
        config = msgspec.convert(fields, HubConfig)
    except msgspec.ValidationError as error:
        known = ", ".join(field for field in HubConfig.__struct_fields__ if field != "home")
        raise ConfigError(f"the hub's configuration: {error}", hint=f"The fields are {known}") from error
    if config.https_port == config.mqtt_port != 0:
        raise ConfigError("two services cannot share a port", field="mqtt_port", value=config.mqtt_port)
    _check_address(config.bind)
    for name in config.public_names:
        _check_name(name)
    _check_broker(config)
    return config


def _check_address(bind: str) -> None:
    try:
        ipaddress.ip_address(bind)
    except ValueError as error:
        hint = "0.0.0.0 listens everywhere, 127.0.0.1 on this machine only"
        raise ConfigError("not an IP address", field="bind", value=bind, hint=hint) from error


def _check_name(name: str) -> None:
    try:
        ipaddress.ip_address(name)
    except ValueError as error:
        if len(name) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in name.split(".")):
            raise ConfigError(
                "neither a host name nor an IP address", field="public_names", value=name
            ) from error


def _check_broker(config: HubConfig) -> None:
    if config.broker in BROKERS:
        return
    url = urlsplit(config.broker)
    try:
        known = url.scheme == "mqtts" and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        known = False
    if not known:
        hint = f"Choose {', '.join(BROKERS)} or mqtts://host:port"
        raise ConfigError("broker is not understood", field="broker", value=config.broker, hint=hint)
