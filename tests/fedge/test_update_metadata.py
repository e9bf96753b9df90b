"""Metadata words: exact sums, every bound named, sums that honest devices cannot make refused."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ConfigError, IntegrityError
from fedge.limits import BLOC_DEVICES_MAX, META_WORDS_MAX, STEPS_MAX, STRATA
from fedge.update.metadata import COUNT_MAX, LOSS_SUM_MAX, METADATA_WORDS, Metadata, pack, unpack

PLAIN = Metadata(
    contributors=1,
    steps=5,
    samples=20,
    labels=310,
    loss_sum=1200.5,
    norm=0.25,
    strata=np.arange(STRATA, dtype=np.uint32),
)
LARGEST = dataclasses.replace(
    PLAIN, steps=STEPS_MAX, samples=COUNT_MAX, labels=COUNT_MAX, loss_sum=LOSS_SUM_MAX - 1, norm=2.0
)


def summed(figures: list[Metadata]) -> Metadata:
    return unpack(np.sum([pack(one) for one in figures], axis=0, dtype=np.uint32), len(figures))


@given(
    st.lists(
        st.tuples(
            st.integers(0, STEPS_MAX),
            st.integers(0, COUNT_MAX),
            st.integers(0, COUNT_MAX),
            st.integers(0, 2**47),
            st.integers(0, 2**21),
        ),
        min_size=1,
        max_size=BLOC_DEVICES_MAX,
    )
)
@settings(max_examples=60, deadline=None)
def test_sums_decode_exactly(devices: list[tuple[int, int, int, int, int]]) -> None:
    figures = [
        dataclasses.replace(
            PLAIN, steps=steps, samples=samples, labels=labels, loss_sum=loss * 2**-16, norm=norm * 2**-20
        )
        for steps, samples, labels, loss, norm in devices
    ]
    total = summed(figures)
    assert total.contributors == len(figures)
    assert total.steps == sum(one.steps for one in figures)
    assert total.samples == sum(one.samples for one in figures)
    assert total.labels == sum(one.labels for one in figures)
    assert total.loss_sum == sum(loss for *_, loss, _ in devices) * 2**-16
    assert total.norm == sum(norm for *_, norm in devices) * 2**-20


def test_a_whole_bloc_at_its_bounds_does_not_wrap() -> None:
    total = summed([LARGEST] * BLOC_DEVICES_MAX)
    assert total.samples == BLOC_DEVICES_MAX * COUNT_MAX
    assert total.loss_sum == BLOC_DEVICES_MAX * LARGEST.loss_sum


def test_check_sums_travel_mod_2_to_the_32() -> None:
    high = dataclasses.replace(PLAIN, strata=np.full(STRATA, 2**32 - 1, np.uint32))
    assert np.array_equal(summed([high, PLAIN]).strata, PLAIN.strata - np.uint32(1))


def test_fits_the_wire() -> None:
    assert pack(PLAIN).dtype == np.uint32
    assert pack(PLAIN).size == METADATA_WORDS <= META_WORDS_MAX


def test_a_very_long_update_counts_as_twice_the_clip_bound() -> None:
    assert unpack(pack(dataclasses.replace(PLAIN, norm=1e9)), 1).norm == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contributors", 2),
        ("contributors", -1),
        ("steps", STEPS_MAX + 1),
        ("samples", COUNT_MAX + 1),
        ("samples", 2**31),
        ("labels", COUNT_MAX + 1),
        ("labels", -1),
        ("loss_sum", math.nan),
        ("loss_sum", math.inf),
        ("loss_sum", -0.1),
        ("loss_sum", LOSS_SUM_MAX),
        ("norm", -1.0),
    ],
)
def test_a_figure_past_its_bound_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError) as refusal:
        pack(dataclasses.replace(PLAIN, **{field: value}))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("place", "field"), list(enumerate(["contributors", "steps", "samples", "labels", "norm"]))
)
def test_a_sum_that_honest_devices_cannot_make_is_refused(place: int, field: str) -> None:
    words = pack(LARGEST)
    unpack(words, 1)
    words[place] += 1
    with pytest.raises(IntegrityError) as refusal:
        unpack(words, 1)
    assert refusal.value.field == field


def test_metadata_of_another_length_is_refused() -> None:
    with pytest.raises(IntegrityError, match="length"):
        unpack(pack(PLAIN)[:-1], 1)
