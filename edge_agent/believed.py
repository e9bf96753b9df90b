"""What saved envelopes say. They were verified before they were saved; here they are only read, and read once.

A simulation holds a hundred thousand agents that share one announcement, and eight that share one bloc card and one
OPEN: each envelope is decoded once for all of them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from fedge.messages import Announcement, BlocCard, Open, Ready, decode, decode_envelope


@lru_cache(maxsize=16)
def campaign_in(envelope: bytes) -> Announcement:
    """The campaign that a saved announcement tells of."""
    return decode(decode_envelope(envelope).body, Announcement)


@lru_cache(maxsize=64)
def card_in(envelope: bytes) -> tuple[BlocCard, bytes]:
    """The bloc that a saved card pins, and the SHA-256 by which an OPEN names it."""
    body = decode_envelope(envelope).body
    return decode(body, BlocCard), hashlib.sha256(body).digest()


@lru_cache(maxsize=64)
def open_in(envelope: bytes) -> tuple[Open, bytes]:
    """The OPEN of the running round, and its transcript hash."""
    body = decode_envelope(envelope).body
    return decode(body, Open), hashlib.sha256(body).digest()


def ready_in(envelope: bytes) -> Ready:
    """A READY, ours or another member's. Every device has its own: nothing is kept."""
    return decode(decode_envelope(envelope).body, Ready)


@lru_cache(maxsize=64)
def mask_roster_in(envelope: bytes) -> tuple[tuple[bytes, bool], ...]:
    """(prekey, has AES instructions) of every member by position; `checks.roster` has verified the OPEN's READYs."""
    readys = map(ready_in, open_in(envelope)[0].roster)
    return tuple((ready.prekey, ready.facts.aes) for ready in readys)
