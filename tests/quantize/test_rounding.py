"""int8c rounds activations on purpose: its graphs are judged without that, and with it by the gradient as a whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper
from test_gates import Change, examined, nothing, swapped

from fedge.release import MANIFEST, Manifest
from quantize import gates
from quantize.bundle import quantize
from quantize.formats import FORMATS, decode, encode
from quantize.gates import GateError
from quantize.graph import GraphWriter, tensor_input
from quantize.lower import lower
from quantize.placeholder import DOMAIN, LINEAR
from quantize.runner import session
from quantize.unrounded import without_rounding


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8c") / "bundle"
    quantize(
        str(tiny_model), out, tiny.PUBLISHER, lora=tiny.LORA, weights_format="int8c", head_rows=tiny.HEAD_ROWS
    )
    return out


@pytest.fixture
def examine(bundle: Path, tiny_model: Path, tmp_path: Path) -> Callable[[Change], dict[str, float]]:
    return lambda change: examined(bundle, tiny_model, tmp_path / "copy", change)


# ---------------------------------------------------------------- gates
def test_without_its_rounding_it_is_held_to_the_bounds_of_the_exact_formats(
    bundle: Path, examine: Callable[[Change], dict[str, float]]
) -> None:
    found = msgspec.json.decode((bundle / MANIFEST).read_bytes(), type=Manifest).gates
    assert found["cut_gradient_error"] <= 1e-5
    assert found["gradient_error"] <= 1e-5
    assert found["decode_error"] <= 1e-6
    assert 1e-3 < found["rounded_gradient_error"] < 0.1
    assert 0.99 < found["rounded_gradient_cosine"] <= 1
    assert examine(nothing) == found


def steps_of(share: float, *graphs: str) -> Change:
    """Activations get so much of the steps that they should have on either side of their zero."""

    def change(folder: Path) -> None:
        for graph in graphs:
            model, found = onnx.load(str(folder / graph)), 0
            for tensor in constants(model):
                value = numpy_helper.to_array(tensor)
                if value.dtype == np.float32 and np.allclose(value, 1 / 127, rtol=1e-6, atol=0):
                    tensor.CopyFrom(numpy_helper.from_array(value / np.float32(share), tensor.name))
                    found += 1
            assert found
            (folder / graph).write_bytes(model.SerializeToString())

    return change


def zero_moved(folder: Path) -> None:
    """Products subtract another zero than the codes are about."""
    model = onnx.load(str(folder / "block_bwd.onnx"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(96, np.uint8), "moved"))
    for node in model.graph.node:
        if node.op_type == "MatMulIntegerToFloat":
            node.input[4] = "moved"
    (folder / "block_bwd.onnx").write_bytes(model.SerializeToString())


def constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield node.attribute[0].t


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (swapped("block_bwd.onnx", "Neg", "Identity"), "cut_gradient_error"),
        (swapped("infer.onnx", "Cos", "Sin"), "decode_error"),
        (zero_moved, "rounded_gradient_angle"),
        (steps_of(1 / 64, "block_fwd.onnx", "block_bwd.onnx"), "rounded_gradient_angle"),
    ],
)
def test_a_planted_mistake_is_named(
    examine: Callable[[Change], dict[str, float]], change: Change, gate: str
) -> None:
    with pytest.raises(GateError, match=gate):
        examine(change)


def test_the_whole_gradient_is_judged_by_length_and_by_direction() -> None:
    draw = np.random.default_rng(0)
    truth = {name: draw.standard_normal((40, 50)).astype(np.float32) for name in "ab"}
    truth["b"] *= np.float32(1e-3)
    noise = {name: draw.standard_normal((40, 50)).astype(np.float32) for name in "ab"}
    noisy = {"a": truth["a"] + np.float32(0.2) * noise["a"], "b": noise["b"] * np.float32(1e-3)}
    found = gates.rounding((1.0, noisy), (1.05, truth), 0.2)  # b alone is all noise, and weighs nothing
    assert found["rounded_gradient_error"] == pytest.approx(0.2, rel=0.05)
    assert found["rounded_gradient_cosine"] == pytest.approx(1 / np.sqrt(1.04), abs=0.01)
    assert found["rounded_loss_error"] == pytest.approx(0.05)
    with pytest.raises(GateError, match="rounded_loss_error"):
        gates.rounding((1.0, noisy), (1.5, truth), 0.2)
    with pytest.raises(GateError, match="rounded_gradient_error"):
        gates.rounding((1.0, {n: 2 * v for n, v in truth.items()}), (1.0, truth), 0.2)
    with pytest.raises(GateError, match="rounded_gradient_angle"):
        gates.rounding((1.0, {n: -v for n, v in truth.items()}), (1.0, truth), 0.2)
    with pytest.raises(GateError, match="rounded_gradient_angle"):
        gates.rounding((1.0, {n: 0 * v for n, v in truth.items()}), (1.0, truth), 0.2)


# ---------------------------------------------------------------- arithmetic
def pair_of_matrices() -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """A wide and a narrow matrix in one graph, x that has one large number a row, and what the wide one should give."""
    draw, writer = np.random.default_rng(0), GraphWriter()
    x = draw.standard_normal((1, 6, 192)).astype(np.float32)
    x[..., 7] = 400
    writer.add(LINEAR, ["x", "W"], "y", domain=DOMAIN)
    writer.add(LINEAR, ["y", "V"], "z", domain=DOMAIN)
    shapes = {"W": (64, 192), "V": (32, 64)}
    inputs = [tensor_input("x", "float32", ["B", "S", 192])]
    inputs += [tensor_input(name, "float32", list(shape)) for name, shape in shapes.items()]
    outputs = [tensor_input(name, "float32", ["B", "S", None]) for name in "yz"]  # type: ignore[list-item]
    feeds: dict[str, np.ndarray] = {"x": x}
    for name, shape in shapes.items():
        weight = draw.standard_normal(shape).astype(np.float32)
        if name == "W":
            weight[:, 7] = 0  # what is large does not count, as for a token that attends to nothing
        parts = encode(weight, FORMATS["int8c"])
        feeds |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
        if name == "W":
            expected = x @ decode(parts, FORMATS["int8c"]).T
    return lower(writer.model(inputs, outputs), shapes, "int8c"), feeds, expected


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_what_the_widest_matrix_reads_is_rounded_twice() -> None:
    """One number of 400 leaves the others, about 1, no more than a step; once would be wrong by the whole of it."""
    model, feeds, expected = pair_of_matrices()
    y, z = session(model.SerializeToString()).run(None, feeds)
    assert apart(y, expected) < 0.02
    size = np.abs(feeds["x"]).max(-1, keepdims=True) / 127
    once = np.rint(feeds["x"] / size) * size
    weight = decode({"q": feeds["W.q"], "s": feeds["W.s"]}, FORMATS["int8c"])
    assert apart(once @ weight.T, expected) > 0.5
    narrow = decode({"q": feeds["V.q"], "s": feeds["V.s"]}, FORMATS["int8c"])
    assert 1e-3 < apart(z, y @ narrow.T) < 0.02, "the narrow one is rounded once"


def test_the_copy_without_rounding_multiplies_floats() -> None:
    model, feeds, expected = pair_of_matrices()
    y, z = session(without_rounding(model).SerializeToString()).run(None, feeds)
    assert apart(y, expected) < 1e-5
    narrow = decode({"q": feeds["V.q"], "s": feeds["V.s"]}, FORMATS["int8c"])
    assert apart(z, y @ narrow.T) < 1e-5
