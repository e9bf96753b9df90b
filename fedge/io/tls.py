"""TLS of the client's side, to broker and HTTPS server alike: the fleet's authority is the only one believed.

RFC 5280 is applied strictly (as Python 3.13 does by default), the host name is checked, and nothing below TLS 1.2 is
spoken. There is no switch that turns a check off.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from fedge.errors import IntegrityError, NoInputError


def client_tls(
    authority: Path | None, certificate: Path | None = None, key: Path | None = None, *, pem: str = ""
) -> ssl.SSLContext:
    """A context that trusts `authority` (a PEM file, or `pem` itself) and shows `certificate`, if one is given.

    Raises NoInputError when a file is missing, IntegrityError when one holds no certificate or the wrong key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        if authority is not None and not pem:
            pem = authority.read_text("ascii")
        context.load_verify_locations(cadata=pem)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except FileNotFoundError as error:
        missing = error.filename or f"{certificate} or {key}"
        raise NoInputError("no TLS certificate here", field="path", value=str(missing)) from error
    except (ssl.SSLError, ValueError) as error:
        raise IntegrityError(
            f"TLS files do not fit together: {error}",
            field="path",
            value=str(certificate or authority),
            hint="join the fleet again to get new ones",
        ) from error
    return context
