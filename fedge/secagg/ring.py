"""The ring Z_2^b that updates are summed in, and how words lie in a report's body.

Body = words of `bits` bits || metadata words of 32 bits, all little endian (as is every processor that
ONNX Runtime ships for). Both are residues; addition wraps and nothing else ever happens to them between a device
and an opened sum, so the sum is exact in any order of arrival.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fedge.errors import ConfigError
from fedge.limits import ADAPTER_NUMBERS_MAX, META_WORDS_MAX, RING_BITS

Words = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
MetadataWords = npt.NDArray[np.uint32]
Residues = Words | MetadataWords
_WORDS_MAX: Final = ADAPTER_NUMBERS_MAX + 1024  # a vector padded to whole Hadamard blocks


def zero_words(count: int, bits: int) -> Words:
    """`count` words of zero, of the numpy type for words of `bits` bits."""
    return np.zeros(count, np.uint8) if bits == 8 else np.zeros(count, np.uint16)


def add_words(total: Residues, words: Residues) -> None:
    """total += words mod 2^b, in place. Both have one length and one width."""
    if total.dtype != words.dtype or total.shape != words.shape:
        raise ValueError(f"cannot add {words.dtype}{words.shape} to {total.dtype}{total.shape}")
    np.add(total, words, out=total)


class BodyLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape of a report's body: `words` words of `bits` bits, then `metadata_words` words of 32 bits."""

    bits: int
    words: int
    metadata_words: int

    def __post_init__(self) -> None:
        if self.bits not in RING_BITS:
            raise ConfigError("word width is not allowed", field="bits", value=self.bits)
        if not 0 < self.words <= _WORDS_MAX:
            raise ConfigError("number of words is out of range", field="words", value=self.words)
        if not 0 < self.metadata_words <= META_WORDS_MAX:
            raise ConfigError(
                "number of metadata words is out of range", field="metadata_words", value=self.metadata_words
            )

    @property
    def size(self) -> int:
        """Bytes of a body."""
        return self.words * self.bits // 8 + self.metadata_words * 4

    def views(self, body: bytes | bytearray) -> tuple[Words, MetadataWords]:
        """The words and the metadata words of `body`, without a copy; writable if `body` is."""
        if len(body) != self.size:
            raise ValueError(f"body has {len(body)} bytes, its layout says {self.size}")
        words = memoryview(body)[: -4 * self.metadata_words]
        metadata = np.frombuffer(body, np.uint32, offset=len(words))
        if self.bits == 8:
            return np.frombuffer(words, np.uint8), metadata
        return np.frombuffer(words, np.uint16), metadata
