"""Joining a fleet: the one-line token an operator hands over, and the one request it is good for."""

from __future__ import annotations

import base64
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fedge.errors import ProtocolError
from fedge.messages import Id, Key, Name

_PREFIX: Final = "fedge1."


class JoinToken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One line that lets one device join: where, whom to trust, and a one-time secret (the hub keeps its hash)."""

    url: Name
    authority: Annotated[bytes, Meta(min_length=32, max_length=32)]
    secret: Annotated[bytes, Meta(min_length=20, max_length=20)]

    def __repr__(self) -> str:
        """Without the secret."""
        return f"JoinToken(url={self.url!r})"

    def text(self) -> str:
        """The token as one printable word."""
        return _PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).decode().rstrip("=")

    @staticmethod
    def parse(text: str) -> JoinToken:
        """The token in `text`; ProtocolError `bad-token` when it is none."""
        word = text.strip()
        body = word.removeprefix(_PREFIX)
        try:
            if body == word:
                raise ValueError("no prefix")
            return msgspec.msgpack.decode(
                base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=JoinToken
            )
        except (msgspec.MsgspecError, ValueError) as error:
            raise ProtocolError(
                "bad-token", "this is no join token", hint="ask the operator for `fedge hub token`"
            ) from error


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/join: the secret of a token and the device's two public keys (P-256 as PEM, Ed25519 raw)."""

    secret: Annotated[bytes, Meta(min_length=20, max_length=20)]
    tls_key: Annotated[str, Meta(max_length=1_024)]
    identity_key: Key
    name: Name = ""

    def __repr__(self) -> str:
        """Without the secret."""
        return f"JoinRequest(name={self.name!r}, identity_key={self.identity_key.hex()})"


class JoinReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device keeps after joining: its id, certificates, the fleet's root and where the broker is."""

    fleet: Name
    device: Id
    root: Key
    tls_certificate: str
    certificate: bytes
    broker_host: Name
    broker_port: Annotated[int, Meta(ge=1, le=65_535)]
