"""Fitting a matrix: less is lost where activations are, each step of the search pays, the format holds the result."""

import numpy as np
import pytest
import torch

from quantize import gptq
from quantize.fit import FITTED
from quantize.formats import BLOCK, FORMATS, decode, encode
from quantize.gptq import fit_matrix, weighted_error


def matrix_and_moments(rows: int = 48, columns: int = 6 * BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and second moments of activations that lie near a few directions, some much larger than others."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw) * 0.03
    few = torch.randn(3000, columns // 4, generator=draw) @ torch.randn(columns // 4, columns, generator=draw)
    x = (few + torch.randn(3000, columns, generator=draw)) * torch.exp(torch.randn(columns, generator=draw))
    return weight, x.T @ x / len(x)


@pytest.mark.parametrize("name", FITTED)
def test_products_lose_a_quarter_of_what_rounding_loses(name: str) -> None:
    weight, moments = matrix_and_moments()
    fmt = FORMATS[name]
    nearest = weighted_error(weight, encode(weight.numpy(), fmt), fmt, moments)
    fitted = weighted_error(weight, fit_matrix(weight, moments, fmt), fmt, moments)
    assert fitted < 0.25 * nearest


@pytest.mark.parametrize("name", FITTED)
def test_parts_are_those_of_the_format(name: str) -> None:
    weight, moments = matrix_and_moments(rows=40, columns=7 * BLOCK)  # an odd count: zeros end in half a byte
    fmt = FORMATS[name]
    parts = fit_matrix(weight, moments, fmt)
    assert {n: (a.dtype.name, a.shape) for n, a in parts.items()} == {
        part.suffix: (part.dtype, part.shape(40, 7 * BLOCK)) for part in fmt.parts
    }
    assert np.isfinite(decode(parts, fmt)).all()
    assert (parts["s"] > 0).all()


@pytest.mark.parametrize("name", FITTED)
def test_columns_that_are_never_active_and_constant_blocks_do_no_harm(name: str) -> None:
    weight, moments = matrix_and_moments()
    weight[:, :BLOCK] = 0.25
    moments[BLOCK + 3] = moments[:, BLOCK + 3] = 0
    parts = fit_matrix(weight, moments, FORMATS[name])
    dense = decode(parts, FORMATS[name])
    assert np.abs(dense[:, :BLOCK] - 0.25).max() < 0.05
    assert np.abs(dense - weight.numpy()).max() < 0.1


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(("step", "without", "gain"), [("_SWEEPS", 0, 0.1), ("_STARTS", 1, 0.01)])
def test_every_step_of_the_search_pays(
    name: str, step: str, without: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = matrix_and_moments()
    fmt = FORMATS[name]
    whole = weighted_error(weight, fit_matrix(weight, moments, fmt), fmt, moments)
    monkeypatch.setattr(gptq, step, without)
    assert whole < (1 - gain) * weighted_error(weight, fit_matrix(weight, moments, fmt), fmt, moments)


def test_a_matrix_on_the_grid_stays_there() -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 16, (8, 2 * BLOCK))
    codes[:, ::BLOCK], codes[:, 1::BLOCK] = 0, 15
    weight = torch.from_numpy((codes * 0.25 - 1.5).astype(np.float32))
    _, moments = matrix_and_moments(columns=2 * BLOCK)
    assert np.array_equal(
        decode(fit_matrix(weight, moments, FORMATS["int4d"]), FORMATS["int4d"]), weight.numpy()
    )
