"""Attention in pieces, and graphs that hold little at once: the same numbers, fewer of them at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny

from quantize.anatomy import dissect
from quantize.blocks import block_parameters, frozen_block
from quantize.graph import expand_powers, fold, select
from quantize.joint import export_block
from quantize.late import late_weights
from quantize.late_scores import late_scores
from quantize.lower import lower
from quantize.pieces import block_in_pieces
from quantize.variants import KEEP, block_variants

LENGTH = 21
pytestmark = pytest.mark.xdist_group("graph order")  # they share two traces


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    """Joint graphs of the tiny model's block, plain and in pieces, with the weights' shapes as metadata."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**tiny.SIZES, "max_position_embeddings": 1_024, "use_cache": False}
        config = LlamaConfig(**sizes)
        config._attn_implementation = "eager"
        anatomy = dissect(LlamaForCausalLM(config).eval())
        block = frozen_block(anatomy, tiny.LORA)
        pieces = block_in_pieces(anatomy, block)
        assert pieces is not block, "this family asks transformers' registry"
        return {
            name: expand_powers(fold(export_block(anatomy, some)))
            for name, some in (("plain", block), ("pieces", pieces))
        } | {"shapes": {n: tuple(v.shape) for n, v in block_parameters(block)[1].items() if n.endswith(".w")}}


def feeds_of(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Numbers that depend on an input's name and shape alone; codes are 8 bits, masks causal."""
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        draw = np.random.default_rng(sum(map(ord, value.name)))
        if value.name == "mask":
            seen = np.tril(np.ones((LENGTH, LENGTH), bool))
            feeds["mask"] = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)[None, None]
            continue
        shape = [size if isinstance(size, int) else None for size in value.shape]
        if value.name in ("x", "gy") or value.name.startswith(KEEP):
            shape = [1, LENGTH, shape[-1] or 64]
        elif value.name in ("cos", "sin"):
            shape = [1, LENGTH, shape[-1]]
        if value.type == "tensor(uint8)":
            feeds[value.name] = draw.integers(0, 255, shape, np.uint8)
        else:
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = (draw.standard_normal(shape) * 0.05).astype(kind)
    return feeds


def run(model: onnx.ModelProto, more: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = feeds_of(session)
    given |= {name: value for name, value in (more or {}).items() if name in given}
    return dict(zip(names, session.run(names, given), strict=True))


def lowered(graphs: dict[str, Any], joint: onnx.ModelProto) -> onnx.ModelProto:
    return lower(joint, graphs["shapes"], "int8g")


def outputs_of(joint: onnx.ModelProto) -> list[str]:
    return [value.name for value in joint.graph.output]


def test_pieces_give_what_all_heads_at_once_give(graphs: dict[str, Any]) -> None:
    plain, pieces = (run(lowered(graphs, graphs[name])) for name in ("plain", "pieces"))
    assert plain.keys() == pieces.keys()
    for name, value in plain.items():
        error = np.linalg.norm(pieces[name] - value) / np.linalg.norm(value)
        assert error < 1e-5, name


@pytest.mark.parametrize("kind", ["plain", "pieces"])
def test_waiting_changes_no_bit(graphs: dict[str, Any], kind: str) -> None:
    before = lowered(graphs, graphs[kind])
    after = late_weights(late_scores(before))
    expected, found = run(before), run(after)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_in_pieces_no_scores_are_made_before_their_gradient_is_there(graphs: dict[str, Any]) -> None:
    """As many softmaxes of the way back depend on the gradient as there are pieces; none does without waiting."""
    backward = [name for name in outputs_of(graphs["pieces"]) if name != "y"]
    model = lowered(graphs, select(graphs["pieces"], backward))
    assert waiting_softmaxes(model) == 0
    assert waiting_softmaxes(late_scores(model)) == 2  # two key heads, a piece each
    plain = lowered(graphs, select(graphs["plain"], [n for n in outputs_of(graphs["plain"]) if n != "y"]))
    assert late_scores(plain) is plain


def test_the_way_back_holds_the_scores_of_one_piece(graphs: dict[str, Any]) -> None:
    """Weights, their gradient and its product: three tensors as large as a piece's scores, none of another piece."""
    backward = [name for name in outputs_of(graphs["pieces"]) if name != "y"]
    model = lowered(graphs, select(graphs["pieces"], backward))
    assert scores_at_once(late_weights(late_scores(model))) == 3


def scores_at_once(model: onnx.ModelProto) -> int:
    """Most tensors [..., LENGTH, LENGTH] alive together when nodes run in the order of the file."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    made = [name for node in model.graph.node for name in node.output if name]
    known = {value.name for value in model.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    shapes = {name: value.shape for name, value in run(watched).items()}
    whole: dict[str, str] = {}  # a Reshape is another view of what it reads
    last: dict[str, int] = {}
    for at, node in enumerate(model.graph.node):
        last |= {whole.get(name, name): at for name in node.input}
        if node.op_type == "Reshape":
            whole[node.output[0]] = whole.get(node.input[0], node.input[0])
    alive: set[str] = set()
    most = 0
    for at, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" and shapes[node.output[0]][-2:] == (LENGTH, LENGTH):
            alive.add(node.output[0])
        most = max(most, len(alive))
        alive = {name for name in alive if last.get(name, at) > at}
    return most


def waiting_softmaxes(model: onnx.ModelProto) -> int:
    later, found = {"gy"}, 0
    for node in model.graph.node:
        if later.intersection(node.input):
            later.update(node.output)
            found += node.op_type == "Softmax"
    return found


def test_every_matrix_waits_for_its_product(graphs: dict[str, Any]) -> None:
    """No node that reads stored bytes is ready before an activation is."""
    model = late_weights(lowered(graphs, graphs["plain"]))
    small = {value.name for value in model.graph.input if np.prod(sizes(value)) < 16_384}
    ready = {tensor.name for tensor in model.graph.initializer}
    ready |= {v.name for v in model.graph.input if v.name.endswith((".q", ".s", ".m", ".weight"))}
    for node in model.graph.node:
        if ready.issuperset(node.input):
            ready.update(node.output)
            assert small.issuperset({n for n in node.input if n.endswith(".q")}), node.op_type


def sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value or 1 for size in value.type.tensor_type.shape.dim]


def test_variants_are_cuts_of_the_same_graph(graphs: dict[str, Any]) -> None:
    """What the way there keeps gives the way back its bits; the first layer lacks only the way further down."""
    joint = graphs["pieces"]
    variants = {name: lowered(graphs, graph) for name, graph in block_variants(joint).items()}
    assert set(variants) == {"block_fwd_keep", "block_bwd_keep", "block_bwd_first"}
    whole = run(lowered(graphs, joint))
    kept = run(variants["block_fwd_keep"])
    np.testing.assert_array_equal(kept["y"], whole["y"])
    back = run(variants["block_bwd_keep"], kept)
    assert back.keys() == whole.keys() - {"y"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    first = run(variants["block_bwd_first"])
    assert first.keys() == back.keys() - {"gx"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_a_graph_of_variants_is_small(tiny_bundle: Path) -> None:
    for name in ("block_fwd_keep", "block_bwd_keep", "block_bwd_first"):
        assert (tiny_bundle / f"{name}.onnx").stat().st_size < 64_000
