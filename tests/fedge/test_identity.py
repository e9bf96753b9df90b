"""Fleet certificates and signed envelopes: what is believed, and everything that is not, by name."""

import dataclasses

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import ProtocolError
from fedge.identity import FleetCertificate, Role, SignedCertificate, Signer, Verifier, sign_certificate
from fedge.limits import CLOCK_SKEW_SECONDS_MAX
from fedge.messages import Envelope, HubState, Presence, decode_envelope, encode

NOW, DAY = 1_800_000_000, 86_400
ROOT, OTHER_ROOT, KEY, OTHER_KEY = (
    Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in range(1, 5)
)
VERIFIER = Verifier("test", ROOT.public_key().public_bytes_raw(), frozenset({99}))
MESSAGE = Presence(device="d00", up=True, boot=1)


def certificate(root: Ed25519PrivateKey = ROOT, **changes: object) -> bytes:
    honest = FleetCertificate("test", "d00", "device", KEY.public_key().public_bytes_raw(), 7, NOW, NOW + DAY)
    return sign_certificate(msgspec.structs.replace(honest, **changes), root)


def refused(
    name: str, data: bytes, *, now: float = NOW, role: Role = "device", kind: type = Presence
) -> None:
    with pytest.raises(ProtocolError) as refusal:
        VERIFIER.open(data, kind, role=role, now=now)
    assert refusal.value.name == name


SEALED = Signer(KEY, certificate()).seal(MESSAGE)


def test_what_is_believed() -> None:
    opened = VERIFIER.open(SEALED, Presence, role="device", now=NOW)
    assert (opened.message, opened.subject, opened.body) == (MESSAGE, "d00", encode(MESSAGE))


def test_a_certificate_outside_its_time() -> None:
    VERIFIER.open(SEALED, Presence, role="device", now=NOW - CLOCK_SKEW_SECONDS_MAX)
    VERIFIER.open(SEALED, Presence, role="device", now=NOW + DAY)
    refused("expired", SEALED, now=NOW - CLOCK_SKEW_SECONDS_MAX - 1)
    refused("expired", SEALED, now=NOW + DAY + 1)


def test_another_fleet_another_root_a_wrong_role_and_a_revoked_one() -> None:
    refused("bad-certificate", Signer(KEY, certificate(fleet="other")).seal(MESSAGE))
    refused("bad-certificate", Signer(KEY, certificate(OTHER_ROOT)).seal(MESSAGE))
    refused("wrong-role", Signer(KEY, certificate(role="hub")).seal(MESSAGE))
    refused("wrong-role", SEALED, role="hub")
    refused("wrong-role", SEALED, role="publisher")
    refused("revoked", Signer(KEY, certificate(serial=99)).seal(MESSAGE))


def test_another_key_than_the_certificates() -> None:
    refused("bad-signature", Signer(OTHER_KEY, certificate()).seal(MESSAGE))


@pytest.mark.parametrize("place", range(0, len(SEALED), 3))
def test_a_changed_bit_anywhere_is_noticed(place: int) -> None:
    data = bytearray(SEALED)
    data[place] ^= 1
    with pytest.raises(ProtocolError) as refusal:
        VERIFIER.open(bytes(data), Presence, role="device", now=NOW)
    assert refusal.value.name in {"malformed", "bad-certificate", "bad-signature"}


def test_a_certificate_and_a_message_are_signed_in_different_domains() -> None:
    """A root's or device's signature over the one never passes for the other."""
    body = encode(MESSAGE)
    plain = Envelope(body, certificate(), KEY.sign(body))
    as_certificate = Envelope(body, certificate(), KEY.sign(b"fedge fleet certificate v1\x00" + body))
    refused("bad-signature", encode(plain))
    refused("bad-signature", encode(as_certificate))
    inner = msgspec.msgpack.decode(certificate(), type=SignedCertificate).body
    forged = msgspec.msgpack.encode(SignedCertificate(inner, ROOT.sign(b"fedge message v1\x00" + inner)))
    refused("bad-certificate", Signer(KEY, forged).seal(MESSAGE))


def test_a_device_is_no_authority() -> None:
    """A device certifies another with its own key: two links of a chain where one is allowed."""
    refused("bad-certificate", Signer(OTHER_KEY, certificate(KEY)).seal(MESSAGE))


def test_a_genuine_message_of_another_kind() -> None:
    refused("unexpected", SEALED, kind=HubState)


def test_the_body_decides_nothing_before_its_signature() -> None:
    """Forged and unreadable: the forgery is what is named."""
    broken = decode_envelope(SEALED)
    refused("bad-signature", encode(msgspec.structs.replace(broken, body=b"\xc1")))


@pytest.mark.parametrize(
    "changes",
    [{"subject": "Upper"}, {"subject": ""}, {"serial": 0}, {"role": "root"}, {"public_key": b"short"}],
)
def test_nobody_signs_a_certificate_past_the_limits(changes: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        certificate(**changes)


def test_a_verifier_hears_of_revocations_while_it_runs() -> None:
    revoked: set[int] = set()
    verifier = dataclasses.replace(VERIFIER, revoked=revoked)
    verifier.open(SEALED, Presence, role="device", now=NOW)
    revoked.add(7)
    with pytest.raises(ProtocolError, match="revoked"):
        verifier.open(SEALED, Presence, role="device", now=NOW)
