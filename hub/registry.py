"""Who may join and who has joined: join tokens, issued certificates, revocations.

A token is good for one device. Using it, choosing the id and keeping the issued serial numbers is one transaction; the
same request again (the answer was lost on the way) gets the same answer, any other request with that token is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Final

import msgspec
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedge.authority import Authority
from fedge.errors import NoInputError, ProtocolError
from fedge.joining import JoinReply, JoinRequest
from fedge.limits import ID_CHARS_MAX
from hub.authority import RESERVED, Entropy, new_serial, new_tls_serial
from hub.schema import CERTIFICATES, TOKENS
from hub.store import Store

SECRET_BYTES: Final = 20
ID_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Revoked:
    """Serial numbers that are no longer believed: of fleet certificates, and of X.509 ones."""

    fleet: frozenset[int]
    tls: frozenset[int]


class Registry:
    """The fleet's list of members, kept in the hub's database."""

    def __init__(self, store: Store, entropy: Entropy) -> None:
        self._store, self._entropy = store, entropy

    def new_token(self, *, now: float, seconds: float) -> bytes:
        """A fresh secret, good for one join within `seconds`. Only its hash is kept."""
        secret = self._entropy(SECRET_BYTES)
        with self._store.writing() as connection:
            connection.execute(
                sa.insert(TOKENS).values(hash=hashlib.sha256(secret).digest(), expires_at=now + seconds)
            )
        return secret

    def join(
        self, request: JoinRequest, authority: Authority, broker: tuple[str, int], *, now: float
    ) -> JoinReply:
        """Takes the token and issues certificates.

        Raises ProtocolError `bad-token`, `bad-name`, `name-taken` or `bad-key`.
        """
        tls_key = _tls_key(request.tls_key)
        Ed25519PublicKey.from_public_bytes(request.identity_key)
        digest = hashlib.sha256(msgspec.msgpack.encode(request)).digest()
        with self._store.writing() as connection:
            token = _find_token(connection, hashlib.sha256(request.secret).digest(), now)
            if token.reply is not None:
                if not hmac.compare_digest(token.request, digest):
                    raise _bad_token()
                return msgspec.msgpack.decode(token.reply, type=JoinReply)
            device = self._choose_id(connection, request.name)
            serial, tls_serial = new_serial(self._entropy), new_tls_serial(self._entropy)
            reply = JoinReply(
                fleet=authority.fleet,
                device=device,
                root=authority.root_public,
                tls_certificate=authority.certify_tls(device, tls_key, serial=tls_serial, now=now).decode(),
                certificate=authority.certify(device, "device", request.identity_key, serial=serial, now=now),
                broker_host=broker[0],
                broker_port=broker[1],
            )
            connection.execute(
                sa.insert(CERTIFICATES).values(
                    device=device, serial=serial, tls_serial=f"{tls_serial:x}", issued_at=now
                )
            )
            used = {"device": device, "request": digest, "reply": msgspec.msgpack.encode(reply)}
            connection.execute(sa.update(TOKENS).where(TOKENS.c.hash == token.hash).values(**used))
            return reply

    def revoke(self, device: str, *, now: float) -> None:
        """Ends a device's membership for good. Raises NoInputError for an unknown device."""
        statement = sa.update(CERTIFICATES).where(CERTIFICATES.c.device == device)
        with self._store.writing() as connection:
            statement = statement.values(revoked_at=sa.func.coalesce(CERTIFICATES.c.revoked_at, now))
            if connection.execute(statement).rowcount == 0:
                raise NoInputError(
                    f"no device {device} ever joined", hint="`fedge hub status` lists the devices"
                )

    def revoked(self) -> Revoked:
        """Every serial number that was revoked."""
        query = sa.select(CERTIFICATES.c.serial, CERTIFICATES.c.tls_serial).where(
            CERTIFICATES.c.revoked_at.is_not(None)
        )
        with self._store.reading() as connection:
            found = connection.execute(query).all()
        return Revoked(
            frozenset(line.serial for line in found), frozenset(int(line.tls_serial, 16) for line in found)
        )

    def devices(self) -> list[tuple[str, float, bool]]:
        """All members that ever joined: id, when, and whether revoked."""
        table = CERTIFICATES
        query = sa.select(table.c.device, table.c.issued_at, table.c.revoked_at).order_by(table.c.device)
        with self._store.reading() as connection:
            return [
                (line.device, line.issued_at, line.revoked_at is not None)
                for line in connection.execute(query)
            ]

    def _choose_id(self, connection: sa.Connection, name: str) -> str:
        device = name or f"d-{self._entropy(6).hex()}"
        if len(device) > ID_CHARS_MAX or ID_PATTERN.fullmatch(device) is None or device in RESERVED:
            raise ProtocolError(
                "bad-name",
                "a device's name is lower-case letters, digits and hyphens",
                field="name",
                value=name,
                hint="leave it out and the hub chooses one",
            )
        query = sa.select(CERTIFICATES.c.device).where(CERTIFICATES.c.device == device)
        if connection.execute(query).first() is not None:
            raise ProtocolError("name-taken", "another device has this name", field="name", value=device)
        return device


def _find_token(connection: sa.Connection, digest: bytes, now: float) -> sa.Row[tuple[object, ...]]:
    found = connection.execute(sa.select(TOKENS).where(TOKENS.c.hash == digest)).first()
    # The index finds hashes of a 160-bit secret, so its timing tells nothing; the comparison below is what decides.
    if found is None or not hmac.compare_digest(found.hash, digest) or found.expires_at < now:
        raise _bad_token()
    return found


def _bad_token() -> ProtocolError:
    return ProtocolError(
        "bad-token", "this token is unknown, used or expired", hint="ask the operator for a new one"
    )


def _tls_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise ProtocolError("bad-key", "this is no public key", field="tls_key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProtocolError("bad-key", "the TLS key is not on P-256", field="tls_key")
    return key
