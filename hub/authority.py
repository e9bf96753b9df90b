"""The authority's folder and the hub's own certificates.

`authority/` holds the two roots of `fedge.authority`: `root.key` and `tls.key` (0600), `root.pub`, `authority.pem`,
and `fleet.toml`, written last, so that a half-made authority is none. `own/` holds the hub's identity, its server
certificate and its client certificate for the broker; they are made again whenever a name changes or an end is near,
and no device notices: it trusts the authority. Serial numbers come from entropy.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.authority import Authority, certificate_pem, key_pem, new_authority, p256_key
from fedge.errors import ConfigError, IntegrityError, NoInputError, ProtocolError
from fedge.identity import Signer, Verifier
from fedge.io.durable import make_folder, write_bytes
from fedge.limits import CLOCK_SKEW_SECONDS_MAX

HUB: Final = "hub"  # the hub's name: certificate, topics, access list
CANARY: Final = "canary"  # tries the broker's access list as a device would
VICTIM: Final = "canary-victim"  # in whose name the canary tries to speak; nobody bears it
RESERVED: Final = frozenset({HUB, CANARY, VICTIM})
ALWAYS: Final = ("localhost", "127.0.0.1", "::1")
_DAY: Final = 86_400
_RENEW_BELOW_SECONDS: Final = 120 * _DAY  # certificates live 365 days
_CRL_DAYS: Final = 30  # rewritten daily: a broker refuses everybody once its list is out of date

Entropy = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class TlsPair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class OwnIdentity:
    """What the hub shows to others: to clients of its servers, to the broker, and under its messages."""

    signer: Signer
    server: TlsPair
    client: TlsPair
    canary: TlsPair


def create_authority(home: Path, fleet: str, *, now: float, entropy: Entropy) -> Authority:
    """Makes and keeps a new authority. Raises ConfigError when there is one already, or for a bad fleet name."""
    folder = authority_folder(home)
    if (folder / "fleet.toml").exists():
        raise ConfigError(
            "this hub has an authority already, and every device trusts it",
            field="home",
            value=str(home),
            hint="Start it with `fedge hub up`, or choose another --home",
        )
    if not fleet or len(fleet) > 48 or not fleet.isprintable() or set(fleet) & set('"\\'):
        raise ConfigError("a fleet's name is 1 to 48 printable characters", field="fleet", value=fleet)
    authority = new_authority(fleet, entropy(96), now=now)
    make_folder(home, secret=True)
    make_folder(folder, secret=True)
    write_bytes(folder / "root.key", _ed25519_pem(authority.root), secret=True)
    write_bytes(folder / "tls.key", key_pem(authority.tls_key), secret=True)
    write_bytes(folder / "root.pub", authority.root_public.hex().encode() + b"\n")
    write_bytes(folder / "authority.pem", certificate_pem(authority.tls_certificate))
    write_bytes(folder / "fleet.toml", f'fleet = "{fleet}"\n'.encode())
    return authority


def load_authority(home: Path) -> Authority:
    """The authority in `home`. Raises NoInputError when there is none, IntegrityError when it is damaged."""
    folder = authority_folder(home)
    if not (folder / "fleet.toml").exists():
        raise NoInputError(f"there is no hub in {home}", hint=f"Create it: fedge hub init --home {home}")
    try:
        fleet = str(tomllib.loads((folder / "fleet.toml").read_text("utf-8"))["fleet"])
        root = serialization.load_pem_private_key((folder / "root.key").read_bytes(), None)
        tls_key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder} is damaged: {error}", hint="Restore it from a backup") from error
    if not isinstance(root, Ed25519PrivateKey) or not isinstance(tls_key, ec.EllipticCurvePrivateKey):
        raise IntegrityError(f"{folder} holds keys of another kind", hint="Restore it from a backup")
    if certificate.public_key() != tls_key.public_key():
        raise IntegrityError(f"{folder}: authority.pem and tls.key do not belong together")
    return Authority(fleet, root, tls_key, certificate)


def authority_folder(home: Path) -> Path:
    """Where the roots lie."""
    return home / "authority"


def own_identity(
    home: Path, authority: Authority, names: Sequence[str], *, now: float, entropy: Entropy
) -> OwnIdentity:
    """The hub's identity and certificates, made or renewed as needed. Raises StorageError."""
    folder = make_folder(home / "own", secret=True)
    server_names = tuple(dict.fromkeys((*names, *ALWAYS)))
    return OwnIdentity(
        _signer(folder, authority, now, entropy),
        _pair(folder, "server", HUB, server_names, authority, now, entropy),
        _pair(folder, "client", HUB, (), authority, now, entropy),
        _pair(folder, "canary", CANARY, (), authority, now, entropy),
    )


