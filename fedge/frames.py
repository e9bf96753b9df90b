"""Frames and chunks: how a body larger than one message travels over a link that may cut at any byte.

A frame is `FG`, a format byte, the header's length (u16 big endian), a msgpack header and the raw body. A body is cut
into chunks of `limits.CHUNK_BODY_BYTES`. The receiver answers with the bitmap of what it has; the sender keeps at most
a window in flight and, after any cut, sends only what is missing. Delivery is proved by the hub's durable
acceptance alone: a broker's PUBACK is not delivery. Pure: both ends are told of acknowledgements and time-outs.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from fedge import limits
from fedge.errors import IntegrityError, ProtocolError
from fedge.messages import Hash

_MAGIC: Final = b"FG\x01"
_PREFIX: Final = struct.Struct(">3sH")


class ChunkHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Chunk `index` of the body whose SHA-256 is `digest`, sent under the round `transcript`."""

    transcript: Hash
    digest: Hash
    index: Annotated[int, Meta(ge=0, lt=limits.TRANSFER_CHUNKS_MAX)]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(ChunkHeader)


def encode_frame(header: ChunkHeader, body: bytes | memoryview) -> bytes:
    """One frame, at most `limits.FRAME_BYTES_MAX` bytes."""
    head = _encoder.encode(header)
    frame = b"".join((_PREFIX.pack(_MAGIC, len(head)), head, body))
    assert len(frame) <= limits.FRAME_BYTES_MAX, "a chunk is cut below the frame limit"
    return frame


def decode_frame(data: bytes) -> tuple[ChunkHeader, memoryview]:
    """Header and body (a view, no copy) of a frame; ProtocolError `oversize` or `malformed`."""
    if len(data) > limits.FRAME_BYTES_HARD_MAX:
        raise ProtocolError("oversize", "frame is too large", field="bytes", value=len(data))
    if len(data) < _PREFIX.size or data[:3] != _MAGIC:
        raise ProtocolError("malformed", "this is no frame", field="magic", value=data[:3])
    end = _PREFIX.size + int.from_bytes(data[3:5], "big")
    if end > min(len(data), _PREFIX.size + limits.HEADER_BYTES_MAX):
        raise ProtocolError("malformed", "frame header passes its end", field="header_bytes", value=end)
    try:
        return _decoder.decode(data[_PREFIX.size : end]), memoryview(data)[end:]
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError("malformed", "frame header cannot be read", value=str(error)) from error


def chunk_count(size: int) -> int:
    """How many chunks a body of `size` bytes makes."""
    return -(-size // limits.CHUNK_BODY_BYTES)


def chunk_span(size: int, index: int) -> tuple[int, int]:
    """Offset and length of chunk `index` in a body of `size` bytes."""
    start = index * limits.CHUNK_BODY_BYTES
    return start, min(limits.CHUNK_BODY_BYTES, size - start)


def pack_bitmap(have: set[int], count: int) -> bytes:
    """The chunks one has, least significant bit first."""
    return sum(1 << index for index in have).to_bytes(-(-count // 8), "little")


def unpack_bitmap(bitmap: bytes, count: int) -> set[int]:
    """The chunks named by a bitmap; bits above `count` are ignored."""
    bits = int.from_bytes(bitmap, "little")
    return {index for index in range(count) if bits >> index & 1}


class Outgoing:
    """The sending end of one body: which chunk goes next.

    A chunk in flight is lost only when the answer to a *later* offer lacks it: everything travels in order, so what is
    still queued on a slow line is behind no answer. To send on silence would send it twice.
    """

    def __init__(self, size: int, window: int = limits.CHUNK_WINDOW) -> None:
        self.size, self.window = size, window
        self.missing = set(range(chunk_count(size)))
        self.flying: dict[int, int] = {}  # chunk -> how many offers had been made when it was sent
        self.offers = 0

    def offer(self) -> int:
        """The number of the offer that is made now; its answer names it."""
        self.offers += 1
        return self.offers

    def take(self) -> list[int]:
        """The chunks to send now, in order; they count as in flight."""
        free = self.window - len(self.flying)
        chosen = sorted(self.missing - self.flying.keys())[: max(free, 0)]
        self.flying.update(dict.fromkeys(chosen, self.offers))
        return chosen

    def acknowledge(self, bitmap: bytes, offer: int = 0) -> None:
        """The receiver's bitmap, in answer to `offer` (0: unasked). What it has is neither missing nor in flight.

        It may have lost some since: whatever was sent before that offer and is not here is to be sent again.
        """
        count = chunk_count(self.size)
        have = unpack_bitmap(bitmap, count)
        self.missing = set(range(count)) - have
        self.flying = {
            index: sent for index, sent in self.flying.items() if index not in have and sent >= offer
        }


class Incoming:
    """The receiving end of one body: chunks in any order, any number of times, until the whole is here."""

    def __init__(self, size: int, digest: bytes) -> None:
        if not 1 <= size <= limits.TRANSFER_BYTES_MAX:
            raise ProtocolError("oversize", "announced body is out of range", field="size", value=size)
        self.size, self.digest = size, digest
        self.have: set[int] = set()
        self._buffer = bytearray(size)

    def add(self, index: int, body: bytes | memoryview) -> None:
        """Places a chunk. ProtocolError `bad-chunk` when it does not fit or differs from an earlier copy."""
        if index >= chunk_count(self.size):
            raise ProtocolError("bad-chunk", "chunk past the end", field="index", value=index)
        start, length = chunk_span(self.size, index)
        if len(body) != length:
            raise ProtocolError("bad-chunk", "chunk has the wrong length", field="bytes", value=len(body))
        if index in self.have and bytes(self._buffer[start : start + length]) != bytes(body):
            raise ProtocolError("bad-chunk", "chunk differs from its first copy", field="index", value=index)
        self._buffer[start : start + length] = body
        self.have.add(index)

    @property
    def bitmap(self) -> bytes:
        """What is here."""
        return pack_bitmap(self.have, chunk_count(self.size))

    @property
    def whole(self) -> bool:
        """Whether every chunk is here."""
        return len(self.have) == chunk_count(self.size)

    def body(self) -> bytes:
        """The verified body; IntegrityError when its hash is not the announced one."""
        data = bytes(self._buffer)
        if hashlib.sha256(data).digest() != self.digest:
            raise IntegrityError(
                "body does not have the announced hash", field="sha256", value=self.digest.hex()
            )
        return data
