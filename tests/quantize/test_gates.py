"""Every gate, seen red: a mistake is planted in a good bundle's files, and the gate that guards it must name it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import tiny

from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, open_manifest
from quantize.formats import FORMATS
from quantize.gates import Draft, Exam, GateError
from quantize.source import load
from quantize.weights import quantise

Change = Callable[[Path], None]


@pytest.fixture
def examine(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> Callable[[Change], dict[str, float]]:
    """Runs all gates on a copy of the tiny bundle after a change to its files."""

    def run(change: Change, *, refit: bool = True) -> dict[str, float]:
        folder = shutil.copytree(tiny_bundle, tmp_path / "copy")
        manifest = open_manifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes())
        source, fmt = load(str(tiny_model)), FORMATS["int4d"]
        exam = Exam.of(source, exact=not refit, fmt=fmt, lora=tiny.LORA)
        quantise(source, fmt, lambda phase, fraction: None)
        change(folder)
        infer = onnx.load(str(folder / "infer.onnx"), load_external_data=False)
        used = frozenset(manifest.operators)
        draft = Draft(folder, manifest.tensors, used, infer, manifest.head_rows)
        return exam.run(draft, lambda phase, fraction: None)

    return run


def swapped(graph: str, old: str, new: str) -> Change:
    """The first operator `old` of a graph becomes `new`."""

    def change(folder: Path) -> None:
        model = onnx.load(str(folder / graph), load_external_data=False)
        next(node for node in model.graph.node if node.op_type == old).op_type = new
        (folder / graph).write_bytes(model.SerializeToString())

    return change


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
        (nibbles_swapped, "loss_error"),
        (swapped("infer.onnx", "Neg", "Identity"), "decode_error"),
        (swapped("infer.onnx", "Sigmoid", "Exp"), "decode_error"),
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
