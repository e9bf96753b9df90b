"""From a delta to a sealed body, and from a whole bloc's sum back to numbers."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedge.errors import ConfigError, IntegrityError
from fedge.secagg.bloc import BlocSum
from fedge.secagg.masks import Member
from fedge.update.codec import aligned_spread, first_codec, next_codec
from fedge.update.report import BlocReading, BuiltReport, add_carry, build_report, read_sum, report_layout
from fedge.update.spec import UpdateCodec

K, NUMBERS = 8, 3_000
H = hashlib.sha256(b"an OPEN").digest()
SECRETS = [hashlib.sha256(b"prekey %d" % i).digest() for i in range(K)]
ROSTER = [
    Member(prekey=X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), aes=True)
    for secret in SECRETS
]
CODEC = first_codec(5, 0.016, NUMBERS, K, bytes(16))


def delta_of(device: int) -> np.ndarray:
    return (0.005 * np.random.default_rng(device).standard_normal(NUMBERS)).astype(np.float32)


def built(
    device: int,
    *,
    delta: np.ndarray | None = None,
    carry: np.ndarray | None = None,
    codec: UpdateCodec = CODEC,
    h: bytes = H,
    entropy: bytes | None = None,
    loss_sum: float = 900.25,
) -> BuiltReport:
    return build_report(
        delta_of(device) if delta is None else delta,
        carry=carry,
        loss_sum=loss_sum,
        labels=250,
        samples=20,
        steps=5,
        codec=codec,
        h=h,
        position=device,
        roster=ROSTER,
        prekey_secret=SECRETS[device],
        entropy=entropy or bytes([device]) * 32,
    )


def read(reports: list[BuiltReport], codec: UpdateCodec = CODEC) -> BlocReading:
    bloc = BlocSum(H, [str(i) for i in range(K)], report_layout(NUMBERS, codec.bits))
    for device, report in enumerate(reports):
        bloc.add(str(device), report.body)
    words, metadata = bloc.open()
    return read_sum(words, metadata, codec=codec, devices=K, numbers=NUMBERS)


def test_a_bloc_reads_as_the_sum_of_what_was_sent() -> None:
    reports = [built(device) for device in range(K)]
    reading = read(reports)
    truth = np.sum([report.sent for report in reports], axis=0)
    assert np.linalg.norm(reading.total - truth) < 0.01 * np.linalg.norm(truth)
    figures = reading.metadata
    assert (figures.contributors, figures.steps, figures.samples, figures.labels) == (
        K,
        5 * K,
        20 * K,
        250 * K,
    )
    assert figures.loss_sum == K * 900.25
    norms = sum(report.norm for report in reports)
    assert figures.norm * CODEC.clip == pytest.approx(norms, rel=1e-4)


def test_a_device_with_nothing_to_give_weighs_nothing() -> None:
    nothing = np.zeros(NUMBERS, np.float32)
    reading = read([built(0, delta=nothing), *(built(device) for device in range(1, K))])
    assert reading.metadata.contributors == K - 1
    empty = read([built(device, delta=nothing) for device in range(K)])
    assert empty.metadata.contributors == 0
    assert not empty.total.any()


def test_the_same_entropy_gives_the_same_bytes_and_another_does_not() -> None:
    assert built(0).body == built(0).body
    assert built(0).digest == hashlib.sha256(built(0).body).digest()
    assert built(0).body != built(0, entropy=bytes(31) + b"\1").body


def test_what_is_sent_is_within_the_clip_bound_and_does_not_touch_the_delta() -> None:
    codec = UpdateCodec(bits=16, step=1e-4, clip=0.1, seed=bytes(16))
    delta = delta_of(0)
    report = built(0, codec=codec, delta=delta)
    assert np.linalg.norm(report.sent) == pytest.approx(0.1, rel=1e-5)
    assert report.norm == pytest.approx(np.linalg.norm(delta_of(0)), rel=1e-5)
    assert np.array_equal(delta, delta_of(0))
    assert report.sent.dtype == np.float32


def test_carry_is_added_whole_when_short_and_at_most_twice_the_delta_when_long() -> None:
    delta = np.array([1.0, 0.0], np.float32)
    assert add_carry(delta, None) is delta
    assert add_carry(delta, np.array([0.0, 1.5], np.float32)).tolist() == [1.0, 1.5]
    assert add_carry(delta, np.array([0.0, 8.0], np.float32)).tolist() == [1.0, 2.0]
    assert add_carry(delta, np.zeros(2, np.float32)).tolist() == [1.0, 0.0]
    carry = delta_of(1)
    np.testing.assert_allclose(built(0, carry=carry).sent, delta_of(0) + carry, rtol=1e-5)


def test_a_sum_that_wraps_is_seen_and_not_applied() -> None:
    spread = aligned_spread(float(np.linalg.norm(delta_of(0))), NUMBERS, K) / 10
    narrow = next_codec(spread, 10.0, K, bytes(16))
    same = [built(device, delta=delta_of(0), codec=narrow) for device in range(K)]
    with pytest.raises(IntegrityError) as refusal:
        read(same, narrow)
    assert refusal.value.field == "strata"


def test_one_wrapped_word_is_enough_to_be_seen() -> None:
    bloc = BlocSum(H, [str(i) for i in range(K)], report_layout(NUMBERS, CODEC.bits))
    for device in range(K):
        bloc.add(str(device), built(device).body)
    words, metadata = bloc.open()
    damaged = words.copy()
    damaged[77] += 1
    read_sum(words, metadata, codec=CODEC, devices=K, numbers=NUMBERS)
    with pytest.raises(IntegrityError, match="check-sums"):
        read_sum(damaged, metadata, codec=CODEC, devices=K, numbers=NUMBERS)


def test_a_report_made_for_another_open_spoils_the_sum_and_is_seen() -> None:
    reports = [built(device) for device in range(K)]
    reports[3] = built(3, h=hashlib.sha256(b"another OPEN").digest())
    with pytest.raises(IntegrityError):
        read(reports)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_delta_or_a_loss_that_is_not_finite_leaves_no_report(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        built(0, delta=np.full(NUMBERS, value, np.float32))
    with pytest.raises(ConfigError, match="finite"):
        built(0, carry=np.full(NUMBERS, value, np.float32))
    with pytest.raises(ConfigError) as refusal:
        built(0, loss_sum=value)
    assert refusal.value.field == "loss_sum"


def test_a_report_is_the_adapter_in_bytes_and_little_more() -> None:
    layout = report_layout(184_320, 8)
    assert layout.size - 184_320 == 284
    assert dataclasses.is_dataclass(built(0))
