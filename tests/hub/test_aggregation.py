"""From masked reports to a new adapter: exact sums, the mean rule, and nothing applied that does not check out."""

import dataclasses
import hashlib

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from playbook import campaign

from fedge.errors import ProtocolError
from fedge.secagg.bloc import BlocSum
from fedge.secagg.masks import Member
from fedge.update import codec as coding
from fedge.update.report import BuiltReport, build_report
from fedge.update.spec import UpdateCodec
from hub import aggregation
from hub.aggregation import OpenedSum

NUMBERS, DEVICES = 1500, 5
NAMES = tuple(f"d{i:02d}" for i in range(DEVICES))
SECRETS = [hashlib.sha256(b"prekey %d" % i).digest() for i in range(DEVICES)]
ROSTER = [
    Member(X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), True)
    for secret in SECRETS
]
CODEC = coding.first_codec(5, 0.016, NUMBERS, DEVICES, bytes(16))


def deltas(seed: int = 0, scale: float = 0.01) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, NUMBERS).astype(np.float32) for _ in range(DEVICES)]


H = hashlib.sha256(b"an OPEN").digest()


def empty(codec: UpdateCodec = CODEC) -> BlocSum:
    return aggregation.empty_sum(H, NAMES, NUMBERS, codec)


def reports(updates: list[np.ndarray], codec: UpdateCodec = CODEC) -> list[BuiltReport]:
    return [
        build_report(
            delta,
            carry=None,
            loss_sum=20.0 + place,
            labels=10,
            samples=4,
            steps=5,
            codec=codec,
            h=H,
            position=place,
            roster=ROSTER,
            prekey_secret=SECRETS[place],
            entropy=bytes([place]) * 32,
        )
        for place, delta in enumerate(updates)
    ]


def whole(updates: list[np.ndarray], codec: UpdateCodec = CODEC) -> BlocSum:
    total = empty(codec)
    for name, report in zip(NAMES, reports(updates, codec), strict=True):
        total.add(name, report.body)
    return total


def open_sum(total: BlocSum, codec: UpdateCodec = CODEC) -> OpenedSum:
    return aggregation.open_sum(total, codec, NUMBERS)


# ---------------------------------------------------------------- sums
def test_an_opened_sum_is_the_sum_of_the_updates_and_of_the_figures() -> None:
    updates = deltas()
    opened = open_sum(whole(updates))
    true = np.sum(updates, axis=0)
    assert np.linalg.norm(opened.total - true) / np.linalg.norm(true) < 0.01
    assert (opened.devices, opened.contributors) == (DEVICES, DEVICES)
    assert (opened.labels, opened.samples, opened.steps) == (50, 20, 25)
    assert opened.loss_sum == pytest.approx(110.0)
    assert opened.summary()["training_loss"] == pytest.approx(2.2)
    norms = [float(np.linalg.norm(update)) for update in updates]
    assert opened.mean_norm == pytest.approx(np.mean(norms), rel=1e-4)


def test_a_bloc_that_is_not_whole_is_not_opened() -> None:
    total = empty()
    for name, report in list(zip(NAMES, reports(deltas()), strict=True))[1:]:
        total.add(name, report.body)
    assert total.missing == (NAMES[0],)
    with pytest.raises(ProtocolError) as refusal:
        open_sum(total)
    assert refusal.value.name == "bloc-not-whole"


def test_one_changed_byte_in_any_report_is_a_bad_sum() -> None:
    sealed = [report.body for report in reports(deltas())]
    for place in (0, 700, len(sealed[2]) - 1):
        spoiled, changed = empty(), bytearray(sealed[2])
        changed[place] ^= 0x40
        for name, body in zip(NAMES, [*sealed[:2], bytes(changed), *sealed[3:]], strict=True):
            spoiled.add(name, body)
        with pytest.raises(ProtocolError) as refusal:
            open_sum(spoiled)
        assert refusal.value.name == "bad-sum"


def test_a_sum_that_wraps_is_a_bad_sum() -> None:
    """Everybody sends the same large update under a codec that was tuned to a small one."""
    narrow = coding.next_codec(1e-4, 1.0, DEVICES, bytes(16))
    with pytest.raises(ProtocolError) as refusal:
        open_sum(whole([deltas()[0]] * DEVICES, narrow), narrow)
    assert refusal.value.name == "bad-sum"


def test_the_body_has_the_announced_size() -> None:
    assert {len(report.body) for report in reports(deltas())} == {empty().layout.size}


