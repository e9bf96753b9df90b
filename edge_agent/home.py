"""Where a device keeps what is its own: one folder, readable by its owner only.

identity.json   who it is, with its Ed25519 key          state.bin    the machine's saved state
tls.pem .key    its certificate for broker and HTTPS      policy.toml  what the owner allows
authority.pem   the one authority it trusts               rounds/      deltas and reports of the running round
blobs/          content-addressed downloads               stats.json   figures for people
presence        when it was on in the last week           clock        the latest time that was believed
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import IntegrityError, NoInputError, UnavailableError
from fedge.identity import FleetCertificate, SignedCertificate, Signer, Verifier
from fedge.io import durable

_ENROLL: Final = "Join a fleet first: fedge agent enroll TOKEN"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who this device is, whom it believes and where it goes. Holds the private signing key: mode 0600."""

    fleet: str
    device: str
    root: bytes
    certificate: bytes
    key: bytes
    url: str
    broker_host: str
    broker_port: int

    def signer(self) -> Signer:
        """Speaks in this device's name."""
        return Signer(Ed25519PrivateKey.from_private_bytes(self.key), self.certificate)

    def verifier(self) -> Verifier:
        """Believes this device's fleet."""
        return Verifier(self.fleet, self.root)

    def valid(self) -> tuple[float, float]:
        """From when until when this device's certificate holds, Unix seconds. Raises IntegrityError."""
        try:
            signed = msgspec.msgpack.decode(self.certificate, type=SignedCertificate)
            mine = msgspec.msgpack.decode(signed.body, type=FleetCertificate)
        except msgspec.MsgspecError as error:
            raise IntegrityError(
                "this device's certificate cannot be read", hint="Join the fleet again"
            ) from error
        return mine.not_before, mine.not_after

    def __repr__(self) -> str:
        return f"Identity({self.fleet}/{self.device})"


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one device."""

    folder: Path

    @property
    def identity(self) -> Path:
        return self.folder / "identity.json"

    @property
    def certificate(self) -> Path:
        return self.folder / "tls.pem"

    @property
    def key(self) -> Path:
        return self.folder / "tls.key"

    @property
    def authority(self) -> Path:
        return self.folder / "authority.pem"

    @property
    def state(self) -> Path:
        return self.folder / "state.bin"

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    @property
    def presence(self) -> Path:
        return self.folder / "presence"

    @property
    def stats(self) -> Path:
        return self.folder / "stats.json"

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs"

    @property
    def rounds(self) -> Path:
        return self.folder / "rounds"

    @property
    def carry(self) -> Path:
        """What earlier rounds could not deliver, float32."""
        return self.folder / "carry.f32"

    def delta(self, transcript: bytes) -> Path:
        """What training changed, float32."""
        return self.rounds / f"{transcript.hex()}.delta"

    def state_of(self, transcript: bytes) -> Path:
        """What an interrupted training goes on from."""
        return self.rounds / f"{transcript.hex()}.state"

    def sent(self, transcript: bytes) -> Path:
        """What the masked report carries of it, float32, before rounding."""
        return self.rounds / f"{transcript.hex()}.sent"

    def report(self, transcript: bytes) -> Path:
        """The finished masked report."""
        return self.rounds / f"{transcript.hex()}.report"

    def create(self) -> None:
        """Make the folders, 0700. Raises StorageError."""
        for folder in (self.folder, self.blobs, self.rounds):
            durable.make_folder(folder, secret=True)

    def who(self) -> Identity:
        """The identity kept here. NoInputError when the device never joined, IntegrityError when it is damaged."""
        try:
            return msgspec.json.decode(self.identity.read_bytes(), type=Identity)
        except FileNotFoundError as error:
            raise NoInputError(f"no device lives in {self.folder}", hint=_ENROLL) from error
        except OSError as error:
            raise durable.storage_error(error, self.identity, verb="read") from error
        except msgspec.MsgspecError as error:
            raise IntegrityError(
                f"{self.identity} cannot be read: {error}", hint="Join the fleet again"
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds this home for one process. UnavailableError when another agent runs in it."""
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UnavailableError(
                "another agent runs in this home", field="home", value=str(self.folder), hint="Stop it first"
            ) from error
        finally:
            os.close(handle)


def default_home() -> Home:
    """`fedge/agent` in the user's data folder (XDG base directories)."""
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share"
    return Home(base / "fedge" / "agent")
