"""The X.509 side, held to RFC 5280 by OpenSSL's strict checks in real TLS handshakes, in memory."""

import datetime as dt
import random
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from fedge.authority import Authority, certificate_pem, fingerprint, key_pem, new_authority, p256_key
from fedge.errors import ConfigError, IntegrityError
from fedge.identity import Verifier
from fedge.limits import CLOCK_SKEW_SECONDS_MAX

NOW = time.time()  # OpenSSL looks at the wall clock
NAMES = ("localhost", "127.0.0.1", "::1")
ROOT, OTHER = (new_authority("test", random.Random(seed).randbytes(96), now=NOW) for seed in (1, 2))
CLIENT, SERVER = ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER


def context(
    folder: Path,
    side: ssl._SSLMethod,
    subject: str,
    names: tuple[str, ...] = (),
    *,
    root: Authority = ROOT,
    trusts: Authority = ROOT,
    now: float = NOW,
    days: int = 365,
) -> ssl.SSLContext:
    """One end with its own key and certificate, as strict as OpenSSL can be."""
    key = p256_key(random.Random(subject).randbytes(48))
    leaf = root.certify_tls(subject, key.public_key(), serial=77, now=now, names=names, days=days)
    path = folder / f"{subject}.pem"
    path.write_bytes(leaf + key_pem(key))
    found = ssl.SSLContext(side)
    found.verify_mode = ssl.CERT_REQUIRED
    found.verify_flags |= ssl.VERIFY_X509_STRICT
    found.load_verify_locations(cadata=certificate_pem(trusts.tls_certificate).decode())
    found.load_cert_chain(path)
    return found


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> dict[str, object]:
    """A whole TLS handshake over two pairs of memory buffers; the client's certificate as the server saw it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for turn in range(20):
        try:
            ends[turn % 2].do_handshake()
        except ssl.SSLWantReadError:
            continue
        if turn % 2:
            return ends[1].getpeercert() or {}
    raise AssertionError("the handshake does not end")


# ---------------------------------------------------------------- handshakes
@pytest.mark.parametrize("name", NAMES)
def test_both_ends_shake_hands_under_strict_rules(tmp_path: Path, name: str) -> None:
    seen = shake_hands(context(tmp_path, CLIENT, "d00"), context(tmp_path, SERVER, "hub", NAMES), name)
    assert seen["subject"] == ((("commonName", "d00"),),)
    assert seen["subjectAltName"] == (("URI", "urn:fedge:device:d00"),)


@pytest.mark.parametrize("name", ["example.org", "127.0.0.2", "d00"])
def test_another_name_than_the_servers(tmp_path: Path, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(context(tmp_path, CLIENT, "d00"), context(tmp_path, SERVER, "hub", NAMES), name)


def test_a_server_of_another_fleet(tmp_path: Path) -> None:
    """The other fleet has the same name, so only the key tells them apart."""
    server = context(tmp_path, SERVER, "hub", NAMES, root=OTHER)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context(tmp_path, CLIENT, "d00"), server, "localhost")


def test_a_client_of_another_fleet(tmp_path: Path) -> None:
    client = context(tmp_path, CLIENT, "d00", root=OTHER)
    with pytest.raises(ssl.SSLError, match=r"(?i)verify.failed|unknown.ca"):
        shake_hands(client, context(tmp_path, SERVER, "hub", NAMES), "localhost")


def test_a_device_cannot_pose_as_the_server(tmp_path: Path) -> None:
    server = context(tmp_path, SERVER, "d00")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(context(tmp_path, CLIENT, "d01"), server, "localhost")


def test_expired_and_not_yet_valid(tmp_path: Path) -> None:
    for now, word in ((NOW - 400 * 86_400, "expired"), (NOW + 2 * 86_400, "not yet valid")):
        server = context(tmp_path, SERVER, "hub", NAMES, now=now)
        with pytest.raises(ssl.SSLCertVerificationError, match=word):
            shake_hands(context(tmp_path, CLIENT, "d00"), server, "localhost")


def test_a_clock_that_is_a_little_behind_is_forgiven(tmp_path: Path) -> None:
    server = context(tmp_path, SERVER, "hub", NAMES, now=NOW + CLOCK_SKEW_SECONDS_MAX - 60)
    shake_hands(context(tmp_path, CLIENT, "d00"), server, "localhost")


# ---------------------------------------------------------------- what stands in the certificates
def test_the_authority_signs_leaves_only() -> None:
    extensions = ROOT.tls_certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)


def test_a_leaf_signs_nothing_and_names_its_issuers_key() -> None:
    key = p256_key(bytes(range(48)))
    leaf = x509.load_pem_x509_certificate(ROOT.certify_tls("d00", key.public_key(), serial=5, now=NOW))
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    own = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    root = ROOT.tls_certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert own == root.key_identifier
    assert leaf.serial_number == 5
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == dt.timedelta(days=365)


# ---------------------------------------------------------------- keys, fingerprints, the other root
def test_the_same_entropy_is_the_same_authority() -> None:
    again = new_authority("test", random.Random(1).randbytes(96), now=NOW)
    assert again.root_public == ROOT.root_public
    assert key_pem(again.tls_key) == key_pem(ROOT.tls_key)
    assert again.root_public != OTHER.root_public


def test_p256_keys_need_entropy_and_stay_in_range() -> None:
    with pytest.raises(ConfigError):
        p256_key(bytes(39))
    assert p256_key(bytes(40)).private_numbers().private_value == 1
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    assert p256_key((order - 2).to_bytes(40, "big")).private_numbers().private_value == order - 1
    assert p256_key((order - 1).to_bytes(40, "big")).private_numbers().private_value == 1


def test_a_fingerprint_is_of_the_certificate_and_not_of_its_text() -> None:
    pem = certificate_pem(ROOT.tls_certificate)
    assert fingerprint(pem) == fingerprint(b"# a comment\n" + pem)
    assert fingerprint(pem) != fingerprint(certificate_pem(OTHER.tls_certificate))
    with pytest.raises(IntegrityError):
        fingerprint(b"no certificate")


def test_a_fleet_certificate_holds_for_its_days() -> None:
    data = ROOT.certify("d00", "device", bytes(32), serial=3, now=NOW, days=2)
    found = Verifier("test", ROOT.root_public).certificate(data, role="device", now=NOW + 2 * 86_400 - 1)
    assert (found.subject, found.serial, found.not_after) == ("d00", 3, int(NOW) + 2 * 86_400)
