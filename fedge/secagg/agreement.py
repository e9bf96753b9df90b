"""How two devices come to one key: X25519, then HKDF bound to the round. No numpy: the waiting agent makes prekeys.

Apart from the masks so that a simulation of a hundred thousand devices may pass a cheaper agreement to the same
machines; what is built on the keys stays as it is.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedge.errors import ProtocolError
from fedge.secagg.keystream import Keystream, StreamCipher

_EDGE: Final = b"fedge edge v1"


class Agreement:
    """X25519 (RFC 7748), and HKDF-SHA256 (RFC 5869) to an edge's key. A simulation may pass a cheaper one."""

    def public(self, secret: bytes) -> bytes:
        """The 32-byte prekey of a 32-byte secret."""
        return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()

    def edge_key(self, h: bytes, secret: bytes, other: bytes, cipher: StreamCipher) -> bytes:
        """e_ij for the 32-byte transcript hash `h`; ProtocolError if `other` is no usable public key."""
        try:
            shared = X25519PrivateKey.from_private_bytes(secret).exchange(
                X25519PublicKey.from_public_bytes(other)
            )
        except ValueError as error:  # wrong length, or a point of low order, which would give a known secret
            raise ProtocolError(
                "bad-prekey", "prekey cannot be used", field="prekey", value=other.hex()
            ) from error
        return HKDF(hashes.SHA256(), cipher.key_bytes, salt=h, info=_EDGE + cipher.value).derive(shared)

    def stream(self, cipher: StreamCipher, key: bytes) -> Keystream:
        """The stream of an edge's key."""
        return Keystream(cipher, key)


AGREEMENT: Final = Agreement()
