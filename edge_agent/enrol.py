"""Joining a fleet: one token in, an identity out. Private keys are made here and never leave.

The token pins the fleet's authority. Its certificate is fetched unverified, compared with the pin, and from then on is
the only one believed; the secret goes out over that verified connection and no other. The reply is checked before
anything is kept, and the identity is written last: without it the device has not joined.
"""

from __future__ import annotations

import http.client
import os
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_agent import policy
from edge_agent.effects import AgentState
from edge_agent.home import Home, Identity
from edge_agent.journal import Journal
from fedge.authority import fingerprint, key_pem, p256_key
from fedge.errors import FedgeError, IntegrityError, ProtocolError, UnavailableError, UsageError
from fedge.identity import Verifier
from fedge.io import durable
from fedge.io.tls import client_tls
from fedge.joining import JoinReply, JoinRequest, JoinToken

_TIMEOUT_SECONDS: Final = 20.0
_ANSWER_BYTES_MAX: Final = 65_536
_ATTEMPTS: Final = 3
_STATE_BYTES: Final = 1 << 20


class _Refusal(msgspec.Struct):
    error: str = "refused"
    what: str = "the hub refused this device"


def enroll(
    token_text: str,
    home: Home,
    *,
    name: str = "",
    now: float | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> Identity:
    """Join the fleet that the token names, and keep the identity in `home`.

    Raises UsageError when a device lives there already, ProtocolError for a token that is no good, IntegrityError when
    the hub is not the one that the token names, UnavailableError, StorageError. After an error nothing is left behind.
    """
    token = JoinToken.parse(token_text)
    if home.identity.exists():
        raise UsageError(
            "a device lives in this home already",
            field="home",
            value=str(home.folder),
            hint="Choose another --home",
        )
    home.create()
    durable.ensure_space(home.folder, _STATE_BYTES)  # before the token is used up
    pem = _authority(token)
    tls_key = p256_key(entropy(48))
    key = Ed25519PrivateKey.from_private_bytes(entropy(32))
    request = JoinRequest(
        secret=token.secret,
        tls_key=tls_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        identity_key=key.public_key().public_bytes_raw(),
        name=name,
    )
    reply = _join(token.url, pem, request)
    _check(reply, request, tls_key.public_key(), time.time() if now is None else now)
    identity = Identity(
        fleet=reply.fleet,
        device=reply.device,
        root=reply.root,
        certificate=reply.certificate,
        key=key.private_bytes_raw(),
        url=token.url,
        broker_host=reply.broker_host,
        broker_port=reply.broker_port,
    )
    settle(
        home,
        identity,
        tls_key=key_pem(tls_key),
        tls_certificate=reply.tls_certificate.encode(),
        authority=pem,
    )
    return identity


def settle(
    home: Home, identity: Identity, *, tls_key: bytes, tls_certificate: bytes, authority: bytes
) -> None:
    """Write a home for `identity`, all of it or nothing. The PEMs are those of its TLS. Raises StorageError."""
    home.create()
    written: list[Path] = []
    try:
        for path, data, secret in (
            (home.authority, authority, False),
            (home.certificate, tls_certificate, False),
            (home.key, tls_key, True),
        ):
            written.append(path)
            durable.write_bytes(path, data, secret=secret)
        written.append(home.state)
        Journal(home.state).save(AgentState())
        if not home.policy.exists():
            written.append(home.policy)
            durable.write_bytes(home.policy, policy.TEMPLATE.encode())
        durable.write_bytes(home.identity, msgspec.json.encode(identity), secret=True)
    except FedgeError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _authority(token: JoinToken) -> bytes:
    """The authority's certificate, fetched from anybody and believed for its fingerprint."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    status, pem = _ask(token.url, unverified, "GET", "/v1/authority", b"")
    if status != 200 or fingerprint(pem) != token.authority:
        raise IntegrityError(
            "this is not the hub that the token was made for",
            field="url",
            value=token.url,
            hint="Do not go on. Ask the operator for the right address and a new token",
        )
    return pem


def _join(url: str, pem: bytes, request: JoinRequest) -> JoinReply:
    """The hub gives the same answer to the same request, so a lost answer is asked for again."""
    tls = client_tls(None, pem=pem.decode("ascii"))
    body = msgspec.msgpack.encode(request)
    for attempt in range(_ATTEMPTS):
        try:
            status, answer = _ask(url, tls, "POST", "/v1/join", body)
            break
        except UnavailableError:
            if attempt + 1 == _ATTEMPTS:
                raise
            time.sleep(attempt + 1)
    if status != 200:
        raise _refused(status, answer)
    try:
        return msgspec.msgpack.decode(answer, type=JoinReply)
    except msgspec.MsgspecError as error:
        raise ProtocolError("malformed", "the hub's answer cannot be read", value=str(error)) from error


def _refused(status: int, answer: bytes) -> FedgeError:
    try:
        refusal = msgspec.json.decode(answer, type=_Refusal)
    except msgspec.MsgspecError:
        refusal = _Refusal()
    if status >= 500 or status == 429:
        return UnavailableError(refusal.what, field="status", value=status, hint="Try again in a minute")
    return ProtocolError(
        refusal.error,
        f"the hub refused: {refusal.what}",
        hint="A token is good for one device and a short time: ask the operator for a new one",
    )


def _check(reply: JoinReply, request: JoinRequest, tls_key: ec.EllipticCurvePublicKey, now: float) -> None:
    """Both certificates are for the keys made here; the fleet's own one is signed by the root that came along."""
    mine = Verifier(reply.fleet, reply.root).certificate(reply.certificate, role="device", now=now)
    try:
        leaf = x509.load_pem_x509_certificate(reply.tls_certificate.encode())
    except ValueError as error:
        raise IntegrityError("the hub sent no TLS certificate", field="tls_certificate") from error
    if (
        mine.public_key != request.identity_key
        or leaf.public_key() != tls_key
        or mine.subject != reply.device
    ):
        raise IntegrityError("the hub sent somebody else's certificate", field="device", value=reply.device)


def _ask(url: str, tls: ssl.SSLContext, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    place = urlsplit(url)
    if place.scheme != "https" or not place.hostname:
        raise ProtocolError("bad-token", "the token names no https address", field="url", value=url)
    connection = http.client.HTTPSConnection(place.netloc, context=tls, timeout=_TIMEOUT_SECONDS)
    try:
        with closing(connection):
            connection.request(method, path, body or None)
            answer = connection.getresponse()
            return answer.status, answer.read(_ANSWER_BYTES_MAX)
    except ssl.SSLCertVerificationError as error:
        raise IntegrityError(
            f"the hub's certificate is not for this address: {error.verify_message}",
            field="url",
            value=url,
            hint="The operator names the addresses: fedge hub up --name HOST",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(
            f"no answer from the hub: {error or type(error).__name__}",
            field="url",
            value=url,
            hint="Is the hub up, and can this device reach it?",
        ) from error
