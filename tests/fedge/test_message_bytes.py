"""No bytes do anything to a reader but decode or raise ProtocolError, before anything is allocated."""

import contextlib
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_messages import NOW, ROOT, vectors

from fedge.errors import ProtocolError
from fedge.frames import decode_frame
from fedge.identity import Verifier
from fedge.joining import JoinToken
from fedge.messages import Open, Ready, decode, decode_envelope, kind_in

VERIFIER = Verifier("test", ROOT.public_key().public_bytes_raw())
SEEDS = [bytes.fromhex(text) for text in vectors().values()]
READERS: dict[str, Callable[[bytes], object]] = {
    "message": lambda data: decode(data, Open),
    "envelope": decode_envelope,
    "kind": lambda data: kind_in(data, {"open": Open}),
    "certificate": lambda data: VERIFIER.certificate(data, role="device", now=NOW),
    "signed message": lambda data: VERIFIER.open(data, Ready, role="device", now=NOW),
    "frame": decode_frame,
    "token": lambda data: JoinToken.parse(data.decode("latin-1")),
}


def read(reader: str, data: bytes) -> None:
    """Decodes, or raises ProtocolError; anything else fails the test."""
    with contextlib.suppress(ProtocolError):
        READERS[reader](data)


@pytest.mark.parametrize("reader", READERS)
@given(data=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_decode_or_are_refused(reader: str, data: bytes) -> None:
    read(reader, data)


@pytest.mark.parametrize("reader", READERS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_genuine_bytes_with_a_few_wrong_decode_or_are_refused(reader: str, seed: int) -> None:
    chance = random.Random(seed)
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(data) + 1)
        data[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
    read(reader, bytes(data))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91" * 60_000,
        b"\x81\xa1x" + b"\x91" * 60_000,
        b"\x81\xa4type" + b"\x91" * 60_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa8bloccard\xa7members\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xaccannouncement\xa4lora\x81\xa7targets\xdd\xff\xff\xff\xff",
        b"FG\x01\x00\x05\xdd\xff\xff\xff\xff",
        b"FG\x01\xff\xff",
    ],
    ids=range(9),
)
def test_hostile_bytes_are_refused_before_anything_is_allocated(reader: str, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        READERS[reader](data)
