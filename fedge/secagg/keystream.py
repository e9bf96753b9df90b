"""Two stream ciphers behind one face. A key makes one stream, which is read once, from the front.

AES-128-CTR (NIST SP 800-38A, 6.5) is the faster where the processor has AES instructions; ChaCha20 (RFC 8439)
is several times faster, and free of table look-ups, where it has none. Every key is fresh, so the starting
counter block is zero unless a public constant keeps two uses of one seed apart.
"""

from __future__ import annotations

import enum
from typing import Final

from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.ciphers import algorithms, modes

PIECE_BYTES: Final = 262_144  # fits second-level caches; AES-CTR runs at its best from 128 KB
SPARE_BYTES: Final = 15  # older `cryptography` wants room for one more block, less a byte
_ZEROS: Final = memoryview(bytes(PIECE_BYTES))
_FROM_ZERO: Final = bytes(16)


class StreamCipher(enum.Enum):
    """The value is the name that enters key derivation, so both ends must mean the same cipher."""

    AES_128_CTR = b"aes-128-ctr"
    CHACHA20 = b"chacha20"

    @property
    def key_bytes(self) -> int:
        return 16 if self is StreamCipher.AES_128_CTR else 32


class Keystream:
    """The stream of `key` (16 bytes for AES, 32 for ChaCha20) from the 16-byte counter block `start` on."""

    __slots__ = ("_encryptor",)

    def __init__(self, cipher: StreamCipher, key: bytes, start: bytes = _FROM_ZERO) -> None:
        if len(key) != cipher.key_bytes:
            raise ValueError(f"{cipher.name} wants {cipher.key_bytes} key bytes, not {len(key)}")
        if cipher is StreamCipher.AES_128_CTR:
            self._encryptor = ciphers.Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()
        else:
            self._encryptor = ciphers.Cipher(algorithms.ChaCha20(key, start), mode=None).encryptor()

    def read(self, buffer: bytearray, count: int) -> bytes | bytearray | memoryview:
        """An object that begins with the next `count` bytes, at most PIECE_BYTES, good until `buffer` is used again.

        `buffer` has SPARE_BYTES more, and is where they are put unless they lie somewhere already.
        """
        self._encryptor.update_into(_ZEROS[:count], buffer)
        return buffer

    def take(self, count: int) -> bytes:
        """The next `count` bytes as a new object."""
        return self._encryptor.update(bytes(count))
