"""What a bad link, broker or hub does to one message: altered, forged, old or doubled. Pure; nothing here decides when.

The rule: whatever is made here must be refused by the shipped machines, by name, or be harmless. An altered body keeps
its signature (broken signature), a foreign one carries another member's certificate, a second OPEN is signed by the
hub itself and differs from the first.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fedge.identity import Signer
from fedge.messages import Open, decode, decode_envelope, encode
from firmware_sim.world.streams import Stream

_TAG: Final = b"\xa4type"  # msgpack: the first key of every message
_HEAD_BYTES: Final = 40
FRAME_MAGIC: Final = b"FG"


def tag(payload: bytes) -> str:
    """The kind of message in an envelope (or bare), without decoding it; `chunk` for a frame; empty if unreadable."""
    if payload[:2] == FRAME_MAGIC:
        return "chunk"
    at = payload.find(_TAG, 0, _HEAD_BYTES)
    if at < 0:
        return ""
    start = at + len(_TAG) + 1
    return payload[start : start + (payload[start - 1] & 0x1F)].decode("ascii", "replace")


def flip_bit(data: bytes, draw: Stream, first: int = 0) -> bytes:
    """`data` with one bit changed, at or after byte `first`."""
    if len(data) <= first:
        return data
    changed = bytearray(data)
    changed[first + draw.integer(len(data) - first)] ^= 1 << draw.integer(8)
    return bytes(changed)


def forged_envelope(payload: bytes, foreign: bytes, draw: Stream) -> bytes:
    """An envelope whose body was changed under its signature, or that carries the certificate of `foreign`."""
    envelope = decode_envelope(payload)
    if foreign and draw.chance(0.5):
        certificate = decode_envelope(foreign).certificate
        return encode(msgspec.structs.replace(envelope, certificate=certificate))
    return encode(msgspec.structs.replace(envelope, body=flip_bit(envelope.body, draw)))


def forged_report(payload: bytes, draw: Stream) -> bytes:
    """A frame with a bit of its body changed, or a device's envelope with one of its own."""
    if tag(payload) == "chunk":
        return flip_bit(payload, draw, first=len(payload) // 2)  # past the header: what is summed
    return forged_envelope(payload, b"", draw)


def second_open(payload: bytes, signer: Signer, draw: Stream) -> bytes:
    """Another OPEN for the same bloc, validly signed by its hub: one more round number, other rounding of the sums."""
    opening = decode(decode_envelope(payload).body, Open)
    codec = msgspec.structs.replace(opening.codec, seed=draw.bytes(16))
    return signer.seal(msgspec.structs.replace(opening, round=opening.round + draw.integer(2), codec=codec))
