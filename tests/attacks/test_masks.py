"""What a hub may not get out of masked reports, and the rosters and reports that are refused by name."""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedge.errors import ProtocolError
from fedge.secagg.bloc import BlocSum, seal
from fedge.secagg.keystream import StreamCipher
from fedge.secagg.masks import Member, edge_cipher, mask_in_place, open_edges
from fedge.secagg.ring import BodyLayout

K, WORDS = 5, 65_536
LAYOUT = BodyLayout(bits=8, words=WORDS, metadata_words=71)
SECRETS = [hashlib.sha256(b"prekey %d" % i).digest() for i in range(K)]


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


ROSTER = [Member(prekey=public(secret), aes=i != 1) for i, secret in enumerate(SECRETS)]


def transcript(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def plain_words(device: int) -> np.ndarray:
    """What real updates look like: a narrow bell around zero."""
    return np.rint(6 * np.random.default_rng(device).standard_normal(WORDS)).astype(np.int8).view(np.uint8)


def report_words(device: int, h: bytes, roster: list[Member] = ROSTER) -> np.ndarray:
    metadata = np.zeros(LAYOUT.metadata_words, np.uint32)
    body = seal(
        plain_words(device), metadata, h=h, position=device, roster=roster, prekey_secret=SECRETS[device]
    ).body
    return LAYOUT.views(body)[0]


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    return abs(float(np.corrcoef(one.view(np.int8), two.view(np.int8))[0, 1]))


def chi_square(words: np.ndarray) -> float:
    """255 degrees of freedom: mean 255, standard deviation 22.6."""
    expected = words.size / 256
    return float(np.sum((np.bincount(words, minlength=256) - expected) ** 2 / expected))


REPORTS = [report_words(device, transcript("round 1")) for device in range(K)]
PARTS = [part for size in range(1, K) for part in combinations(range(K), size)]


@pytest.mark.parametrize("part", PARTS)
def test_any_proper_part_of_a_bloc_is_noise(part: tuple[int, ...]) -> None:
    masked = np.sum([REPORTS[i] for i in part], axis=0, dtype=np.uint8)
    plain = np.sum([plain_words(i) for i in part], axis=0, dtype=np.uint8)
    assert chi_square(masked) < 255 + 5 * 22.6
    assert correlation(masked, plain) < 0.02
    for device in range(K):
        assert correlation(masked, plain_words(device)) < 0.02


def test_the_whole_bloc_is_not_noise() -> None:
    masked = np.sum(REPORTS, axis=0, dtype=np.uint8)
    assert np.array_equal(masked, np.sum([plain_words(i) for i in range(K)], axis=0, dtype=np.uint8))
    assert chi_square(masked) > 10_000


def test_metadata_is_masked_too() -> None:
    zeros = np.zeros(LAYOUT.metadata_words, np.uint32)
    body = seal(
        plain_words(0), zeros, h=transcript("x"), position=0, roster=ROSTER, prekey_secret=SECRETS[0]
    ).body
    bits = np.unpackbits(LAYOUT.views(body)[1].view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)


def test_a_second_open_with_the_same_roster_gives_unrelated_masks() -> None:
    one = REPORTS[0] - plain_words(0)
    two = report_words(0, transcript("round 2")) - plain_words(0)
    assert correlation(one, two) < 0.02
    assert chi_square(one - two) < 255 + 5 * 22.6


def test_reports_to_two_opens_do_not_cancel() -> None:
    """The hub shows one OPEN to one device and another to the rest."""
    mixed = [report_words(0, transcript("round 1, for you alone")), *REPORTS[1:]]
    assert chi_square(np.sum(mixed, axis=0, dtype=np.uint8)) < 255 + 5 * 22.6


def test_a_hundred_rounds_of_masks_hide_what_float_masks_give_away() -> None:
    """The running mean of a two-party sum's reports (FATE's float masks: correlation 0.90 after 100 rounds)."""
    weights = plain_words(0)[:16_384]
    roster, metadata = ROSTER[:2], np.zeros(1, np.uint32)
    rng = np.random.default_rng(9)
    modular, floating = np.zeros(weights.size), np.zeros(weights.size)
    for number in range(100):
        words = weights.copy()
        mask_in_place(words, metadata, open_edges(transcript(f"round {number}"), 0, roster, SECRETS[0]))
        modular += words.view(np.int8)
        floating += weights.view(np.int8) + rng.normal(0, 30, weights.size)
    true = weights.view(np.int8).astype(np.float64)
    assert np.corrcoef(floating, true)[0, 1] > 0.8
    assert abs(np.corrcoef(modular, true)[0, 1]) < 0.02


def test_a_slow_end_gets_chacha20_on_both_sides() -> None:
    assert edge_cipher(ROSTER[0], ROSTER[2]) is StreamCipher.AES_128_CTR
    assert edge_cipher(ROSTER[0], ROSTER[1]) is StreamCipher.CHACHA20
    assert edge_cipher(ROSTER[1], ROSTER[0]) is StreamCipher.CHACHA20


def test_a_false_aes_flag_spoils_the_sum_and_shows_nothing() -> None:
    lied = [*ROSTER[:1], Member(prekey=ROSTER[1].prekey, aes=True), *ROSTER[2:]]
    mixed = [report_words(0, transcript("round 1"), lied), *REPORTS[1:]]
    assert chi_square(np.sum(mixed, axis=0, dtype=np.uint8)) < 255 + 5 * 22.6


def refused(name: str, roster: list[Member], position: int = 0, secret: bytes = SECRETS[0]) -> None:
    words, metadata = plain_words(0), np.zeros(71, np.uint32)
    with pytest.raises(ProtocolError) as refusal:
        seal(words, metadata, h=transcript("x"), position=position, roster=roster, prekey_secret=secret)
    assert refusal.value.name == name


def test_a_cloned_member_is_refused() -> None:
    refused("cloned-member", [ROSTER[0], *[ROSTER[1]] * 4])


def test_a_bloc_below_the_floor_is_refused() -> None:
    refused("small-bloc", ROSTER[:4])
    refused("small-bloc", [])
    refused("large-bloc", [Member(prekey=bytes([i]) * 32, aes=True) for i in range(65)])


def test_a_roster_without_our_own_prekey_is_refused() -> None:
    other = Member(prekey=public(bytes(31) + b"\7"), aes=True)
    refused("not-my-place", [other, *ROSTER[1:]])
    refused("not-my-place", ROSTER, position=1)
    refused("not-my-place", ROSTER, position=-5)
    refused("not-my-place", ROSTER, position=5)


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31), b"short"])
def test_a_prekey_that_gives_a_known_secret_is_refused(point: bytes) -> None:
    refused("bad-prekey", [*ROSTER[:4], Member(prekey=point, aes=True)])


