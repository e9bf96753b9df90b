"""From masked reports to a new adapter: exact sums, the mean rule, and nothing applied that does not check out."""

import hashlib

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from playbook import authority, campaign, signer

from fedge.errors import ProtocolError
from fedge.messages import BlobRef, Open, encode
from fedge.secagg.masks import Member
from fedge.update import codec as coding
from fedge.update.report import BuiltReport, build_report
from fedge.update.spec import UpdateCodec
from hub import aggregation
from hub.aggregation import OpenedSum
from hub.effects import RoundRow

NUMBERS, DEVICES = 1500, 5
NAMES = tuple(f"d{i:02d}" for i in range(DEVICES))
SECRETS = [hashlib.sha256(b"prekey %d" % i).digest() for i in range(DEVICES)]
ROSTER = [
    Member(X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), True)
    for secret in SECRETS
]
CODEC = coding.first_codec(5, 0.016, NUMBERS, DEVICES, bytes(16))
HUB = signer(authority(), "hub", "hub", 1)


def deltas(seed: int = 0, scale: float = 0.01) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, NUMBERS).astype(np.float32) for _ in range(DEVICES)]


def round_row(codec: UpdateCodec = CODEC) -> RoundRow:
    opening = Open(
        campaign="c1",
        bloc="bloc-0",
        card=bytes(32),
        round=1,
        manifest=bytes(32),
        adapter=BlobRef(bytes(32), 4 * NUMBERS),
        codec=codec,
        steps=(5,) * DEVICES,
        roster=(b"",) * DEVICES,
        window_seconds=60,
    )
    body = encode(opening)
    return RoundRow(
        transcript=hashlib.sha256(body).digest(),
        campaign="c1",
        bloc="bloc-0",
        round=1,
        envelope=HUB.seal(opening),
        base_version=0,
        state="open",
        sum=aggregation.empty_sum(body, NAMES, NUMBERS, codec),
        opened_at=0.0,
    )


def reports(updates: list[np.ndarray], row: RoundRow, codec: UpdateCodec = CODEC) -> list[BuiltReport]:
    return [
        build_report(
            delta,
            carry=None,
            loss_sum=20.0 + place,
            labels=10,
            samples=4,
            steps=5,
            codec=codec,
            h=row.transcript,
            position=place,
            roster=ROSTER,
            prekey_secret=SECRETS[place],
            entropy=bytes([place]) * 32,
        )
        for place, delta in enumerate(updates)
    ]


def whole(updates: list[np.ndarray], codec: UpdateCodec = CODEC) -> RoundRow:
    row = round_row(codec)
    for name, report in zip(NAMES, reports(updates, row, codec), strict=True):
        row = aggregation.add_report(row, name, report.body)
    return row


# ---------------------------------------------------------------- sums
def test_an_opened_sum_is_the_sum_of_the_updates_and_of_the_figures() -> None:
    updates = deltas()
    opened = aggregation.open_sum(whole(updates), NUMBERS)
    true = np.sum(updates, axis=0)
    assert np.linalg.norm(opened.total - true) / np.linalg.norm(true) < 0.01
    assert (opened.devices, opened.contributors) == (DEVICES, DEVICES)
    assert (opened.labels, opened.samples, opened.steps) == (50, 20, 25)
    assert opened.loss_sum == pytest.approx(110.0)
    assert opened.summary()["training_loss"] == pytest.approx(2.2)
    norms = [float(np.linalg.norm(update)) for update in updates]
    assert opened.mean_norm == pytest.approx(np.mean(norms), rel=1e-4)


@given(order=st.permutations(range(DEVICES)))
@settings(max_examples=20, deadline=None)
def test_any_order_of_arrival_gives_the_same_row(order: list[int]) -> None:
    row = round_row()
    sealed = reports(deltas(), row)
    for place in order:
        assert NAMES[place] in aggregation.missing(row)
        row = aggregation.add_report(row, NAMES[place], sealed[place].body)
        assert aggregation.digest_in(row, NAMES[place]) == sealed[place].digest
    assert aggregation.missing(row) == ()
    assert np.array_equal(
        aggregation.open_sum(row, NUMBERS).total, aggregation.open_sum(whole(deltas()), NUMBERS).total
    )


