"""Attention a few heads at a time, for texts so long that the scores of all heads are the largest thing there is.

Forward holds the scores of one piece. Backward computes them again from queries and keys instead of keeping them
(as FlashAttention does by blocks of positions: Dao et al. 2022, arXiv 2205.14135), so that a piece is all that it
holds, too: 4 H S^2 bytes become a few S^2, for 5 % more arithmetic at 2,048 tokens. It replaces the eager attention
of transformers where a layer asks its registry for one, and is only written for models that take long texts.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from quantize.anatomy import Anatomy
from quantize.joint import EXAMPLE, example_aux

NAME: Final = "fedge_in_pieces"
PIECES_MAX: Final = 8  # a piece is some twenty nodes in the way back, and each takes its time to export
TOKENS_MIN: Final = 512  # below, the scores are smaller than the rest


class _InPieces(torch.autograd.Function):
    """softmax(q k^T scale + mask) v over heads [B, H, S, d]; k and v have H / groups heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        parts = []
        for heads, shared in _cuts(q, k):
            keys, values = (_repeated(t[:, shared], q, k) for t in (k, v))
            scores = (q[:, heads] * scale) @ keys.transpose(2, 3) + mask
            parts.append(torch.softmax(scores, -1) @ values)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask = ctx.saved_tensors
        scale, found = ctx.scale, []
        for heads, shared in _cuts(q, k):
            keys, values = (_repeated(t[:, shared], q, k) for t in (k, v))
            # The factor is on the keys here: written as in the forward pass, the runtime would take it for the same
            # value, compute it once and keep it.
            keys = keys * scale
            weights = torch.softmax(q[:, heads] @ keys.transpose(2, 3) + mask, -1)
            flow = gradient[:, heads]
            of_values = weights.transpose(2, 3) @ flow
            of_weights = flow @ values.transpose(2, 3)
            inner = (of_weights * weights).sum(-1, keepdim=True)
            of_scores = weights * (of_weights - inner)
            of_keys = of_scores.transpose(2, 3) @ (q[:, heads] * scale)
            found.append((of_scores @ keys, _summed(of_keys, q, k), _summed(of_values, q, k)))
        of_q, of_k, of_v = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return of_q, of_k, of_v, None, None


def attention_in_pieces(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, S, d] in, [B, S, H, d] out. Raises NotImplementedError for more."""
    unusual = [name for name in ("softcap", "s_aux", "head_mask") if more.get(name) is not None]
    if unusual or attention_mask is None or query.shape[1] % key.shape[1]:
        raise NotImplementedError(f"attention with {unusual or 'no mask'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y: Tensor = _InPieces.apply(query, key, value, attention_mask, scale)
    return y.transpose(1, 2).contiguous(), None


def block_in_pieces(anatomy: Anatomy, block: nn.Module) -> nn.Module:
    """A copy of a block whose attention works in pieces; the block itself where that does not pay or cannot be."""
    configured = [module for module in block.modules() if hasattr(module, "config")]
    if not configured or anatomy.model.config.max_position_embeddings < TOKENS_MIN:
        return block
    AttentionInterface.register(NAME, attention_in_pieces)
    copied = copy.deepcopy(block)
    for module in copied.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = NAME
    x = torch.randn(*EXAMPLE, anatomy.hidden)
    aux = dict(zip(anatomy.aux, example_aux(anatomy), strict=True))
    parameters = dict(block.named_parameters())
    try:
        with torch.no_grad():
            expected, found = (anatomy.call(some, parameters, x, aux) for some in (block, copied))
    except NotImplementedError:
        return block
    return copied if torch.allclose(expected, found, rtol=1e-4, atol=1e-5) else block


def _cuts(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Slices of query heads and of the key heads that they share, in at most PIECES_MAX pieces."""
    keys, groups = k.shape[1], q.shape[1] // k.shape[1]
    height = -(-keys // PIECES_MAX)
    starts = range(0, keys, height)
    return [
        (slice(at * groups, min(at + height, keys) * groups), slice(at, min(at + height, keys)))
        for at in starts
    ]


def _repeated(shared: Tensor, q: Tensor, k: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, 1)


def _summed(of_repeated: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The gradient by shared heads: the sum over those that share each."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return of_repeated
    batch, heads, length, width = of_repeated.shape
    return of_repeated.reshape(batch, heads // groups, groups, length, width).sum(2)
