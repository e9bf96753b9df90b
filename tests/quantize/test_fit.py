"""Fitting a model: each matrix to what the fitted ones before it give; nearer to the source; twice the same."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize.blocks import linears_of
from quantize.fit import FITTED, Calibration, fit, own_text
from quantize.formats import FORMATS, decode, encode
from quantize.gptq import fit_matrix
from quantize.source import Source, load

SMALL = Calibration(rows=4, tokens=24)


def silent(phase: str, fraction: float) -> None:
    pass


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


def test_a_matrix_is_fitted_to_what_it_reads_once_those_before_it_are_fitted(tiny: Source) -> None:
    last = len(tiny.anatomy.layers) - 1
    module = linears_of(tiny.anatomy.layers[last])["mlp.down_proj"]
    weight, ids = module.weight.detach().clone(), own_text(tiny, SMALL)
    parts = fit(tiny, FORMATS["int4d"], silent, SMALL)
    read: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        tiny.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        x = read[0].reshape(-1, weight.shape[1])
        expected = fit_matrix(weight, x.T @ x / len(x), FORMATS["int4d"])
    handle.remove()
    found = parts[f"{tiny.anatomy.layers_path}.{last}.mlp.down_proj.weight"]
    assert all(np.array_equal(expected[suffix], found[suffix]) for suffix in found)


def test_nothing_stays_behind_on_the_model(tiny: Source) -> None:
    fit(tiny, FORMATS["int4d"], silent, SMALL)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())
