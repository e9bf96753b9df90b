"""Products by several constant matrices at once: the same as one after the other, with what is added to them."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from fedge.release import OPERATORS_ALLOWED
from quantize.decode import centred_matrices
from quantize.decode_lowering import DecodeLowering, joined_node
from quantize.formats import FORMATS, assemble, decode, encode
from quantize.graph import GraphWriter, operators, tensor_input
from quantize.lower import Matrix

COLUMNS = 192  # six blocks of 32, three of 64
ROWS = {"V": 32, "W": 64}


def joined(
    name: str, parts: dict[str, dict[str, npt.NDArray]], centred: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """y = x [V; W]^T + a + b, with the parts as constants."""
    writer = GraphWriter()
    writer.nodes.append(joined_node("x", list(ROWS), ["a", "b"], "y"))
    inputs = [tensor_input("x", "float32", ["B", "S", COLUMNS])]
    inputs += [tensor_input(w, "float32", [rows, COLUMNS]) for w, rows in ROWS.items()]
    inputs += [tensor_input("a", "float32", [sum(ROWS.values())])]
    inputs += [tensor_input("b", "float32", ["B", "S", sum(ROWS.values())])]
    model = writer.model(inputs, [tensor_input("y", "float32", ["B", "S", sum(ROWS.values())])])
    matrices = {w: Matrix(rows, COLUMNS, FORMATS[name]) for w, rows in ROWS.items()}
    low = DecodeLowering(matrices, dict.fromkeys(ROWS, 0), centred=centred)
    model = low.run(model)
    constants = {f"{w}.{suffix}": value for w in ROWS for suffix, value in parts[w].items()}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
        shape = low.weights[value.name][1]
        tensor = onnx.numpy_helper.from_array(constants[value.name].reshape(shape), value.name)
        model.graph.initializer.append(tensor)
    return model


def run(model: onnx.ModelProto, **feeds: npt.NDArray) -> npt.NDArray:
    assert operators(model) <= OPERATORS_ALLOWED
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: npt.NDArray = session.run(None, feeds)[0]
    return found


def feeds(tokens: int) -> dict[str, Any]:
    random, width = np.random.default_rng(3), sum(ROWS.values())
    shapes = {"x": (1, tokens, COLUMNS), "a": (width,), "b": (1, tokens, width)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_matrices_that_read_the_same_are_one_product(name: str, tokens: int) -> None:
    random, fmt = np.random.default_rng(0), FORMATS[name]
    parts = {
        w: encode(random.standard_normal((rows, COLUMNS)).astype(np.float32) + 0.1, fmt)
        for w, rows in ROWS.items()
    }
    model, given = joined(name, parts), feeds(tokens)
    dense = np.concatenate([decode(parts[w], fmt) for w in ROWS])
    expected = given["x"] @ dense.T + given["a"] + given["b"]
    found = run(model, **given)
    bound = 2e-2 if name == "int8c" else 2e-6  # which rounds activations
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)
    if fmt.decoding == "MatMulNBits":
        assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 1


def centred_parts(rows: int, seed: int, shift: float = 0.0) -> dict[str, npt.NDArray]:
    """On the grid of Q4_0 about 0, offsets written out; `shift` moves one block's offset by so many steps."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (rows, COLUMNS // 32, 32)).astype(np.uint8)
    scale = random.uniform(0.01, 0.1, (rows, COLUMNS // 32)).astype(np.float16).astype(np.float32)
    low = -8 * scale
    low[0, 0] += shift * scale[0, 0]
    return assemble(codes, scale, low, FORMATS["int4d"])


def test_offsets_that_say_nothing_are_left_out_and_no_bit_changes() -> None:
    parts = {w: centred_parts(rows, rows) for w, rows in ROWS.items()}
    tensors = {f"{w}.w.{suffix}": value for w in ROWS for suffix, value in parts[w].items()}
    found = centred_matrices(tensors, FORMATS["int4d"])
    assert found == {f"{w}.w" for w in ROWS}
    with_offsets, without = joined("int4d", parts), joined("int4d", parts, frozenset(ROWS))
    assert "com.microsoft:FusedMatMul" in operators(with_offsets)
    assert "com.microsoft:FusedMatMul" not in operators(without)
    assert np.array_equal(run(with_offsets, **feeds(3)), run(without, **feeds(3)))


def test_one_block_that_is_not_centred_keeps_the_offsets_of_the_whole_product() -> None:
    parts = {"V": centred_parts(ROWS["V"], 0), "W": centred_parts(ROWS["W"], 1, shift=0.5)}
    tensors = {f"{w}.w.{suffix}": value for w in ROWS for suffix, value in parts[w].items()}
    assert centred_matrices(tensors, FORMATS["int4d"]) == {"V.w"}
    model, given = joined("int4d", parts, frozenset({"V"})), feeds(2)
    dense = np.concatenate([decode(parts[w], FORMATS["int4d"]) for w in ROWS])
    expected = given["x"] @ dense.T + given["a"] + given["b"]
    assert np.linalg.norm(run(model, **given) - expected) <= 2e-6 * np.linalg.norm(expected)


def test_formats_without_offsets_have_none_to_leave_out() -> None:
    parts = encode(
        np.random.default_rng(0).standard_normal((32, COLUMNS)).astype(np.float32), FORMATS["int8g"]
    )
    assert centred_matrices({f"V.w.{s}": v for s, v in parts.items()}, FORMATS["int8g"]) == frozenset()
