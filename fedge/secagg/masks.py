"""Pairwise masks of a bloc: noise in every report, nothing in the sum of all of them.

Devices i < j of a bloc share an edge key
    e_ij = HKDF-SHA256(X25519(xk_i, XK_j), salt = h, info = "fedge edge v1" || cipher)
(RFC 7748, RFC 5869). The device with the lower roster position adds the keystream of e_ij to its words, the other
subtracts it (Bonawitz et al. 2017, section 4). The transcript hash h binds every key to one OPEN: a second OPEN with
the same prekeys gives unrelated masks, which cancel against nothing. No edge key ever leaves its two devices, so
there is nothing that a hub could ask for to open less than the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from fedge.errors import ProtocolError
from fedge.secagg.agreement import AGREEMENT as AGREEMENT
from fedge.secagg.agreement import Agreement as Agreement
from fedge.secagg.keystream import PIECE_BYTES, SPARE_BYTES, Keystream, StreamCipher
from fedge.secagg.ring import MetadataWords, Words


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What masks need to know of a roster's entry: its X25519 prekey (32 bytes), whether it has AES instructions."""

    prekey: bytes
    aes: bool


class Edge(msgspec.Struct, frozen=True):
    """The stream shared with one other member, and the sign with which this device applies it."""

    adds: bool
    stream: Keystream


def edge_cipher(one: Member, other: Member) -> StreamCipher:
    """AES only where both ends have instructions for it; an edge is as slow as its slower end."""
    return StreamCipher.AES_128_CTR if one.aes and other.aes else StreamCipher.CHACHA20


def open_edges(
    h: bytes,
    position: int,
    roster: Sequence[Member],
    prekey_secret: bytes,
    agreement: Agreement = AGREEMENT,
) -> list[Edge]:
    """The edges of the device at `position`, to every other member. A stream serves one report and is then spent.

    Raises ProtocolError when a prekey occurs twice (a clone would cancel masks inside a part of the bloc) or the
    roster does not hold this device's own prekey at `position`.
    """
    if len(h) != 32:
        raise ValueError(f"transcript hash has {len(h)} bytes, not 32")
    _check_roster(roster, position, agreement.public(prekey_secret))
    return list(_edges(h, position, roster, prekey_secret, agreement))


def mask_in_place(words: Words, metadata: MetadataWords, edges: Sequence[Edge]) -> None:
    """Apply every edge's stream to `words` and, where it goes on, to `metadata`. Needs one block of memory."""
    buffer = bytearray(min(PIECE_BYTES, max(words.nbytes, metadata.nbytes)) + SPARE_BYTES)
    for target in (words, metadata):
        numbers = PIECE_BYTES // target.itemsize
        for start in range(0, target.size, numbers):
            piece = target[start : start + numbers]
            kind, count, size = target.dtype, piece.size, piece.nbytes
            for edge in edges:  # inside: the piece stays in cache while all streams pass over it
                noise = np.frombuffer(edge.stream.read(buffer, size), kind, count)
                (np.add if edge.adds else np.subtract)(piece, noise, out=piece)


def _check_roster(roster: Sequence[Member], position: int, own: bytes) -> None:
    if len({member.prekey for member in roster}) != len(roster):
        raise ProtocolError("cloned-member", "one prekey stands twice in the roster", field="roster")
    if not 0 <= position < len(roster) or roster[position].prekey != own:
        raise ProtocolError(
            "not-my-place", "roster does not hold our prekey at our place", field="position", value=position
        )


def _edges(
    h: bytes, position: int, roster: Sequence[Member], secret: bytes, agreement: Agreement
) -> Iterator[Edge]:
    own = roster[position]
    for other_position, other in enumerate(roster):
        if other_position != position:
            cipher = edge_cipher(own, other)
            key = agreement.edge_key(h, secret, other.prekey, cipher)
            yield Edge(adds=other_position > position, stream=agreement.stream(cipher, key))
