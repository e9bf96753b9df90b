"""Weight formats: what is exact must be exact, what is fitted must be near, bytes lie as MatMulNBits reads them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quantize.formats import BLOCK, FORMATS, assemble, decode, encode

INT4D, INT8G = FORMATS["int4d"], FORMATS["int8g"]


def grid(levels: list[list[int]], step: float, low: float) -> np.ndarray:
    """Blocks of 32 weights on the grid low + step * level, as a dequantised Q4_1 tensor has them."""
    codes = np.array([np.resize(row, BLOCK) for row in levels], np.float32)
    return codes * np.float32(np.float16(step)) + np.float32(np.float16(low))


@pytest.mark.parametrize(
    "levels",
    [
        list(range(16)),
        [0, 15],
        [3, 9],
        [0, 2, 5],
        [1, 4, 8, 15],
        [0, 5, 10, 15],
        [0, 3, 5],
        [7],
        [0, 6, 10, 15],
        [0, 7, 15],
    ],
    ids=str,
)
@pytest.mark.parametrize(("step", "low"), [(0.0123, -0.09), (1.7e-4, 2.5e-3), (3.0, -20.0)])
def test_a_4_bit_grid_is_found_again_even_when_levels_are_missing(
    levels: list[int], step: float, low: float
) -> None:
    weight = grid([levels], step, low)
    again = decode(encode(weight, INT4D), INT4D)
    assert np.abs(again - weight).max() <= 2e-6 * np.abs(weight).max()


def test_random_q4_1_matrices_come_back() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (64, 8, BLOCK))
    codes[::3] = np.minimum(codes[::3], 4)  # a third of the rows use five levels only
    scale = random.uniform(1e-3, 0.1, (64, 8)).astype(np.float16).astype(np.float32)
    low = random.uniform(-0.5, 0.1, (64, 8)).astype(np.float16).astype(np.float32)
    weight = (codes * scale[..., None] + low[..., None]).astype(np.float32).reshape(64, -1)
    again = decode(encode(weight, INT4D), INT4D)
    assert np.linalg.norm(again - weight) <= 1e-6 * np.linalg.norm(weight)


def test_an_ordinary_matrix_is_within_half_a_step() -> None:
    weight = np.random.default_rng(1).standard_normal((16, 96)).astype(np.float32)
    blocks = weight.reshape(16, 3, BLOCK)
    span = blocks.max(-1) - blocks.min(-1)
    for name, step in (
        ("int4d", span / 15),
        ("int4gz", span / 15 * 2),  # its zero is a whole number: half a step more at the ends
        ("int8g", np.abs(blocks).max(-1) / 127),
        ("int8d", span / 255 * 2),  # scale and offset in half precision move the ends by a fraction of a step
        ("int8c", np.repeat(np.abs(weight).max(-1, keepdims=True) / 127, 3, 1)),
    ):
        miss = np.abs(decode(encode(weight, FORMATS[name]), FORMATS[name]) - weight).reshape(blocks.shape)
        assert (miss <= step[..., None] * 0.51).all(), name


MATRICES = arrays.arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


@given(MATRICES, st.sampled_from(sorted(FORMATS)))
@settings(max_examples=60, deadline=None)
def test_encoding_what_was_decoded_changes_nothing(weight: np.ndarray, name: str) -> None:
    parts = encode(weight, FORMATS[name])
    once = decode(parts, FORMATS[name])
    twice = decode(encode(once, FORMATS[name]), FORMATS[name])
    limit = 1e-5 * float(np.abs(once).max())
    if name in (
        "int8d",
        "int4gz",
    ):  # rounding may leave the first level of a block unused, and so move its grid
        limit += 1.01 * float(parts["s"].max())
    assert np.abs(twice - once).max() <= limit


@given(MATRICES, st.sampled_from(["int4d", "int8d"]))
@settings(max_examples=60, deadline=None)
def test_no_weight_lies_outside_a_grid_with_an_offset(weight: np.ndarray, name: str) -> None:
    """Also where the offset is large beside the spread and half precision moves it by many steps."""
    parts = encode(weight, FORMATS[name])
    once, scale = decode(parts, FORMATS[name]), np.repeat(parts["s"].astype(np.float32), BLOCK, axis=1)
    levels = 2 ** FORMATS[name].bits - 1
    rounding = levels * (2**-11 * scale + 2**-24)  # of the scale to half precision
    assert (np.abs(once - weight) <= 0.5 * scale + rounding + 1e-6 * np.abs(weight)).all()


def test_the_low_nibble_comes_first() -> None:
    codes = np.arange(BLOCK, dtype=np.uint8)[None, None] % 16
    parts = assemble(codes, np.ones((1, 1), np.float32), None, INT4D)
    assert parts["m"] == -8
    assert parts["q"][0, :3].tolist() == [0x10, 0x32, 0x54]
    assert decode(parts, INT4D)[0, :4].tolist() == [-8, -7, -6, -5]


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 0.3])
def test_a_constant_block_has_a_usable_scale(value: float) -> None:
    weight = np.full((1, 2 * BLOCK), value, np.float32)
    for fmt in FORMATS.values():
        parts = encode(weight, fmt)
        assert (parts["s"] != 0).all() or fmt.name == "nf4"  # its absmax divides nothing
        assert np.allclose(
            decode(parts, fmt), weight, rtol=5e-4 if fmt.name in ("int8g", "int4gz") else 1e-6
        ), fmt.name
