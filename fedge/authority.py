"""The fleet's authority: the two roots that say which devices exist.

An X.509 P-256 authority signs TLS certificates (mTLS to broker and HTTPS; cloud brokers take P-256 and not Ed25519),
strictly by RFC 5280, as Python 3.13 insists. An Ed25519 root signs fleet certificates. The authority may live apart
from the hub; who holds both can invent devices. Pure: entropy and time are arguments.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedge.errors import ConfigError, IntegrityError
from fedge.identity import FleetCertificate, Role, sign_certificate
from fedge.limits import CLOCK_SKEW_SECONDS_MAX

_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True)
class Authority:
    """The fleet's root of trust. `root` signs fleet certificates, `tls_key` signs X.509."""

    fleet: str
    root: Ed25519PrivateKey = field(repr=False)
    tls_key: ec.EllipticCurvePrivateKey = field(repr=False)
    tls_certificate: x509.Certificate

    @property
    def root_public(self) -> bytes:
        """The 32 bytes that every device pins."""
        return self.root.public_key().public_bytes_raw()

    def certify(
        self, subject: str, role: Role, public_key: bytes, *, serial: int, now: float, days: int = 365
    ) -> bytes:
        """A signed fleet certificate, encoded."""
        until = int(now) + days * 86_400
        return sign_certificate(
            FleetCertificate(self.fleet, subject, role, public_key, serial, int(now), until), self.root
        )

    def certify_tls(
        self,
        subject: str,
        public_key: ec.EllipticCurvePublicKey,
        *,
        serial: int,
        now: float,
        names: Sequence[str] = (),
        days: int = 365,
    ) -> bytes:
        """A P-256 leaf certificate (PEM): a client certificate, or a server's when `names` are given."""
        usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
        alternative: list[x509.GeneralName] = [_general_name(name) for name in names] or [
            x509.UniformResourceIdentifier(f"urn:fedge:device:{subject}")
        ]
        issuer = self.tls_certificate
        builder = (
            _builder(subject, issuer.subject, public_key, serial, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.tls_key.public_key()), critical=False
            )
        )
        return builder.sign(self.tls_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_authority(fleet: str, entropy: bytes, *, now: float) -> Authority:
    """A fresh authority from 96 bytes of entropy; valid for ten years."""
    root = Ed25519PrivateKey.from_private_bytes(entropy[:32])
    key = p256_key(entropy[32:80])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} fleet authority")])
    builder = (
        _builder(None, name, key.public_key(), int.from_bytes(entropy[80:95], "big") | 1, now, 3_650, name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
    )
    return Authority(fleet, root, key, builder.sign(key, hashes.SHA256()))


def p256_key(entropy: bytes) -> ec.EllipticCurvePrivateKey:
    """A P-256 key from at least 40 bytes of entropy (bias below 2^-64, FIPS 186-5 A.2.1)."""
    if len(entropy) < 40:
        raise ConfigError("too little entropy for a P-256 key", field="bytes", value=len(entropy))
    return ec.derive_private_key(int.from_bytes(entropy, "big") % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as unencrypted PKCS #8 PEM; the caller keeps it 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM of an X.509 certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(pem: bytes) -> bytes:
    """SHA-256 of a PEM certificate's DER bytes: what a join token pins."""
    try:
        return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())
    except ValueError as error:
        raise IntegrityError("this is not a certificate", field="pem", value=pem[:40]) from error


def _builder(
    subject: str | None,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    serial: int,
    now: float,
    days: int,
    own_name: x509.Name | None = None,
) -> x509.CertificateBuilder:
    name = own_name or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or "")])
    start = dt.datetime.fromtimestamp(int(now) - CLOCK_SKEW_SECONDS_MAX, dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
