"""The arithmetic that a graph does with a stored matrix, against plain numpy on the decoded one."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fedge.release import OPERATORS_ALLOWED
from quantize.decode_lowering import DecodeLowering
from quantize.formats import FORMATS, decode, encode
from quantize.graph import GraphWriter, operators, tensor_input
from quantize.lower import Matrix, lower
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR, LINEAR_DX

ROWS, COLUMNS = 96, 192  # six blocks of 32, three of 64: an even and an odd count
EXACT = sorted(set(FORMATS) - {"int8c"})


def matrix(name: str, columns: int = COLUMNS, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parts under the names W.*, and the matrix that they mean."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((ROWS, columns)) * np.exp(random.standard_normal((ROWS, 1)))
    parts = encode(weight.astype(np.float32), FORMATS[name])
    return {f"W.{suffix}": part for suffix, part in parts.items()}, decode(parts, FORMATS[name])


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> np.ndarray:
    assert operators(model) <= OPERATORS_ALLOWED
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[
        0
    ]
    return found


def graph(kind: str, columns: int, *, twice: bool = False) -> onnx.ModelProto:
    """One placeholder, or with `twice` the product and its way back in one graph, as block_bwd.onnx has them."""
    writer, inputs = GraphWriter(), [tensor_input("W", "float32", [ROWS, columns])]
    width = ROWS if kind == LINEAR_DX else columns
    inputs.append(tensor_input("x", "float32", ["B", "S", width]))
    if twice:
        product = writer.add(LINEAR, ["x", "W"], domain=DOMAIN)
        writer.add(LINEAR_DX, [product, "W"], "y", domain=DOMAIN)
    else:
        writer.add(kind, ["x", "W"], "y", domain=DOMAIN)
    return writer.model(inputs, [tensor_input("y", "float32", ["B", "S", None])])  # type: ignore[list-item]


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("columns", [COLUMNS, 320])
@pytest.mark.parametrize("name", EXACT)
def test_products_are_those_of_the_decoded_matrix(name: str, columns: int) -> None:
    parts, dense = matrix(name, columns)
    x = np.random.default_rng(1).standard_normal((2, 5, columns)).astype(np.float32)
    g = np.random.default_rng(2).standard_normal((2, 5, ROWS)).astype(np.float32)
    shapes = {"W": (ROWS, columns)}
    assert apart(run(lower(graph(LINEAR, columns), shapes, name), {"x": x, **parts}), x @ dense.T) < 2e-6
    assert apart(run(lower(graph(LINEAR_DX, columns), shapes, name), {"x": g, **parts}), g @ dense) < 2e-6
    both = lower(graph(LINEAR, columns, twice=True), shapes, name)
    assert apart(run(both, {"x": x, **parts}), x @ dense.T @ dense) < 2e-6


def test_integer_products_round_activations_and_nothing_else() -> None:
    parts, dense = matrix("int8c")
    x = np.random.default_rng(1).standard_normal((2, 5, COLUMNS)).astype(np.float32)
    x[0, 1] = 0
    x[1, 2] *= 1000
    size = np.abs(x).max(-1, keepdims=True) / 127
    rounded = np.rint(x / np.maximum(size, 1e-30)) * size
    model = lower(graph(LINEAR, COLUMNS), {"W": dense.shape}, "int8c")
    assert apart(run(model, {"x": x, **parts}), rounded @ dense.T) < 1e-5
    assert apart(rounded, x) > 1e-3
    g = np.random.default_rng(2).standard_normal((2, 5, ROWS)).astype(np.float32)
    back = run(lower(graph(LINEAR_DX, COLUMNS), {"W": dense.shape}, "int8c"), {"x": g, **parts})
    assert 1e-4 < apart(back, g @ dense) < 0.02


def test_a_token_of_int8c_does_not_depend_on_its_neighbours() -> None:
    parts, dense = matrix("int8c")
    x = np.random.default_rng(1).standard_normal((1, 6, COLUMNS)).astype(np.float32)
    model = lower(graph(LINEAR, COLUMNS), {"W": dense.shape}, "int8c")
    together = run(model, {"x": x * np.float32([[[1], [9], [1], [50], [1], [1]]]), **parts})
    assert np.array_equal(together[:, 2:3], run(model, {"x": x[:, 2:3], **parts}))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_decoding_reads_the_same_bytes(name: str) -> None:
    parts, dense = matrix(name)
    x = np.random.default_rng(3).standard_normal((1, 3, COLUMNS)).astype(np.float32)
    low = DecodeLowering({"W": Matrix(ROWS, COLUMNS, FORMATS[name])}, {"W": 0})
    model = low.run(graph(LINEAR, COLUMNS))
    feeds = {n: parts[n].reshape(shape) for n, (_, shape) in low.weights.items()}
    found = run(model, {"x": x, **feeds})
    if name == "int8c":
        trained = run(lower(graph(LINEAR, COLUMNS), {"W": dense.shape}, name), {"x": x, **parts})
        assert np.array_equal(found, trained)
    else:
        assert apart(found, x @ dense.T) < 2e-6


@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_rows_of_an_embedding(shape: tuple[int, ...]) -> None:
    parts, dense = matrix("int8g")
    writer = GraphWriter()
    writer.add(EMBEDDING, ["ids", "W"], "y", domain=DOMAIN)
    inputs = [tensor_input("ids", "int64", [*"ab"[: len(shape)]])]
    inputs.append(tensor_input("W", "float32", ["V", COLUMNS]))
    model = lower(
        writer.model(inputs, [tensor_input("y", "float32", [None] * (len(shape) + 1))]),
        {"W": ("V", COLUMNS)},
        "int8g",
    )  # type: ignore[list-item]
    ids = np.random.default_rng(4).integers(0, ROWS, shape)
    assert np.array_equal(run(model, {"ids": ids, **parts}), dense[ids])
