"""The rotation: against scipy's Hadamard matrix, its own inverse, keeps length, spreads a spike over the vector."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.linalg import hadamard

from fedge.update.rotation import BLOCK, forward, inverse, padded_length

SEED = bytes(range(16))


def test_is_public_signs_then_the_strided_hadamard_matrix_of_scipy() -> None:
    vector = np.random.default_rng(1).standard_normal(3 * BLOCK).astype(np.float32)
    stream = (
        Cipher(algorithms.AES(SEED), modes.CTR(b"fedge signs v1\0\0"))
        .encryptor()
        .update(bytes(3 * BLOCK // 8))
    )
    signs = 1 - 2.0 * np.unpackbits(np.frombuffer(stream, np.uint8))
    expected = hadamard(BLOCK) / 32 @ (signs * vector).reshape(BLOCK, 3)
    np.testing.assert_allclose(forward(vector, SEED), expected.reshape(-1), atol=1e-5)


@pytest.mark.parametrize("numbers", [1, 1023, 1024, 1025, 5000, 184_320])
def test_inverse_undoes_forward_at_every_length(numbers: int) -> None:
    vector = np.random.default_rng(numbers).standard_normal(numbers).astype(np.float32)
    rotated = forward(vector, SEED)
    assert rotated.size == padded_length(numbers)
    assert rotated.size % BLOCK == 0
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    np.testing.assert_allclose(inverse(rotated, SEED, numbers), vector, atol=1e-5)


def test_is_linear_and_depends_on_the_seed() -> None:
    one, two = np.random.default_rng(2).standard_normal((2, 4096)).astype(np.float32)
    np.testing.assert_allclose(forward(one + two, SEED), forward(one, SEED) + forward(two, SEED), atol=1e-5)
    other = forward(one, bytes(16))
    assert abs(np.corrcoef(forward(one, SEED), other)[0, 1]) < 0.08


def test_spreads_one_layer_over_the_whole_vector() -> None:
    vector = np.zeros(64 * BLOCK, np.float32)
    vector[:1024] = np.random.default_rng(3).standard_normal(1024)
    rotated = forward(vector, SEED)
    pieces = np.linalg.norm(rotated.reshape(64, -1), axis=1)
    assert pieces.max() < 2 * pieces.min()
