"""A fleet authority, certificates and brokers for the hub's tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedge.authority import Authority, key_pem, p256_key
from hub.authority import (
    OwnIdentity,
    TlsPair,
    authority_folder,
    create_authority,
    new_tls_serial,
    own_identity,
    write_revocations,
)


@dataclass
class Fleet:
    """An authority in a folder, and certificates of devices on demand."""

    home: Path
    authority: Authority
    own: OwnIdentity
    serials: dict[str, int] = field(default_factory=dict)

    @property
    def pem(self) -> Path:
        return authority_folder(self.home) / "authority.pem"

    @property
    def crl(self) -> Path:
        return self.home / "revoked.crl"

    def device(self, name: str) -> TlsPair:
        pair = TlsPair(self.home / f"{name}.pem", self.home / f"{name}.key")
        if not pair.key.exists():
            key = p256_key(os.urandom(48))
            self.serials[name] = new_tls_serial(os.urandom)
            certificate = self.authority.certify_tls(
                name, key.public_key(), serial=self.serials[name], now=time.time()
            )
            pair.certificate.write_bytes(certificate)
            pair.key.write_bytes(key_pem(key))
        return pair

    def revoke(self, *names: str) -> frozenset[int]:
        serials = frozenset(self.serials[name] for name in names)
        write_revocations(self.crl, self.authority, sorted(serials), now=time.time())
        return serials


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    home = tmp_path / "home"
    authority = create_authority(home, "lab", now=time.time(), entropy=os.urandom)
    own = own_identity(home, authority, ("hub.example",), now=time.time(), entropy=os.urandom)
    made = Fleet(home, authority, own)
    made.revoke()
    return made


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], None]:
    """Waits until something is true; fails after twenty seconds."""

    def wait(condition: Callable[[], object]) -> None:
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until, "it never became true"
            time.sleep(0.02)

    return wait


@pytest.fixture
def cleanup() -> Iterator[list[Callable[[], None]]]:
    """Things to stop at the end, last first."""
    stops: list[Callable[[], None]] = []
    yield stops
    for stop in reversed(stops):
        stop()
