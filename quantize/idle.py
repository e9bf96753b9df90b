"""Operators of a trace that copy a tensor and change nothing: taken out before they become nodes of a graph.

torch decomposes a batched product into expand, reshape, product; the expand of a tensor to its own shape is nothing
in torch and a copy in ONNX Runtime. For attention that is one more matrix of all scores.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def drop_idle(traced: GraphModule, *, pure: bool = False) -> None:
    """Remove every expand to the shape that its input has already, and what nothing reads.

    An addition in place counts as read by somebody, unless the trace is `pure`: nothing is changed behind a view.
    """
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.expand.default:
            source = node.args[0]
            if _shape(source) == _shape(node):
                node.replace_all_uses_with(source)
    traced.graph.eliminate_dead_code(_is_end if pure else None)
    traced.recompile()


def _is_end(node: Node) -> bool:
    return node.op in ("placeholder", "output")


def _shape(node: torch.fx.Node) -> tuple[str, ...]:
    """Sizes as written: symbolic ones are equal when they are the same expression."""
    return tuple(str(size) for size in node.meta["val"].shape)