# ---------------------------------------------------------------- the mean rule
def opened(total: np.ndarray | None = None, **changes: float) -> OpenedSum:
    honest = open_sum(whole(deltas()))
    return dataclasses.replace(honest, **({} if total is None else {"total": total}), **changes)


def factor(beside: int, behind: int = 0, rate: float = 1.0) -> float:
    return aggregation.factor(DEVICES, beside=beside, server_rate=rate, behind=behind)


def test_two_blocs_side_by_side_add_up_to_the_mean_over_both() -> None:
    one, two = (np.sum(deltas(seed), axis=0) for seed in (1, 2))
    adapter = bytes(4 * NUMBERS)
    for behind, total in enumerate((one, two)):
        adapter = aggregation.apply(adapter, opened(total), factor(2, behind))
    mean = (one + two) / (2 * DEVICES)
    assert np.allclose(np.frombuffer(adapter, "<f4"), mean, atol=1e-7)


def test_a_server_rate_never_moves_further_than_a_blocs_own_mean() -> None:
    assert factor(4) * DEVICES == 0.25
    assert factor(4, rate=2.0) * DEVICES == 0.5
    assert factor(4, rate=9.0) * DEVICES == 1.0
    assert factor(1, rate=2.0) * DEVICES == 1.0


def test_a_stale_sum_counts_less() -> None:
    assert aggregation.share(10, 0) == 0.1
    assert aggregation.share(10, 3) == 0.05
    assert [aggregation.staleness(behind, 4) for behind in (0, 3, 4, 7)] == [0, 0, 1, 4]
    assert factor(4, behind=3) == factor(4)
    assert factor(4, behind=6) == factor(4) / 2


def test_few_steps_count_more_and_many_less_within_a_factor_of_two() -> None:
    sums = {steps: opened(steps=steps * DEVICES) for steps in (1, 5, 10, 20, 100)}
    corrections = [aggregation.step_correction(10.0, one) for one in sums.values()]
    assert corrections == [2.0, 2.0, 1.0, 0.5, 0.5]
    assert aggregation.step_correction(0.0, sums[5]) == 1.0, "nothing to compare with yet"
    assert aggregation.step_correction(10.0, opened(steps=0)) == 1.0


def test_the_mean_of_steps_follows_the_sums() -> None:
    known = aggregation.mean_steps(0.0, opened(steps=10 * DEVICES))
    assert known == 10.0
    for _ in range(200):
        known = aggregation.mean_steps(known, opened(steps=20 * DEVICES))
    assert known == pytest.approx(20.0, abs=0.1)


def test_without_contributors_the_bytes_stay() -> None:
    adapter = np.array([0.0, -0.0, 1e-40, 3.0] * (NUMBERS // 4), "<f4").tobytes()
    assert aggregation.apply(adapter, opened(np.zeros(NUMBERS, np.float32), contributors=0), 0.1) is adapter


def test_nobody_has_anything_to_give() -> None:
    none = open_sum(whole([np.zeros(NUMBERS, np.float32)] * DEVICES))
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


def test_a_codec_has_room_for_the_largest_sum_of_late() -> None:
    room = aggregation.roomy(1.0, 0.2)
    assert room == 0.98
    assert aggregation.roomy(room, 3.0) == 3.0
    for _ in range(400):
        room = aggregation.roomy(room, 0.2)
    assert room == 0.2


def test_after_a_wrapped_sum_the_next_codec_is_the_first_and_those_after_it_have_more_room() -> None:
    row = msgspec.structs.replace(campaign(5, bloc=5), spread=0.02, mean_norm=0.5)
    wrapped = msgspec.structs.replace(row, spread=aggregation.doubted(row.spread))
    assert aggregation.next_codec(wrapped, 5, bytes(16)).bits == 16
    later = msgspec.structs.replace(wrapped, spread=aggregation.roomy(wrapped.spread, 0.01))
    assert later.spread == pytest.approx(0.98 * 1.5 * 0.02)


def test_however_many_sums_wrap_no_room_is_made_beyond_what_the_clip_lets_in() -> None:
    row = msgspec.structs.replace(campaign(5, bloc=5), spread=1e9, mean_norm=0.5)
    bounded = aggregation.next_codec(row, 5, bytes(16))
    most = coding.aligned_spread(1.25 * 0.5, row.numbers, 5)
    assert bounded.step == pytest.approx(5.0 * 1.15 * most / 128)
