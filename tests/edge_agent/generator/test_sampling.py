"""Choosing tokens from logits: what each knob keeps, one seed one text, and ids that stand for nothing (F08)."""

import numpy as np
import pytest

from edge_agent.generator.sampling import Sampler, Sampling
from fedge.errors import UsageError

LOGITS = np.log(np.array([0.05, 0.4, 0.2, 0.3, 0.05], np.float32))
AUDIBLE = np.zeros(5, np.bool_)


def drawn(sampling: Sampling, count: int = 400, logits: np.ndarray = LOGITS) -> np.ndarray:
    sampler = Sampler(sampling, np.zeros(logits.size, np.bool_))
    return np.bincount([sampler.choose(logits) for _ in range(count)], minlength=logits.size) / count


def test_without_a_temperature_the_most_likely_token_is_taken_and_the_lowest_id_among_equals():
    assert Sampler(Sampling(), AUDIBLE).choose(LOGITS) == 1
    assert Sampler(Sampling(), AUDIBLE).choose(np.float32([0, 7, 7, 7, 0])) == 1


def test_frequencies_follow_the_probabilities():
    assert drawn(Sampling(temperature=1.0), 4000) == pytest.approx(np.exp(LOGITS), abs=0.03)


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    sharp, flat = drawn(Sampling(temperature=0.2)), drawn(Sampling(temperature=5.0))
    assert sharp[1] > 0.65 > 0.4 > flat[1]
    assert flat[0] > 0.1 > sharp[0]


def test_top_k_keeps_so_many():
    assert set(np.flatnonzero(drawn(Sampling(temperature=1.0, top_k=2)))) == {1, 3}
    assert set(np.flatnonzero(drawn(Sampling(temperature=1.0, top_k=1)))) == {1}


def test_top_k_with_equal_logits_keeps_the_lowest_ids():
    found = drawn(Sampling(temperature=1.0, top_k=2), logits=np.zeros(6, np.float32))
    assert set(np.flatnonzero(found)) == {0, 1}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.35, {1}), (0.45, {1, 3}), (0.75, {1, 3, 2}), (1e-9, {1}), (1.0, {0, 1, 2, 3, 4})]
)
def test_top_p_keeps_the_most_likely_that_together_reach_it(top_p: float, kept: set[int]):
    assert set(np.flatnonzero(drawn(Sampling(temperature=1.0, top_p=top_p), 1500))) == kept


def test_one_seed_gives_one_text_and_another_seed_another():
    def text(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), AUDIBLE)
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert text(3) == text(3) != text(4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_stand_for_no_text_are_never_chosen(temperature: float):
    """F08c: rows of the table beyond the tokenizer's tokens, even with the highest logits."""
    logits = np.concatenate([LOGITS, np.full(3, 50, np.float32)])
    silent = np.arange(8) >= 5
    sampler = Sampler(Sampling(temperature=temperature), silent)
    assert {sampler.choose(logits) for _ in range(50)} <= {0, 1, 2, 3, 4}


def test_the_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = np.float32([2.0, 1.9, -1.0, -1.1])
    sampler = Sampler(Sampling(repetition_penalty=1.5), np.zeros(4, np.bool_), seen=[0])
    assert sampler.choose(logits) == 1  # 2.0 / 1.5 < 1.9
    assert sampler.choose(logits) == 0  # now both were seen
    negative = Sampler(Sampling(repetition_penalty=1.5), np.zeros(4, np.bool_), seen=[2])
    assert negative.choose(np.float32([-9, -9, -1.0, -1.1])) == 3  # -1.0 * 1.5 < -1.1


def test_logits_are_not_changed():
    logits = LOGITS.copy()
    Sampler(Sampling(repetition_penalty=2.0), np.arange(5) == 1, seen=[3]).choose(logits)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_values_that_mean_nothing_are_refused(field: str, value: float):
    with pytest.raises(UsageError, match=field.replace("_", "-")):
        Sampling(**{field: value})
