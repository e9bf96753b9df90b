"""Who is who: fleet certificates and signed envelopes.

An Ed25519 root signs *fleet certificates*: a subject, its role and its Ed25519 key, which signs messages. (The other
root, an X.509 P-256 authority for TLS, is in `fedge.authority`.) Nothing that changes state is believed without both
signatures. Pure: time is an argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Generic, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from fedge.errors import ProtocolError
from fedge.limits import CLOCK_SKEW_SECONDS_MAX
from fedge.messages import (
    Envelope,
    Id,
    Key,
    Message,
    Name,
    Signature,
    decode,
    decode_envelope,
    encode,
    kind_in,
)

Role = Literal["device", "hub", "publisher"]
M = TypeVar("M", bound=Message)

_CERTIFICATE_DOMAIN: Final = b"fedge fleet certificate v1\x00"
_MESSAGE_DOMAIN: Final = b"fedge message v1\x00"


class FleetCertificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A subject's Ed25519 key and role, as the fleet root vouches for it. Times are Unix seconds."""

    fleet: Name
    subject: Id
    role: Role
    public_key: Key
    serial: Annotated[int, Meta(ge=1, le=2**62)]
    not_before: int
    not_after: int


class SignedCertificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A fleet certificate's bytes and the root's signature over them."""

    body: Annotated[bytes, Meta(max_length=1_024)]
    signature: Signature


_certificate_decoder: Final = msgspec.msgpack.Decoder(FleetCertificate)
_signed_decoder: Final = msgspec.msgpack.Decoder(SignedCertificate)


def sign_certificate(certificate: FleetCertificate, root: Ed25519PrivateKey) -> bytes:
    """The certificate, signed by the fleet root, encoded."""
    body = msgspec.msgpack.encode(certificate)
    _certificate_decoder.decode(body)  # the limits hold for what we sign, too
    return msgspec.msgpack.encode(SignedCertificate(body, root.sign(_CERTIFICATE_DOMAIN + body)))


@dataclass(frozen=True, slots=True)
class Signer:
    """One identity that can speak: its private key and its signed fleet certificate."""

    key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes

    def seal(self, message: Message) -> bytes:
        """The message in a signed envelope, encoded."""
        body = encode(message)
        return encode(Envelope(body, self.certificate, self.sign(_MESSAGE_DOMAIN + body)))

    def sign(self, data: bytes) -> bytes:
        """64 bytes, as Verifier.check_signature wants them (Ed25519, RFC 8032). A simulation may do it cheaper."""
        return self.key.sign(data)


class Opened(msgspec.Struct, Generic[M], frozen=True):
    """A verified message: who said it, and its exact bytes (their SHA-256 is what other messages refer to)."""

    message: M
    subject: str
    body: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256 of the message's bytes."""
        return hashlib.sha256(self.body).digest()


@dataclass(frozen=True, slots=True)
class Verifier:
    """Believes what the fleet root vouches for, except revoked serial numbers."""

    fleet: str
    root: bytes
    revoked: Collection[int] = frozenset()

    def certificate(self, data: bytes, *, role: Role, now: float) -> FleetCertificate:
        """The certificate in `data`, or ProtocolError `bad-certificate`, `wrong-role`, `expired`, `revoked`."""
        try:
            signed = _signed_decoder.decode(data)
            self.check_signature(self.root, signed.signature, _CERTIFICATE_DOMAIN + signed.body)
            found = _certificate_decoder.decode(signed.body)
        except (msgspec.MsgspecError, InvalidSignature, ValueError) as error:
            raise ProtocolError("bad-certificate", "the fleet root did not sign this certificate") from error
        self.require_valid(found, role, now)
        return found

    def check_signature(self, public_key: bytes, signature: bytes, data: bytes) -> None:
        """Raises InvalidSignature, or ValueError for bytes that are no key. Ed25519 (RFC 8032)."""
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)

    def require_valid(self, found: FleetCertificate, role: Role, now: float) -> None:
        """ProtocolError unless the certificate is of this fleet and this role, not revoked, and valid `now`."""
        if found.fleet != self.fleet:
            raise ProtocolError(
                "bad-certificate", "certificate of another fleet", field="fleet", value=found.fleet
            )
        if found.role != role:
            raise ProtocolError("wrong-role", f"{found.subject} is no {role}", field="role", value=found.role)
        if found.serial in self.revoked:
            raise ProtocolError("revoked", f"{found.subject} was revoked", field="serial", value=found.serial)
        if not found.not_before - CLOCK_SKEW_SECONDS_MAX <= now <= found.not_after:
            raise ProtocolError(
                "expired",
                f"certificate of {found.subject} is not valid now",
                field="now",
                value=int(now),
                hint="check this machine's clock, or renew the certificate",
            )

    def open(self, data: bytes, kind: type[M], *, role: Role, now: float) -> Opened[M]:
        """The verified message of type `kind` in the envelope `data`; ProtocolError names what is wrong."""
        return self._checked(decode_envelope(data), kind, role, now)[0]

    def open_any(self, data: bytes, kinds: Mapping[str, type[M]], *, role: Role, now: float) -> Opened[M]:
        """As `open`, whichever of `kinds` (by tag) the message is."""
        envelope = decode_envelope(data)
        return self._checked(envelope, kind_in(envelope.body, kinds), role, now)[0]

    def _checked(
        self, envelope: Envelope, kind: type[M], role: Role, now: float
    ) -> tuple[Opened[M], FleetCertificate]:
        who = self.certificate(envelope.certificate, role=role, now=now)
        try:
            self.check_signature(who.public_key, envelope.signature, _MESSAGE_DOMAIN + envelope.body)
        except InvalidSignature as error:
            raise ProtocolError("bad-signature", f"{who.subject} did not sign this message") from error
        return Opened(decode(envelope.body, kind), who.subject, envelope.body), who
