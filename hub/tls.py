"""TLS of the server's side, for HTTPS and the embedded broker: strict by RFC 5280, nothing below TLS 1.2."""

from __future__ import annotations

import ssl
from pathlib import Path

from fedge.errors import IntegrityError
from hub.authority import TlsPair


def server_tls(pair: TlsPair, *, clients: Path | None = None) -> ssl.SSLContext:
    """A server's context; with `clients` (the authority's PEM file) every client must show its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_cert_chain(pair.certificate, pair.key)
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        raise IntegrityError(
            f"the hub's certificate cannot be used: {error}",
            field="path",
            value=str(pair.certificate),
            hint=f"Remove the folder {pair.certificate.parent}; it is made again at the next start",
        ) from error
    return context
