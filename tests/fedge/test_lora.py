"""The adapter's order of numbers and its frozen half."""

import hashlib

import numpy as np
import pytest

from fedge.errors import DataError, UnsupportedError
from fedge.lora import AdapterLayout, LoraConfig, frozen_a

SHAPES = {"self_attn.v_proj": (6, 16), "self_attn.q_proj": (12, 16)}
SEED = bytes(range(16))
KNOWN = "d903e64aecd06fc68588a7fc65dbf91b040673777e0ffb504d476696387b030d"


def layout() -> AdapterLayout:
    return AdapterLayout.of(2, SHAPES, 4)


def test_the_order_is_layer_by_layer_with_sorted_modules() -> None:
    assert list(layout().b_shapes) == [
        "L0/self_attn.q_proj.B",
        "L0/self_attn.v_proj.B",
        "L1/self_attn.q_proj.B",
        "L1/self_attn.v_proj.B",
    ]
    assert layout().numbers == 2 * 4 * (12 + 6)
    assert layout().a_shapes["L1/self_attn.v_proj.A"] == (4, 16)


def test_split_gives_views_and_join_takes_them_back() -> None:
    vector = np.arange(layout().numbers, dtype=np.float32)
    parts = layout().split(vector)
    assert all(np.shares_memory(part, vector) for part in parts.values())
    assert parts["L0/self_attn.v_proj.B"][0, 0] == 48
    np.testing.assert_array_equal(layout().join(dict(reversed(parts.items()))), vector)


def test_join_and_split_refuse_what_does_not_fit() -> None:
    parts = layout().split(np.zeros(layout().numbers, np.float32))
    with pytest.raises(DataError, match=r"L0/self_attn\.q_proj\.B"):
        layout().join({name: part for name, part in parts.items() if name != "L0/self_attn.q_proj.B"})
    with pytest.raises(DataError, match="surplus"):
        layout().join({**parts, "surplus": np.zeros(1, np.float32)})
    with pytest.raises(DataError, match=r"L1/self_attn\.v_proj\.B"):
        layout().join({**parts, "L1/self_attn.v_proj.B": np.zeros((4, 6), np.float32)})
    with pytest.raises(DataError, match="numbers"):
        layout().split(np.zeros(layout().numbers + 1, np.float32))


@pytest.mark.parametrize(("layers", "r"), [(0, 4), (2, 0), (2, 7), (10_000_000, 4)])
def test_sizes_out_of_range_are_refused(layers: int, r: int) -> None:
    with pytest.raises(UnsupportedError):
        AdapterLayout.of(layers, SHAPES, r)


def test_frozen_a_has_orthonormal_rows() -> None:
    a = frozen_a(SEED, "L0/self_attn.q_proj.A", 8, 576).astype(np.float64)
    np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-7)
    square = frozen_a(SEED, "x", 16, 16).astype(np.float64)
    np.testing.assert_allclose(square @ square.T, np.eye(16), atol=1e-6)


def test_frozen_a_is_the_same_on_every_machine() -> None:
    """Known answer; elementwise IEEE arithmetic leaves no room for another one."""
    data = frozen_a(SEED, "L3/self_attn.v_proj.A", 8, 576).astype("<f4").tobytes()
    assert hashlib.sha256(data).hexdigest() == KNOWN


def test_frozen_a_agrees_with_householder_qr() -> None:
    """The same row space and the same rows, up to the sign that ours fixes, as LAPACK's QR of the same draws."""
    a = frozen_a(SEED, "n", 3, 5)
    public = b"fedge frozen A v1\x00" + SEED + b"n|3|5"
    draws = np.frombuffer(hashlib.shake_256(public).digest(8 * 15), "<i2").reshape(3, 5, 4).sum(2)
    q, r = np.linalg.qr(draws.T.astype(np.float64))
    np.testing.assert_allclose(a, (q * np.sign(np.diag(r))).T, atol=1e-6)


def test_every_matrix_of_a_seed_is_another_one() -> None:
    tensors = layout().frozen(SEED)
    assert tensors.keys() == layout().a_shapes.keys()
    assert len({tensor.tobytes() for tensor in tensors.values()}) == len(tensors)
    assert not np.array_equal(frozen_a(bytes(16), "n", 2, 4), frozen_a(SEED, "n", 2, 4))
    with pytest.raises(DataError, match="a_seed"):
        frozen_a(b"short", "n", 2, 4)


def test_the_scale_is_computed_once_for_both_kinds() -> None:
    assert LoraConfig(r=16, alpha=16).scale == 1.0
    assert LoraConfig(r=16, alpha=16, rslora=True).scale == 4.0
