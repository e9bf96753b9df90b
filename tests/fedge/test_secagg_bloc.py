"""The running sum of a bloc: exact in any order, whole or nothing, one report a device, one row in the store."""

import contextlib
import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError, IntegrityError, ProtocolError
from fedge.secagg.bloc import BlocSum, SealedReport, seal
from fedge.secagg.masks import Member
from fedge.secagg.ring import BodyLayout, add_words

H = hashlib.sha256(b"an OPEN").digest()
SECRETS = [hashlib.sha256(b"prekey %d" % i).digest() for i in range(8)]


def roster(devices: int) -> list[Member]:
    keys = [X25519PrivateKey.from_private_bytes(secret).public_key() for secret in SECRETS[:devices]]
    return [Member(prekey=key.public_bytes_raw(), aes=i % 3 != 2) for i, key in enumerate(keys)]


def names(devices: int) -> list[str]:
    return [f"device-{i}" for i in range(devices)]


def inputs(devices: int, layout: BodyLayout, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 2**layout.bits, layout.words).astype(np.uint8 if layout.bits == 8 else np.uint16),
            rng.integers(0, 2**32, layout.metadata_words).astype(np.uint32),
        )
        for _ in range(devices)
    ]


def reports(values: list[tuple[np.ndarray, np.ndarray]]) -> list[SealedReport]:
    members = roster(len(values))
    return [
        seal(words, metadata, h=H, position=i, roster=members, prekey_secret=SECRETS[i])
        for i, (words, metadata) in enumerate(values)
    ]


LAYOUT = BodyLayout(bits=8, words=1024, metadata_words=71)
REPORTS = reports(inputs(5, LAYOUT, 1))


@given(
    devices=st.integers(5, 8),
    bits=st.sampled_from([8, 16]),
    words=st.integers(1, 2000),
    metadata=st.integers(1, 256),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_a_whole_bloc_sums_exactly_in_any_order(
    devices: int, bits: int, words: int, metadata: int, data: st.DataObject
) -> None:
    layout = BodyLayout(bits=bits, words=words, metadata_words=metadata)
    values = inputs(devices, layout, words)
    sealed = reports(values)
    bloc = BlocSum(H, names(devices), layout)
    for place in data.draw(st.permutations(range(devices))):
        assert bloc.add(f"device-{place}", sealed[place].body)
    total_words, total_metadata = bloc.open()
    assert np.array_equal(total_words, np.sum([one[0] for one in values], axis=0, dtype=total_words.dtype))
    assert np.array_equal(total_metadata, np.sum([one[1] for one in values], axis=0, dtype=np.uint32))


def test_a_sum_longer_than_one_piece_of_keystream() -> None:
    layout = BodyLayout(bits=16, words=300_001, metadata_words=71)
    values = inputs(5, layout, 3)
    bloc = BlocSum(H, names(5), layout)
    for name, report in zip(names(5), reports(values), strict=True):
        bloc.add(name, report.body)
    assert np.array_equal(bloc.open()[0], np.sum([one[0] for one in values], axis=0, dtype=np.uint16))
    assert np.array_equal(bloc.open()[1], np.sum([one[1] for one in values], axis=0, dtype=np.uint32))


def test_opens_only_when_whole_and_says_who_is_missing() -> None:
    bloc = BlocSum(H, names(5), LAYOUT)
    for place in (3, 0, 4, 1):
        assert not bloc.whole
        bloc.add(f"device-{place}", REPORTS[place].body)
        with pytest.raises(ProtocolError) as refusal:
            bloc.open()
        assert refusal.value.name == "bloc-not-whole"
    assert bloc.missing == ("device-2",)
    bloc.add("device-2", REPORTS[2].body)
    assert bloc.whole
    assert bloc.missing == ()
    bloc.open()


def test_the_same_report_counts_once() -> None:
    once, twice = BlocSum(H, names(5), LAYOUT), BlocSum(H, names(5), LAYOUT)
    for name, report in zip(names(5), REPORTS, strict=True):
        assert once.add(name, report.body)
        assert twice.add(name, report.body)
        assert not twice.add(name, report.body)
        assert twice.digest_of(name) == report.digest
    assert not twice.add("device-0", REPORTS[0].body)
    assert once.to_bytes() == twice.to_bytes()


def test_a_sum_survives_the_store_after_every_report() -> None:
    kept, stored = BlocSum(H, names(5), LAYOUT), BlocSum(H, names(5), LAYOUT).to_bytes()
    for name, report in zip(names(5), REPORTS, strict=True):
        kept.add(name, report.body)
        woken = BlocSum.from_bytes(stored)
        assert woken.missing[0] == name
        assert woken.add(name, report.body)
        stored = woken.to_bytes()
    assert stored == kept.to_bytes()
    woken = BlocSum.from_bytes(stored)
    assert (woken.h, woken.members, woken.layout) == (H, tuple(names(5)), LAYOUT)
    assert np.array_equal(woken.open()[0], kept.open()[0])


@given(cut=st.integers(0, 2000), noise=st.binary(max_size=64))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_sum_or_an_error(cut: int, noise: bytes) -> None:
    whole = BlocSum(H, names(5), LAYOUT).to_bytes()
    for data in (noise, whole[:cut] + noise):
        with contextlib.suppress(IntegrityError):  # other words make another sum, which is no error
            assert BlocSum.from_bytes(data).layout.size <= len(data)


def test_a_row_whose_parts_disagree_is_refused() -> None:
    bloc = BlocSum(H, names(5), LAYOUT)
    bloc.add("device-0", REPORTS[0].body)
    with pytest.raises(IntegrityError, match="contradicts"):
        BlocSum.from_bytes(bloc.to_bytes().replace(b"device-0", b"device-9", 1))


def test_sealing_is_pure() -> None:
    values = inputs(5, LAYOUT, 1)
    again = reports(values)
    assert [report.body for report in again] == [report.body for report in REPORTS]
    assert all(report.digest == hashlib.sha256(report.body).digest() for report in again)
    untouched = inputs(5, LAYOUT, 1)
    assert all(np.array_equal(one[0], two[0]) for one, two in zip(values, untouched, strict=True))


def test_words_of_different_width_or_length_do_not_add() -> None:
    with pytest.raises(ValueError, match="cannot add"):
        add_words(np.zeros(4, np.uint8), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="cannot add"):
        add_words(np.zeros(4, np.uint8), np.zeros(1, np.uint8))


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 12), ("words", 0), ("words", 10**9), ("metadata_words", 257)]
)
def test_a_layout_out_of_range_is_refused_before_anything_is_allocated(field: str, value: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        BodyLayout(**{"bits": 8, "words": 1024, "metadata_words": 71, field: value})
    assert refusal.value.field == field
