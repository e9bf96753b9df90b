"""Frames and chunks: whatever the link does, the right body arrives, and only what is missing is sent."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import limits
from fedge.errors import IntegrityError, ProtocolError
from fedge.frames import (
    ChunkHeader,
    Incoming,
    Outgoing,
    chunk_count,
    chunk_span,
    decode_frame,
    encode_frame,
    pack_bitmap,
    unpack_bitmap,
)

H = b"\3" * 32
SIZES = st.integers(1, 6 * limits.CHUNK_BODY_BYTES)


def body_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def chunk(body: bytes, index: int) -> bytes:
    start, length = chunk_span(len(body), index)
    return body[start : start + length]


def incoming(body: bytes) -> Incoming:
    return Incoming(len(body), hashlib.sha256(body).digest())


def refused(name: str, call: object, *arguments: object) -> None:
    with pytest.raises(ProtocolError) as refusal:
        call(*arguments)
    assert refusal.value.name == name


# ---------------------------------------------------------------- frames
@given(index=st.integers(0, limits.TRANSFER_CHUNKS_MAX - 1), body=st.binary(max_size=2_000))
def test_decoding_undoes_encoding(index: int, body: bytes) -> None:
    header, found = decode_frame(encode_frame(ChunkHeader(H, H, index), body))
    assert (header, bytes(found)) == (ChunkHeader(H, H, index), body)


def test_a_full_chunk_fits_a_frame_and_costs_under_a_hundred_bytes() -> None:
    frame = encode_frame(ChunkHeader(H, H, 63), bytes(limits.CHUNK_BODY_BYTES))
    assert len(frame) <= limits.FRAME_BYTES_MAX
    assert len(frame) - limits.CHUNK_BODY_BYTES < 100


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FG\x01",
        b"FG\x02\x00\x01\x90",
        b"XX\x01\x00\x01\x90",
        b"FG\x01\x00\x02\x90",
        b"FG\x01\x00\x01\x90",
    ],
)
def test_what_is_no_frame(data: bytes) -> None:
    refused("malformed", decode_frame, data)


def test_a_genuine_frame_with_another_magic_or_a_cut_header() -> None:
    frame = encode_frame(ChunkHeader(H, H, 1), b"body")
    refused("malformed", decode_frame, b"GF" + frame[2:])
    refused("malformed", decode_frame, frame[:2] + b"\x02" + frame[3:])
    refused("malformed", decode_frame, frame[:40])


def test_a_header_longer_than_allowed_is_not_read() -> None:
    refused("malformed", decode_frame, b"FG\x01\x10\x01" + bytes(0x1001))
    refused("oversize", decode_frame, b"FG\x01" + bytes(limits.FRAME_BYTES_HARD_MAX))


def test_an_index_past_the_most_chunks_is_refused() -> None:
    frame = encode_frame(ChunkHeader(H, H, 63), b"x")
    assert frame.count(b"\x3f") == 1
    refused("malformed", decode_frame, frame.replace(b"\x3f", b"\x40"))


# ---------------------------------------------------------------- spans and bitmaps
@given(size=SIZES)
@settings(max_examples=50)
def test_chunks_cover_a_body_exactly_once(size: int) -> None:
    spans = [chunk_span(size, index) for index in range(chunk_count(size))]
    assert [start for start, _ in spans] == [
        sum(length for _, length in spans[:i]) for i in range(len(spans))
    ]
    assert sum(length for _, length in spans) == size
    assert all(0 < length <= limits.CHUNK_BODY_BYTES for _, length in spans)


@given(data=st.data(), count=st.integers(1, limits.TRANSFER_CHUNKS_MAX))
def test_unpacking_undoes_packing_of_bitmaps(data: st.DataObject, count: int) -> None:
    have = data.draw(st.sets(st.integers(0, count - 1)))
    bitmap = pack_bitmap(have, count)
    assert len(bitmap) == -(-count // 8)
    assert unpack_bitmap(bitmap, count) == have


@given(bitmap=st.binary(max_size=16), count=st.integers(1, limits.TRANSFER_CHUNKS_MAX))
def test_any_bitmap_names_only_chunks_that_exist(bitmap: bytes, count: int) -> None:
    assert unpack_bitmap(bitmap, count) <= set(range(count))


def test_bitmaps_start_at_the_least_significant_bit() -> None:
    assert pack_bitmap({0, 2, 9}, 10) == b"\x05\x02"


# ---------------------------------------------------------------- a transfer over a bad link
@given(size=SIZES, seed=st.integers(0, 2**32), loss=st.floats(0, 0.7))
@settings(max_examples=60, deadline=None)
def test_any_order_duplicates_loss_and_restarts_end_with_the_right_body(
    size: int, seed: int, loss: float
) -> None:
    chance, body = random.Random(seed), body_of(size, seed)
    sender, receiver = Outgoing(size, window=3), incoming(body)
    known: set[int] = set()
    for _ in range(2_000):
        sent = sender.take()
        assert len(sender.flying) <= 3
        assert not set(sent) & known, "what the receiver last said that it has is not sent again"
        arrived = [
            index for index in sent for _ in range(chance.choice((1, 1, 2))) if chance.random() >= loss
        ]
        chance.shuffle(arrived)
        for index in arrived:
            receiver.add(index, chunk(body, index))
        if receiver.whole:
            break
        if chance.random() < 0.05:
            receiver = incoming(body)  # the hub restarted: half a body was only in memory
        if chance.random() < 0.05:
            sender, known = Outgoing(size, window=3), set()  # so did the device
        if chance.random() >= loss:
            known = set(receiver.have)
            sender.acknowledge(receiver.bitmap, sender.offer())
    assert receiver.whole
    assert receiver.body() == body


def test_after_a_cut_only_what_is_missing_is_sent() -> None:
    size = 6 * limits.CHUNK_BODY_BYTES
    sender = Outgoing(size)
    assert sender.take() == [0, 1, 2, 3, 4, 5]
    assert sender.take() == [], "in flight"
    sender.acknowledge(pack_bitmap({0, 3, 5}, 6), sender.offer())
    assert sender.take() == [1, 2, 4]
    sender.acknowledge(pack_bitmap(set(range(6)), 6))
    assert sender.take() == []
    assert not sender.missing


def test_a_receiver_that_lost_its_memory_is_sent_everything() -> None:
    sender = Outgoing(2 * limits.CHUNK_BODY_BYTES)
    sender.take()
    sender.acknowledge(b"\x03")
    sender.acknowledge(b"\x00")
    assert sender.take() == [0, 1]


def test_a_chunk_that_may_still_be_on_its_way_is_not_sent_twice() -> None:
    sender = Outgoing(4 * limits.CHUNK_BODY_BYTES)
    first = sender.offer()
    assert sender.take() == [0, 1, 2, 3]
    second = sender.offer()  # the line is slow: no answer yet
    sender.acknowledge(pack_bitmap({0}, 4), first)
    assert sender.take() == [], "the first offer's answer was given before the chunks came"
    sender.acknowledge(pack_bitmap({0, 1}, 4))
    assert sender.take() == [], "nor does an unasked receipt say what is lost"
    sender.acknowledge(pack_bitmap({0, 1, 3}, 4), second)
    assert sender.take() == [2]


def test_the_window_bounds_what_is_in_flight() -> None:
    sender = Outgoing(20 * limits.CHUNK_BODY_BYTES)
    assert sender.take() == list(range(limits.CHUNK_WINDOW))
    sender.acknowledge(pack_bitmap({0, 1}, 20))
    assert sender.take() == [8, 9]


# ---------------------------------------------------------------- bad chunks
def test_chunks_that_do_not_fit_change_nothing() -> None:
    body = body_of(limits.CHUNK_BODY_BYTES + 10)
    receiver = incoming(body)
    refused("bad-chunk", receiver.add, 2, b"x")
    refused("bad-chunk", receiver.add, 1, b"eleven byte")
    refused("bad-chunk", receiver.add, 0, body[:10])
    assert receiver.have == set()
    receiver.add(1, body[-10:])
    refused("bad-chunk", receiver.add, 1, bytes(10))
    receiver.add(0, body[:-10])
    assert receiver.body() == body


def test_an_empty_chunk_after_a_full_last_one_is_past_the_end() -> None:
    receiver = incoming(body_of(limits.CHUNK_BODY_BYTES))
    refused("bad-chunk", receiver.add, 1, b"")
    assert not receiver.whole


def test_a_body_with_another_hash_is_not_given_out() -> None:
    receiver = Incoming(3, hashlib.sha256(b"abc").digest())
    receiver.add(0, b"abd")
    with pytest.raises(IntegrityError):
        receiver.body()


@pytest.mark.parametrize("size", [0, -1, limits.TRANSFER_BYTES_MAX + 1, 2**60])
def test_a_size_out_of_range_allocates_nothing(size: int) -> None:
    refused("oversize", Incoming, size, H)
