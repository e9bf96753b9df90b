"""A trace that torch need not look at twice is used as it is; the graph is the one that torch's way would give."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from torch.onnx._internal.exporter._registration import ONNXRegistry

from quantize import joint, tracing
from quantize.graph import canonical, fold
from quantize.joint import dimensions, traced_graph


def graph_of(function: Callable[..., Any]) -> bytes:
    b, s = dimensions()
    arguments = (torch.randn(2, 13, 8), torch.randn(2, 13, 8), torch.randn(4, 8))
    model = traced_graph(
        function, arguments, ({0: b, 1: s}, {0: b, 1: s}, None), ("x", "gy", "w"), ("y", "gx")
    )
    return canonical(fold(model)).SerializeToString(deterministic=True)


def with_gradient(x: Tensor, gy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes are wanted of inner tensors too: of a product in two axes, and of its gradient."""
    x = x.detach().requires_grad_()
    y = torch.tanh(x @ w.t()).flatten(0, 1).repeat(1, 2).view(x.shape[0], -1, 8)
    return y, torch.autograd.grad(y, x, gy)[0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each trace was used as it is."""
    used: list[bool] = []

    def noted(*given: Any) -> Any:
        program = tracing.program_of(*given)
        used.append(program is not None)
        return program

    monkeypatch.setattr(joint, "program_of", noted)
    return used


def test_the_graph_is_the_one_of_torchs_own_way(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = graph_of(with_gradient)
    assert asked == [True]
    monkeypatch.setattr(joint, "program_of", lambda *_: None)
    assert graph_of(with_gradient) == ours


def own_tensor(x: Tensor, gy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * torch.tensor([1.0, 2.0] * 4), gy


def changed_in_place(x: Tensor, gy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone().mul_(2.0).add_(gy), gy * 1.0


def one_length(x: Tensor, gy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.reshape(-1, int(x.shape[1]), 8) + 1.0, gy * 1.0


def test_torch_lifts_the_tensors_of_a_trace(asked: list[bool]) -> None:
    assert graph_of(own_tensor)
    assert asked == [False]


def test_what_is_changed_in_place_becomes_a_value_of_its_own(asked: list[bool]) -> None:
    session = ort.InferenceSession(graph_of(changed_in_place), providers=["CPUExecutionProvider"])
    assert asked == [False]
    x, gy = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    feeds = {"x": x.numpy(), "gy": gy.numpy(), "w": np.zeros((4, 8), np.float32)}
    y, gx = session.run(["y", "gx"], feeds)
    np.testing.assert_allclose(y, (2 * x + gy).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(gx, gy.numpy())


def test_torch_refuses_code_for_one_length(asked: list[bool]) -> None:
    with pytest.raises(Exception, match=r"(?i)length|constraint|specialized"):
        graph_of(one_length)
    assert asked == [False]


def test_translations_are_read_once_and_a_graph_adds_none_to_them() -> None:
    plain = ONNXRegistry.from_torchlib

    def sizes() -> dict[Any, int]:
        return {name: len(found) for name, found in tracing._table(plain, tracing.OPSET).functions.items()}

    graph_of(with_gradient)
    before, reads = sizes(), tracing._table.cache_info().misses
    graph_of(with_gradient)
    assert sizes() == before
    assert tracing._table.cache_info().misses == reads == 1
    assert ONNXRegistry.from_torchlib == plain


def test_a_torch_that_keeps_its_table_elsewhere_gives_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = graph_of(with_gradient)
    monkeypatch.setattr(tracing, "_registry", lambda: None)
    assert graph_of(with_gradient) == expected
