"""The update codec: bounds, unbiased rounding, the predicted error, and settings that are refused (field case F24)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError
from fedge.limits import STRATA
from fedge.secagg.ring import add_words, zero_words
from fedge.update import codec as coding
from fedge.update.codec import SLACK, SPREADS, clip, decode, encode, first_codec, next_codec
from fedge.update.rotation import forward, padded_length
from fedge.update.spec import UpdateCodec

SEED = bytes(range(16))


def deltas(devices: int, numbers: int, *, seed: int = 5, shared: float = 0.3) -> list[np.ndarray]:
    """Updates like those of LoRA: heavy tails, layers of very different size, partly common to all."""
    rng = np.random.default_rng(seed)
    layers = np.repeat(np.exp(rng.standard_normal(64)), -(-numbers // 64))[:numbers]
    common = rng.standard_t(4, numbers)
    own = rng.standard_t(4, (devices, numbers))
    mixed = math.sqrt(shared) * common + math.sqrt(1 - shared) * own
    return [(0.01 * layers * row).astype(np.float32) for row in mixed]


def summed(updates: list[np.ndarray], codec: UpdateCodec) -> np.ndarray:
    total = zero_words(padded_length(updates[0].size), codec.bits)
    for place, update in enumerate(updates):
        add_words(total, encode(update, codec, bytes([place]) * 32).words)
    return total


@given(
    numbers=st.integers(1, 3000),
    bits=st.sampled_from([8, 16]),
    scale=st.floats(0.001, 1.0),
    entropy=st.binary(min_size=32, max_size=32),
)
@settings(max_examples=40, deadline=None)
def test_one_update_comes_back_within_a_step_a_word(
    numbers: int, bits: int, scale: float, entropy: bytes
) -> None:
    delta = (scale * np.random.default_rng(numbers).standard_normal(numbers)).astype(np.float32)
    bound = float(np.linalg.norm(delta)) + 1e-6
    codec = UpdateCodec(bits=bits, step=bound / 2 ** (bits - 1) * 1.1, clip=bound, seed=SEED)
    words = encode(delta, codec, entropy).words
    off = coding.centred(words).astype(np.float64) * codec.step - forward(delta, SEED)
    assert np.abs(off).max() <= codec.step * 1.01
    error = np.linalg.norm(decode(words, codec, numbers) - delta)
    assert error <= 1.01 * codec.step * math.sqrt(padded_length(numbers))


def test_rounding_is_right_on_average_where_nearest_rounding_would_say_zero() -> None:
    delta = np.full(1024, 0.3, np.float32)
    codec = UpdateCodec(bits=8, step=4.0, clip=100.0, seed=SEED)  # every rotated number is below half a step
    decoded = [decode(encode(delta, codec, bytes([i]) * 32).words, codec, 1024) for i in range(200)]
    assert np.abs(forward(delta, SEED)).max() < 2.0
    assert np.mean(decoded) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("bits", "devices"), [(8, 5), (8, 8), (8, 64), (16, 8)])
def test_the_error_of_a_sum_is_the_predicted_one(bits: int, devices: int) -> None:
    updates = deltas(devices, 20_480)
    truth = np.sum(updates, axis=0, dtype=np.float64)
    codec = next_codec(coding.spread(truth.astype(np.float32)), 100.0, devices, SEED, bits)
    decoded = decode(summed(updates, codec), codec, truth.size)
    measured = float(np.sum((decoded - truth) ** 2) / np.sum(truth**2))
    predicted = coding.predicted_error(devices, bits, SPREADS * SLACK)
    assert measured == pytest.approx(predicted, rel=0.1)


def test_the_first_codec_holds_when_all_send_the_same_update_at_the_bound() -> None:
    devices, numbers = 64, 5_000
    codec = first_codec(5, 0.016, numbers, devices, SEED)
    assert codec.bits == 16
    assert codec.clip == pytest.approx(5 * 0.016 * math.sqrt(numbers))
    update, _ = clip(deltas(1, numbers)[0] * 1e4, codec.clip)
    decoded = decode(summed([update] * devices, codec), codec, numbers)
    np.testing.assert_allclose(decoded, devices * update, atol=codec.step * devices)


def test_the_next_codec_follows_the_last_sum() -> None:
    codec = next_codec(0.04, 8.3, 8, SEED)
    assert codec == UpdateCodec(bits=8, step=5 * 1.15 * 0.04 / 128, clip=1.25 * 8.3, seed=SEED)


@pytest.mark.parametrize("bits", [8, 16])
def test_integers_and_check_sums_agree_until_a_word_wraps(bits: int) -> None:
    delta = deltas(1, 10_000)[0]
    bound = float(np.linalg.norm(delta))
    reach = float(np.abs(forward(delta, SEED)).max())
    fits = UpdateCodec(bits=bits, step=1.05 * reach / 2 ** (bits - 1), clip=bound, seed=SEED)
    encoded = encode(delta, fits, bytes(32))
    assert np.array_equal(coding.stratify(coding.centred(encoded.words)), encoded.strata)
    wraps = UpdateCodec(bits=bits, step=0.9 * reach / 2 ** (bits - 1), clip=bound, seed=SEED)
    encoded = encode(delta, wraps, bytes(32))
    off = coding.stratify(coding.centred(encoded.words)) - encoded.strata
    assert np.count_nonzero(off)
    assert not np.any(off % 2**bits)


def test_strata_count_every_word_once() -> None:
    words = np.zeros(2048, np.int16)
    words[STRATA + 3] = -7
    expected = np.zeros(STRATA, np.uint32)
    expected[3] = 2**32 - 7
    assert np.array_equal(coding.stratify(words), expected)


def test_a_long_update_is_shortened_and_a_short_one_is_left_alone() -> None:
    delta = np.array([3.0, 4.0], np.float32)
    clipped, norm = clip(delta, 2.5)
    assert norm == 5.0
    assert clipped.tolist() == [1.5, 2.0]
    assert delta.tolist() == [3.0, 4.0]
    assert clip(delta, 5.0)[0] is delta


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ConfigError) as refusal:
        clip(np.array([0.0, value], np.float32), 1.0)
    assert refusal.value.field == "delta"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip", 0.0),
        ("clip", -1.0),
        ("clip", math.nan),
        ("clip", math.inf),
        ("clip", 1e30),
        ("step", 0.0),
        ("step", -1.0),
        ("step", math.nan),
        ("step", 1e30),
        ("bits", 0),
        ("bits", 7),
        ("bits", 32),
        ("seed", b"short"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(field: str, value: object) -> None:
    good = {"bits": 8, "step": 0.01, "clip": 1.0, "seed": SEED}
    UpdateCodec(**good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refusal:
        UpdateCodec(**{**good, field: value})  # type: ignore[arg-type]
    assert refusal.value.field == field


def test_words_too_narrow_for_the_worst_case_name_the_width_that_works() -> None:
    codec = first_codec(5, 0.016, 184_320, 64, SEED)
    worst = coding.aligned_spread(codec.clip, 184_320, 64)
    coding.require_range(codec, 64, worst)
    narrow = UpdateCodec(bits=8, step=codec.step, clip=codec.clip, seed=SEED)
    with pytest.raises(ConfigError, match="16 bits") as refusal:
        coding.require_range(narrow, 64, worst)
    assert refusal.value.field == "bits"
    assert refusal.value.value == 8
    with pytest.raises(ConfigError, match="larger step"):
        coding.require_range(UpdateCodec(bits=8, step=1e-5, clip=1.0, seed=SEED), 64, worst)


def test_rounding_noise_of_too_many_devices_does_not_fit_eight_bits() -> None:
    next_codec(0.04, 8.3, 600, SEED)
    with pytest.raises(ConfigError, match="16 bits"):
        next_codec(0.04, 8.3, 700, SEED)


@pytest.mark.parametrize(
    ("spread", "norm", "field"), [(0.0, 1.0, "step"), (0.1, 0.0, "clip"), (math.nan, 1.0, "step")]
)
def test_a_sum_that_says_nothing_makes_no_codec(spread: float, norm: float, field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        next_codec(spread, norm, 8, SEED)
    assert refusal.value.field == field


def test_nothing_trained_makes_no_first_codec() -> None:
    with pytest.raises(ConfigError, match="clip"):
        first_codec(0, 0.016, 1000, 8, SEED)
