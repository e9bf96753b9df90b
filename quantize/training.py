"""The training graphs of a bundle: seven small files that a device runs layer after layer."""

from __future__ import annotations

from typing import Any

import onnx

from fedge.lora import LoraConfig
from quantize.blocks import block_parameters, frozen_block
from quantize.formats import EMBEDDING_FORMAT, WeightFormat
from quantize.graph import canonical, expand_powers, fold, select
from quantize.joint import export_block, export_norm, export_prologue
from quantize.lower import cross_entropy_slice, embedding_rows, lower
from quantize.weights import Progress


def training_graphs(
    model: Any, lora: LoraConfig, fmt: WeightFormat, tell: Progress
) -> dict[str, onnx.ModelProto]:
    """File name -> graph, as docs/building-blocks.md lists them."""
    hidden, block = model.config.hidden_size, frozen_block(model, lora)
    _, frozen = block_parameters(block)
    shapes = {name: tuple(value.shape) for name, value in frozen.items() if name.endswith(".w")}
    joint = expand_powers(fold(export_block(block, hidden, head_dim(model))))
    tell("export", 0.5)
    norm = expand_powers(fold(export_norm(model.model.norm, hidden)))
    tell("export", 0.55)
    prologue = lower(
        fold(export_prologue(model.model.rotary_emb, hidden)), {"EMB": ("V", hidden)}, EMBEDDING_FORMAT
    )
    backward = [value.name for value in joint.graph.output if value.name != "y"]
    graphs = {
        "prologue.onnx": prologue,
        "block_fwd.onnx": lower(select(joint, ["y"]), shapes, fmt.name),
        "block_bwd.onnx": lower(select(joint, backward), shapes, fmt.name),
        "norm_fwd.onnx": select(norm, ["f"]),
        "norm_bwd.onnx": select(norm, ["gh"]),
        "rows.onnx": embedding_rows(hidden, EMBEDDING_FORMAT),
        "ce.onnx": cross_entropy_slice(hidden, EMBEDDING_FORMAT),
    }
    tell("export", 0.6)
    return {name: canonical(graph) for name, graph in graphs.items()}


def head_dim(model: Any) -> int:
    """Width of one attention head."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