def write_revocations(path: Path, authority: Authority, serials: Sequence[int], *, now: float) -> None:
    """Writes the X.509 revocation list (RFC 5280 section 5), valid for 30 days. Raises StorageError."""
    start = dt.datetime.fromtimestamp(int(now) - CLOCK_SKEW_SECONDS_MAX, dt.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.tls_certificate.subject)
        .last_update(start)
        .next_update(start + dt.timedelta(days=_CRL_DAYS))
        .add_extension(x509.CRLNumber(int(now * 1_000)), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.tls_key.public_key()), critical=False
        )
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
        builder = builder.add_revoked_certificate(entry)
    signed = builder.sign(authority.tls_key, hashes.SHA256())
    write_bytes(path, signed.public_bytes(serialization.Encoding.PEM))


def new_serial(entropy: Entropy) -> int:
    """A fleet certificate's serial number: 1 to 2^62."""
    return (int.from_bytes(entropy(8), "big") >> 2) or 1


def new_tls_serial(entropy: Entropy) -> int:
    """An X.509 serial number: 127 random bits (RFC 5280 allows 159, CA/B Forum asks for 64)."""
    return (int.from_bytes(entropy(16), "big") >> 1) or 1


def _signer(folder: Path, authority: Authority, now: float, entropy: Entropy) -> Signer:
    key_file, certificate_file = folder / "identity.key", folder / "identity.cert"
    if key_file.exists():
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise IntegrityError(f"{key_file} holds a key of another kind")
    else:
        key = Ed25519PrivateKey.from_private_bytes(entropy(32))
        write_bytes(key_file, _ed25519_pem(key), secret=True)
    public = key.public_key().public_bytes_raw()
    if not certificate_file.exists() or not _identity_lasts(certificate_file, authority, now):
        certificate = authority.certify(HUB, "hub", public, serial=new_serial(entropy), now=now)
        write_bytes(certificate_file, certificate)
    return Signer(key, certificate_file.read_bytes())


def _identity_lasts(path: Path, authority: Authority, now: float) -> bool:
    verifier = Verifier(authority.fleet, authority.root_public)
    try:
        found = verifier.certificate(path.read_bytes(), role="hub", now=now)
    except ProtocolError:  # the hub slept past its end, or the authority is another one: make a new one
        return False
    return found.not_after - now > _RENEW_BELOW_SECONDS


def _pair(
    folder: Path,
    stem: str,
    subject: str,
    names: Sequence[str],
    authority: Authority,
    now: float,
    entropy: Entropy,
) -> TlsPair:
    pair = TlsPair(folder / f"{stem}.pem", folder / f"{stem}.key")
    names_file = folder / f"{stem}.names"
    wanted = "\n".join(names)
    if _pair_lasts(pair, now) and names_file.exists() and names_file.read_text("utf-8") == wanted:
        return pair
    key = p256_key(entropy(48))
    serial = new_tls_serial(entropy)
    leaf = authority.certify_tls(subject, key.public_key(), serial=serial, now=now, names=names)
    names_file.unlink(missing_ok=True)  # while it is away the pair counts as unfinished
    write_bytes(pair.key, key_pem(key), secret=True)
    write_bytes(pair.certificate, leaf + certificate_pem(authority.tls_certificate))
    write_bytes(names_file, wanted.encode())
    return pair


def _pair_lasts(pair: TlsPair, now: float) -> bool:
    if not (pair.certificate.exists() and pair.key.exists()):
        return False
    until = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).not_valid_after_utc
    return until.timestamp() - now > _RENEW_BELOW_SECONDS


def _ed25519_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
