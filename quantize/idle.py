"""Operators of a trace that copy a tensor and change nothing: taken out before they become nodes of a graph.

torch decomposes a batched product into expand, reshape, product; the expand of a tensor to its own shape is nothing
in torch and a copy in ONNX Runtime. For attention that is one more matrix of all scores.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule


def drop_idle(traced: GraphModule) -> None:
    """Remove every expand to the shape that its input has already."""
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.expand.default:
            source = node.args[0]
            if _shape(source) == _shape(node):
                node.replace_all_uses_with(source)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _shape(node: torch.fx.Node) -> tuple[str, ...]:
    """Sizes as written: symbolic ones are equal when they are the same expression."""
    return tuple(str(size) for size in node.meta["val"].shape)
