"""Every gate, seen red: a mistake is planted in a good bundle's files, and the gate that guards it must name it."""

import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, open_manifest
from quantize.fit import FITTED, fit
from quantize.formats import FORMATS
from quantize.gates import Draft, Exam, GateError
from quantize.runner import IGNORE, Array, Runner
from quantize.source import load
from quantize.weights import quantise

Change = Callable[[Path], None]


def examined(
    bundle: Path, model: Path, copy: Path, change: Change, *, refit: bool = True
) -> dict[str, float]:
    """All gates on a copy of a bundle after a change to its files."""
    folder = shutil.copytree(bundle, copy)
    manifest, exam = exam_of(bundle, model, refit)
    change(folder)
    path = folder / "infer.onnx"
    infer = onnx.load(str(path), load_external_data=False) if path.exists() else None
    draft = Draft(folder, manifest.tensors, frozenset(manifest.operators), infer, manifest.head_rows)
    return exam.run(draft, _silent)


@cache
def exam_of(bundle: Path, model: Path, refit: bool) -> tuple[Manifest, Exam]:
    """The exam of a bundle once its source is quantised; sitting it changes nothing of it."""
    manifest = open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())
    source, fmt = load(str(model)), FORMATS[manifest.weights_format]
    exam = Exam.of(source, exact=not refit, fmt=fmt, lora=manifest.lora)
    quantise(source, fmt, _silent, fit(source, fmt, _silent) if fmt.name in FITTED else None)
    return manifest, exam


def _silent(phase: str, fraction: float) -> None:
    pass


@pytest.fixture
def examine(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Runs all gates on a copy of the tiny bundle after a change to its files."""

    def run(change: Change, *, refit: bool = True) -> dict[str, float]:
        return examined(tiny_bundle, tiny_model, tmp_path / "copy", change, refit=refit)

    return run


def swapped(graph: str, old: str, new: str) -> Change:
    """The first operator `old` of a graph becomes `new`."""

    def change(folder: Path) -> None:
        model = onnx.load(str(folder / graph), load_external_data=False)
        next(node for node in model.graph.node if node.op_type == old).op_type = new
        (folder / graph).write_bytes(model.SerializeToString())

    return change


def activation_sharpened(folder: Path) -> None:
    """x sigmoid(x) becomes x sigmoid(1.702 x): GELU's stand-in, which the fused operator is mostly used for."""
    graph = folder / "infer.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "QuickGelu")
    assert node.attribute[0].name == "alpha"
    node.attribute[0].f = 1.702
    graph.write_bytes(model.SerializeToString())


def nothing(folder: Path) -> None:
    pass


def nibbles_swapped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    place = open_manifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()).tensors
    codes = place["L0/mlp.up_proj.w.q"]
    part = slice(codes.offset, codes.offset + codes.shape[0] * codes.shape[1])
    data[part] = bytes((byte >> 4) | (byte & 15) << 4 for byte in data[part])
    (folder / WEIGHTS).write_bytes(data)


def test_a_good_bundle_passes(examine: Callable[..., dict[str, float]], tiny_bundle: Path) -> None:
    manifest = open_manifest((tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes())
    assert examine(nothing) == manifest.gates


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (swapped("block_fwd.onnx", "Neg", "Identity"), "cut_gradient_error"),  # rotary halves
        (swapped("block_bwd.onnx", "Neg", "Identity"), "cut_gradient_error"),
        (swapped("block_bwd.onnx", "Sigmoid", "Exp"), "cut_gradient_error"),
        (swapped("norm_bwd.onnx", "Mul", "Add"), "cut_gradient_error"),
        (swapped("norm_fwd.onnx", "Sqrt", "Identity"), "cut_gradient_error"),
        (swapped("ce.onnx", "Add", "Sub"), "cut_gradient_error"),
        (swapped("prologue.onnx", "LessOrEqual", "Less"), "cut_gradient_error"),  # no position sees itself
        (swapped("infer.onnx", "Cos", "Sin"), "decode_error"),  # rotary tables
        (activation_sharpened, "decode_error"),
        (nibbles_swapped, "loss_error"),
    ],
)
def test_a_planted_mistake_is_named(
    examine: Callable[..., dict[str, float]], change: Change, gate: str
) -> None:
    with pytest.raises(GateError, match=gate):
        examine(change)


def test_a_refit_is_no_exact_import(examine: Callable[..., dict[str, float]]) -> None:
    with pytest.raises(GateError, match="kl"):
        examine(nothing, refit=False)


def embedding_scale_dropped(folder: Path) -> None:
    """Gemma multiplies the embedding by sqrt(64) = 8; here by 1 (F07)."""
    model = onnx.load(str(folder / "prologue.onnx"))
    changed = 0
    for tensor in model.graph.initializer:
        if np.all(numpy_helper.to_array(tensor) == 8.0):
            tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
            changed += 1
    assert changed == 1
    (folder / "prologue.onnx").write_bytes(model.SerializeToString())


def window_lost(folder: Path) -> None:
    """Sliding layers see everything (F07)."""
    model = onnx.load(str(folder / "prologue.onnx"))
    for node in model.graph.node:
        node.output[:] = ["unused" if name == "mask@sliding" else name for name in node.output]
    model.graph.node.add(op_type="Identity", input=["mask@full"], output=["mask@sliding"])
    (folder / "prologue.onnx").write_bytes(model.SerializeToString())


def head_tied_after_all(folder: Path) -> None:
    """The output matrix becomes the embedding."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    places = open_manifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()).tensors
    for part in ("q", "s"):
        head, table = places[f"HEAD.{part}"], places[f"EMB.{part}"]
        size = math.prod(head.shape) * np.dtype(head.dtype).itemsize
        data[head.offset : head.offset + size] = data[table.offset : table.offset + size]
    (folder / WEIGHTS).write_bytes(data)


def soft_cap_dropped(folder: Path) -> None:
    model = onnx.load(str(folder / "ce.onnx"))
    next(node for node in model.graph.node if node.op_type == "Tanh").op_type = "Identity"
    (folder / "ce.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("family", "change", "gate"),
    [
        ("gemma", embedding_scale_dropped, "cut_gradient_error"),
        ("gemma2", window_lost, "cut_gradient_error"),
        ("gemma2", soft_cap_dropped, "cut_gradient_error"),
        ("llama", head_tied_after_all, "loss_error"),
    ],
)
def test_what_other_exporters_lose_is_named(
    family: str, change: Change, gate: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family_folder(family)
    with pytest.raises(GateError, match=gate):
        examined(folder / "bundle", folder / "model", tmp_path / "copy", change)


def test_labels_that_are_shifted_once_more_are_named(
    examine: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Runner._head

    def shifted(self: Runner, features: Array, labels: Array) -> tuple[Array, Array]:
        return plain(self, features, np.where(labels == IGNORE, IGNORE, np.roll(labels, -1, 1) % 320))

    monkeypatch.setattr(Runner, "_head", shifted)
    with pytest.raises(GateError, match="cut_gradient_error"):
        examine(nothing)