def collecting() -> BlocSum:
    return BlocSum(transcript("round 1"), [f"device-{i}" for i in range(K)], LAYOUT)


def body_of(device: int, h: str = "round 1") -> bytes:
    metadata = np.zeros(LAYOUT.metadata_words, np.uint32)
    return seal(
        plain_words(device),
        metadata,
        h=transcript(h),
        position=device,
        roster=ROSTER,
        prekey_secret=SECRETS[device],
    ).body


def test_a_second_different_report_is_refused_and_changes_nothing() -> None:
    bloc = collecting()
    bloc.add("device-0", body_of(0))
    before = bloc.to_bytes()
    with pytest.raises(ProtocolError) as refusal:
        bloc.add("device-0", body_of(0, "another round"))
    assert refusal.value.name == "second-report"
    assert bloc.to_bytes() == before


def test_a_stranger_and_a_wrong_size_are_refused_and_change_nothing() -> None:
    bloc = collecting()
    before = bloc.to_bytes()
    with pytest.raises(ProtocolError) as refusal:
        bloc.add("device-9", body_of(0))
    assert refusal.value.name == "not-a-member"
    with pytest.raises(ProtocolError) as refusal:
        bloc.add("device-0", body_of(0)[:-1])
    assert refusal.value.name == "report-size"
    assert bloc.to_bytes() == before


def test_a_hub_cannot_make_a_bloc_of_few_or_of_clones() -> None:
    with pytest.raises(ProtocolError) as refusal:
        BlocSum(transcript("x"), ["a", "b", "c", "d"], LAYOUT)
    assert refusal.value.name == "small-bloc"
    with pytest.raises(ProtocolError) as refusal:
        BlocSum(transcript("x"), ["a", "b", "c", "d", "a"], LAYOUT)
    assert refusal.value.name == "cloned-member"
