"""The training graphs of a bundle: seven small files that a device runs layer after layer."""

from __future__ import annotations

from typing import Any

import onnx

from fedge.lora import LoraConfig
from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters, frozen_block
from quantize.formats import EMBEDDING_FORMAT, WeightFormat
from quantize.graph import canonical, expand_powers, fold, select
from quantize.head import HEAD, cross_entropy_slice, output_rows
from quantize.joint import export_block, export_norm
from quantize.late import late_weights
from quantize.late_scores import late_scores
from quantize.lower import lower
from quantize.pieces import block_in_pieces
from quantize.prologue import TABLE, export_prologue
from quantize.variants import block_variants
from quantize.weights import Progress


def training_graphs(
    anatomy: Anatomy, lora: LoraConfig, fmt: WeightFormat, tell: Progress
) -> dict[str, onnx.ModelProto]:
    """File name -> graph, as docs/building-blocks.md lists them."""
    hidden, block = anatomy.hidden, block_in_pieces(anatomy, frozen_block(anatomy, lora))
    _, frozen = block_parameters(block)
    shapes = {name: tuple(value.shape) for name, value in frozen.items() if name.endswith(".w")}
    joint = expand_powers(fold(export_block(anatomy, block)))
    tell("export", 0.5)
    norm = expand_powers(fold(export_norm(anatomy.norm, hidden)))
    tell("export", 0.55)
    prologue = lower(fold(export_prologue(anatomy)), {TABLE: ("V", hidden)}, EMBEDDING_FORMAT)
    backward = [value.name for value in joint.graph.output if value.name != "y"]
    graphs = {
        "prologue.onnx": prologue,
        "block_fwd.onnx": lower(select(joint, ["y"]), shapes, fmt.name),
        "block_bwd.onnx": lower(select(joint, backward), shapes, fmt.name),
        "norm_fwd.onnx": select(norm, ["f"]),
        "norm_bwd.onnx": select(norm, ["gh"]),
        "rows.onnx": output_rows(hidden, TABLE if anatomy.head_tied else HEAD, EMBEDDING_FORMAT),
        "ce.onnx": cross_entropy_slice(hidden, EMBEDDING_FORMAT, anatomy.logit_cap),
    }
    variants = block_variants(joint)
    graphs |= {f"{name}.onnx": lower(graph, shapes, fmt.name) for name, graph in variants.items()}
    tell("export", 0.6)
    return {name: canonical(late_weights(late_scores(graph))) for name, graph in graphs.items()}


def head_dim(model: Any) -> int:
    """Width of one attention head."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
