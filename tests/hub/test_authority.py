"""The authority's folder: made once, kept secret, strict by RFC 5280; the hub's certificates follow its names."""

from __future__ import annotations

import os
import ssl
import stat
import time
from pathlib import Path

import pytest
from conftest import Fleet
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import ConfigError, IntegrityError, NoInputError
from fedge.identity import Verifier
from fedge.io.tls import client_tls
from fedge.messages import HubState
from hub.authority import (
    authority_folder,
    create_authority,
    load_authority,
    new_serial,
    new_tls_serial,
    own_identity,
)
from hub.tls import server_tls

YEAR = 365 * 86_400


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_it_comes_back_as_made(fleet: Fleet) -> None:
    again = load_authority(fleet.home)
    assert again.fleet == "lab"
    assert again.root_public == fleet.authority.root_public
    assert again.tls_certificate == fleet.authority.tls_certificate
    assert (authority_folder(fleet.home) / "root.pub").read_text().strip() == again.root_public.hex()


def test_keys_are_for_the_owner_alone(fleet: Fleet) -> None:
    for key in fleet.home.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key
    for folder in (fleet.home, authority_folder(fleet.home), fleet.home / "own"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    assert "PRIVATE" not in repr(fleet.authority)


def test_a_second_authority_is_refused(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="already"):
        create_authority(fleet.home, "lab", now=time.time(), entropy=os.urandom)


def test_a_half_made_authority_is_none(fleet: Fleet) -> None:
    (authority_folder(fleet.home) / "fleet.toml").unlink()
    with pytest.raises(NoInputError, match="no hub"):
        load_authority(fleet.home)
    create_authority(fleet.home, "lab", now=time.time(), entropy=os.urandom)


@pytest.mark.parametrize("name", ["tls.key", "root.key", "authority.pem", "fleet.toml"])
def test_damage_is_named(fleet: Fleet, name: str) -> None:
    (authority_folder(fleet.home) / name).write_bytes(b"garbage")
    with pytest.raises(IntegrityError, match="damaged"):
        load_authority(fleet.home)


def test_parts_of_two_authorities_do_not_mix(fleet: Fleet, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", "lab", now=time.time(), entropy=os.urandom)
    foreign = (authority_folder(tmp_path / "other") / "tls.key").read_bytes()
    (authority_folder(fleet.home) / "tls.key").write_bytes(foreign)
    with pytest.raises(IntegrityError, match="belong together"):
        load_authority(fleet.home)


@pytest.mark.parametrize("name", ["", "x" * 49, 'a"b', "a\nb"])
def test_bad_fleet_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        create_authority(tmp_path / "home", name, now=time.time(), entropy=os.urandom)
    assert not (tmp_path / "home").exists()


def test_the_server_certificate_follows_the_names(fleet: Fleet) -> None:
    before = certificate(fleet.own.server.certificate)
    same = own_identity(fleet.home, fleet.authority, ("hub.example",), now=time.time(), entropy=os.urandom)
    assert certificate(same.server.certificate) == before
    own_identity(
        fleet.home, fleet.authority, ("moved.example", "10.0.0.7"), now=time.time(), entropy=os.urandom
    )
    after = certificate(fleet.own.server.certificate)
    names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["moved.example", "localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1", "::1"]
    assert after.serial_number != before.serial_number


def test_certificates_are_renewed_before_their_end_and_the_identity_stays(fleet: Fleet) -> None:
    later = time.time() + 0.8 * YEAR
    renewed = own_identity(fleet.home, fleet.authority, ("hub.example",), now=later, entropy=os.urandom)
    for pair in (renewed.server, renewed.client, renewed.canary):
        assert certificate(pair.certificate).not_valid_after_utc.timestamp() > later + 0.5 * YEAR
    assert renewed.signer.key.private_bytes_raw() == fleet.own.signer.key.private_bytes_raw()
    verifier = Verifier("lab", fleet.authority.root_public)
    sealed = renewed.signer.seal(HubState(hub="hub", up=True, epoch=1))
    assert verifier.open(sealed, HubState, role="hub", now=later + 0.5 * YEAR).subject == "hub"


def test_a_hub_that_slept_past_the_end_of_its_certificates(fleet: Fleet) -> None:
    later = time.time() + 1.5 * YEAR
    woken = own_identity(fleet.home, fleet.authority, ("hub.example",), now=later, entropy=os.urandom)
    sealed = woken.signer.seal(HubState(hub="hub", up=True, epoch=1))
    Verifier("lab", fleet.authority.root_public).open(sealed, HubState, role="hub", now=later)


def test_every_certificate_has_what_strict_verifiers_ask_for(fleet: Fleet) -> None:
    authority = fleet.authority.tls_certificate
    leaves = [
        certificate(pair.certificate) for pair in (fleet.own.server, fleet.own.client, fleet.device("d-1"))
    ]
    for one in (authority, *leaves):
        basic = one.extensions.get_extension_for_class(x509.BasicConstraints)
        assert basic.critical
        assert basic.value.ca is (one is authority)
        assert one.extensions.get_extension_for_class(x509.KeyUsage).critical
        one.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    for one in leaves:
        one.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
        one.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        one.verify_directly_issued_by(authority)


def test_the_revocation_list(fleet: Fleet) -> None:
    fleet.device("d-1")
    fleet.revoke("d-1")
    listed = x509.load_pem_x509_crl(fleet.crl.read_bytes())
    key = fleet.authority.tls_key.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert listed.is_signature_valid(key)
    assert [one.serial_number for one in listed] == [fleet.serials["d-1"]]
    assert listed.next_update_utc is not None
    assert listed.next_update_utc.timestamp() > time.time() + 29 * 86_400


def test_serial_numbers_stay_in_range() -> None:
    for pattern in (b"\x00", b"\xff"):
        assert 1 <= new_serial(lambda n, one=pattern: one * n) <= 2**62
        assert 1 <= new_tls_serial(lambda n, one=pattern: one * n) < 2**127
    assert new_tls_serial(os.urandom) != new_tls_serial(os.urandom)


def test_every_context_of_ours_is_strict(fleet: Fleet) -> None:
    device = fleet.device("d-1")
    contexts = [
        server_tls(fleet.own.server),
        server_tls(fleet.own.server, clients=fleet.pem),
        client_tls(fleet.pem),
        client_tls(fleet.pem, device.certificate, device.key),
    ]
    for context in contexts:
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert contexts[1].verify_mode == contexts[2].verify_mode == ssl.CERT_REQUIRED
