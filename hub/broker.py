"""The broker that the hub brings along: which one, on which port, and who keeps it alive.

`auto` takes a configured URL, else a private `mosquitto` child (`hub.mosquitto`), else the embedded amqtt
(`hub.embedded`). All of them refuse whoever shows no certificate of the fleet, take the certificate's common name as
client id, and apply `hub.access`. Nothing in the protocol relies on what a broker remembers.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from fedge import limits
from fedge.errors import UnavailableError
from hub.authority import TlsPair
from hub.config import HubConfig

PACKET_BYTES_MAX: Final = limits.FRAME_BYTES_HARD_MAX + 1_024  # payload, topic and header
QUEUED_MESSAGES_MAX: Final = 2_000  # for one client that is away
QUEUED_BYTES_MAX: Final = 64 * 1024**2

_FLAGS: Final = {"https_port": "--port", "mqtt_port": "--mqtt-port"}


class Broker(Protocol):
    """A broker and how to reach it from this machine."""

    kind: str
    host: str
    port: int

    def start(self) -> None:
        """Serve; returns when connections are accepted. Raises UnavailableError."""

    def stop(self) -> None:
        """Stop serving."""

    def expel(self, revoked: frozenset[int]) -> None:
        """From now on refuse these X.509 serial numbers, live connections included. Also before `start`."""

    def refresh(self) -> None:
        """The revocation list file was written anew, with the same numbers and a later end."""


@dataclass(frozen=True, slots=True)
class BrokerSetup:
    """What a broker of ours is made from."""

    folder: Path  # for its files
    bind: str
    port: int
    server: TlsPair
    authority: Path  # PEM of the fleet's X.509 authority
    revocations: Path  # X.509 revocation list, written by the hub


class ForeignBroker:
    """Somebody else's broker: we only know where it is. Revoking there is up to its operator and the machine."""

    kind = "foreign"

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    def start(self) -> None:
        """Checks that something listens. Raises UnavailableError."""
        try:
            socket.create_connection((self.host, self.port), 10).close()
        except OSError as error:
            raise UnavailableError(
                f"no broker at {self.host}:{self.port}: {error.strerror or error}",
                field="broker",
                value=f"mqtts://{self.host}:{self.port}",
                hint="Start it, or set broker = auto and the hub brings its own",
            ) from error

    def stop(self) -> None:
        """Nothing of ours runs."""

    def expel(self, revoked: frozenset[int]) -> None:
        """The machine refuses what a revoked device says; its connection is the broker's operator's to end."""

    def refresh(self) -> None:
        """The list is ours; what that broker reads is its operator's business."""


def choose_broker(config: HubConfig, setup: BrokerSetup) -> Broker:
    """The broker that `config.broker` names. Raises UnavailableError when it is not installed."""
    if config.foreign_broker is not None:
        return ForeignBroker(*config.foreign_broker)
    from hub.mosquitto import Mosquitto, find_mosquitto

    program = None if config.broker == "embedded" else find_mosquitto()
    if program is not None:
        return Mosquitto(program, setup)
    if config.broker == "mosquitto":
        raise UnavailableError(
            "mosquitto is not installed",
            field="broker",
            value="mosquitto",
            hint="apt-get install mosquitto, or use broker = auto",
        )
    from hub.embedded import EmbeddedBroker

    return EmbeddedBroker(setup)


def ensure_free(bind: str, port: int, field: str) -> None:
    """Raises UnavailableError, naming port and setting, when somebody listens there already."""
    listen(bind, port, field).close()


def listen(bind: str, port: int, field: str) -> socket.socket:
    """A listening socket. Raises UnavailableError naming the port and what to do."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bind, port))
        listener.listen(1_024)
    except OSError as error:
        listener.close()
        flag = _FLAGS.get(field, "--port")
        hint = f"Stop what listens there (ss -ltnp), or choose another port with {flag}"
        if error.errno == errno.EACCES:
            hint = f"Ports below 1024 need root: choose another one with {flag}"
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "This machine has no such address: choose another one with --bind"
        raise UnavailableError(
            f"port {port} on {bind} cannot be used: {error.strerror}", field=field, value=port, hint=hint
        ) from error
    return listener


def free_port(bind: str) -> int:
    """A port that nobody listens on right now."""
    with listen(bind, 0, "port") as probe:
        return int(probe.getsockname()[1])


def local_address(bind: str) -> str:
    """Where to reach, from this machine, a server that listens on `bind`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104 a lookup, nothing is bound
