"""Fitting: less is lost where activations are, codes and scales are what the format can store, twice the same."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize.fit import FITTED, Calibration, fit, fit_matrix, own_text, weighted_error
from quantize.formats import BLOCK, FORMATS, decode, encode
from quantize.source import Source, load

SMALL = Calibration(rows=4, tokens=24)


def silent(phase: str, fraction: float) -> None:
    pass


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


@pytest.fixture
def tiny(tiny_model: Path) -> Source:
    return load(str(tiny_model))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = torch.log_softmax(model(ids).logits, -1)
    return found


def test_the_model_writes_the_same_text_for_the_same_seed(tiny: Source) -> None:
    first, again = own_text(tiny, SMALL), own_text(tiny, SMALL)
    assert torch.equal(first, again)
    assert not torch.equal(first, own_text(tiny, Calibration(rows=4, tokens=24, seed=1)))
    assert first.shape == (4, 24)


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_model_is_nearer_to_its_source_than_a_rounded_one(name: str, tiny: Source) -> None:
    fmt, ids = FORMATS[name], own_text(tiny, Calibration(rows=8, tokens=64, seed=9))
    before = logits(tiny.model, ids)
    rounded = copy.deepcopy(tiny.model)
    for parameter, value in rounded.named_parameters():
        if ".layers." in parameter and value.dim() == 2:
            value.data = torch.from_numpy(decode(encode(value.detach().numpy(), fmt), fmt))
    parts = fit(tiny, fmt, silent, Calibration(rows=512, tokens=32))  # little text leaves much to chance

    def divergence(model: Any) -> float:
        return float((before.exp() * (before - logits(model, ids))).sum(-1).mean())

    assert divergence(tiny.model) < 0.7 * divergence(rounded)
    assert len(parts) == 14
    for parameter, value in tiny.model.named_parameters():  # the model is the gates' reference
        if parameter in parts:
            assert np.array_equal(value.detach().numpy(), decode(parts[parameter], fmt))


def test_a_fit_is_the_same_twice(tiny_model: Path) -> None:
    found = [fit(load(str(tiny_model)), FORMATS["int4d"], silent, SMALL) for _ in range(2)]
    for name, parts in found[0].items():
        assert all(np.array_equal(parts[suffix], found[1][name][suffix]) for suffix in parts), name