def test_a_bloc_that_is_not_whole_is_not_opened() -> None:
    row = round_row()
    for name, report in list(zip(NAMES, reports(deltas(), row), strict=True))[1:]:
        row = aggregation.add_report(row, name, report.body)
    assert aggregation.missing(row) == (NAMES[0],)
    with pytest.raises(ProtocolError) as refusal:
        aggregation.open_sum(row, NUMBERS)
    assert refusal.value.name == "bloc-not-whole"


def test_one_changed_byte_in_any_report_is_a_bad_sum() -> None:
    row = round_row()
    sealed = [report.body for report in reports(deltas(), row)]
    for place in (0, 700, len(sealed[2]) - 1):
        spoiled, changed = round_row(), bytearray(sealed[2])
        changed[place] ^= 0x40
        for name, body in zip(NAMES, [*sealed[:2], bytes(changed), *sealed[3:]], strict=True):
            spoiled = aggregation.add_report(spoiled, name, body)
        with pytest.raises(ProtocolError) as refusal:
            aggregation.open_sum(spoiled, NUMBERS)
        assert refusal.value.name == "bad-sum"


def test_a_sum_that_wraps_is_a_bad_sum() -> None:
    """Everybody sends the same large update under a codec that was tuned to a small one."""
    narrow = coding.next_codec(1e-4, 1.0, DEVICES, bytes(16))
    with pytest.raises(ProtocolError) as refusal:
        aggregation.open_sum(whole([deltas()[0]] * DEVICES, narrow), NUMBERS)
    assert refusal.value.name == "bad-sum"


def test_the_body_has_the_announced_size() -> None:
    row = round_row()
    assert {len(report.body) for report in reports(deltas(), row)} == {aggregation.body_size(row)}


# ---------------------------------------------------------------- the mean rule
def opened(total: np.ndarray, contributors: int = 5) -> OpenedSum:
    honest = aggregation.open_sum(whole(deltas()), NUMBERS)
    return OpenedSum(
        **{name: getattr(honest, name) for name in OpenedSum.__slots__}
        | {"total": total, "contributors": contributors}
    )


def test_two_blocs_side_by_side_add_up_to_the_mean_over_both() -> None:
    one, two = (np.sum(deltas(seed), axis=0) for seed in (1, 2))
    adapter = bytes(4 * NUMBERS)
    for total in (one, two):
        adapter = aggregation.apply(adapter, opened(total), aggregation.share(2 * DEVICES, 0))
    mean = (one + two) / (2 * DEVICES)
    assert np.allclose(np.frombuffer(adapter, "<f4"), mean, atol=1e-7)


def test_a_stale_sum_counts_less() -> None:
    assert aggregation.share(10, 0) == 0.1
    assert aggregation.share(10, 3) == 0.05
    assert aggregation.share(16, 0) * 16 == 1.0


def test_without_contributors_the_bytes_stay() -> None:
    adapter = np.array([0.0, -0.0, 1e-40, 3.0] * (NUMBERS // 4), "<f4").tobytes()
    assert aggregation.apply(adapter, opened(np.zeros(NUMBERS, np.float32), 0), 0.1) is adapter


def test_nobody_has_anything_to_give() -> None:
    none = aggregation.open_sum(whole([np.zeros(NUMBERS, np.float32)] * DEVICES), NUMBERS)
    assert none.contributors == 0
    assert not none.total.any()
    assert none.spread == none.mean_norm == 0.0


# ---------------------------------------------------------------- the next codec
def test_the_first_codec_fits_everything_and_the_next_follows_the_last_sum() -> None:
    row = campaign(5, bloc=5)
    first = aggregation.next_codec(row, 5, bytes(16))
    assert (first.bits, first.clip) == (16, pytest.approx(5 * 0.016 * row.numbers**0.5))
    seen = msgspec.structs.replace(row, spread=0.02, mean_norm=0.5)
    following = aggregation.next_codec(seen, 5, bytes(16))
    assert following.bits == 8
    assert following.clip == pytest.approx(1.25 * 0.5)
    assert following.step == pytest.approx(5.0 * 1.15 * 0.02 / 128)
