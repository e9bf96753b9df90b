"""Other people's ways to a 4-bit grid with float offsets, written down to be compared with: HQQ and AWQ.

HQQ (Badri and Shaji 2023, half-quadratic quantisation) looks at weights alone: block scales from the range, offsets
moved so that few weights lie far off. AWQ (Lin et al. 2024, arXiv 2306.00978) multiplies the columns of a matrix by
powers of how large their activations are before it is rounded, and what precedes the matrix by the inverse. The
function that remains is that of ŵ = Q(w s) / s, so that is what is judged here; nothing is folded. As in AWQ's own
code the products of attention are left out where query heads share their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from quantize.blocks import linears_of, matrix_of
from quantize.formats import BLOCK, Parts, WeightFormat, assemble, decode, encode
from quantize.gptq import fit_matrix
from quantize.source import Source

HQQ_STEPS: Final = 20
HQQ_NORM: Final = 0.7
AWQ_POWERS: Final = tuple(number / 10 for number in range(10))
AWQ_TOGETHER: Final = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                       ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
BATCH: Final = 8

Round = Callable[[Tensor, Tensor], Tensor]  # a matrix and the second moments of what it reads -> its values


def hqq(weight: Tensor, fmt: WeightFormat) -> Parts:
    """Parts of a (N, K) matrix: 20 steps of HQQ with p = 0.7, β = 10 and growing by 1 %, as its authors have it."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    least, most = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    levels = 2**fmt.bits - 1
    scale = (most - least).clamp_min(1e-8) / levels
    zero, best, kept, beta = -least / scale, torch.inf, -least / scale, 10.0
    for _ in range(HQQ_STEPS):
        codes = (blocks / scale + zero).round().clamp(0, levels)
        miss = blocks - (codes - zero) * scale
        if float(miss.abs().mean()) >= best:
            break
        best, kept = float(miss.abs().mean()), zero
        far = miss.sign() * (miss.abs() - miss.abs().clamp_min(1e-9) ** (HQQ_NORM - 1) / beta).clamp_min(0)
        zero = (codes - (blocks - far) / scale).mean(-1, keepdim=True)
        beta *= 1.01
    codes = (blocks / scale + kept).round().clamp(0, levels).to(torch.uint8)
    return assemble(codes.numpy(), scale[..., 0].numpy(), (-kept * scale)[..., 0].numpy(), fmt)


def awq(source: Source, ids: Tensor, fmt: WeightFormat, *, fitted: bool) -> None:
    """Give the model's matrices the values that AWQ leaves: powers found by rounding to the nearest, for each group
    of matrices that read one input; then rounded to the nearest, or `fitted` as `fit_matrix` does."""

    def nearest(weight: Tensor, _: Tensor) -> Tensor:
        return torch.from_numpy(decode(encode(weight.numpy(), fmt), fmt))

    def gptq(weight: Tensor, moments: Tensor) -> Tensor:
        return torch.from_numpy(decode(fit_matrix(weight, moments, fmt), fmt))

    final = gptq if fitted else nearest
    with torch.no_grad():
        moments, sizes = _moments(source, ids)
        for index, layer in enumerate(source.anatomy.layers):
            matrices = linears_of(layer)
            grouped = [name for group in AWQ_TOGETHER for name in group]
            for name in matrices.keys() - set(grouped):
                weight = matrix_of(matrices[name])
                weight.copy_(final(weight, moments[index, name]))
            for group in AWQ_TOGETHER:
                weights = [matrix_of(matrices[name]) for name in group]
                seen = moments[index, group[0]]
                powers = [_scales(sizes[index, group[0]], power) for power in AWQ_POWERS]
                best = min(powers, key=lambda scales: sum(_lost(w, seen, scales, nearest) for w in weights))
                for weight in weights:
                    weight.copy_(_scaled(weight, seen, best, final))


def _scales(size: Tensor, power: float) -> Tensor:
    scales: Tensor = size.clamp_min(1e-4) ** power
    return scales / (scales.max() * scales.min()).sqrt()


def _scaled(weight: Tensor, moments: Tensor, scales: Tensor, rounded: Round) -> Tensor:
    return rounded(weight * scales, moments / torch.outer(scales, scales)) / scales


def _lost(weight: Tensor, moments: Tensor, scales: Tensor, rounded: Round) -> float:
    miss = weight - _scaled(weight, moments, scales, rounded)
    return float((miss @ moments * miss).sum())


def _moments(
    source: Source, ids: Tensor
) -> tuple[dict[tuple[int, str], Tensor], dict[tuple[int, str], Tensor]]:
    """Mean of x x' and of |x| of what every matrix reads in the source, by layer and name."""
    moments: dict[tuple[int, str], Tensor] = {}
    sizes: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, layer in enumerate(source.anatomy.layers):
        for name, module in linears_of(layer).items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], at: tuple[int, str] = (index, name)) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                moments[at] = moments.get(at, 0) + x.T @ x / ids.numel()
                sizes[at] = sizes.get(at, 0) + x.abs().sum(0) / ids.numel()

            handles.append(module.register_forward_pre_hook(hook))
    for rows in ids.split(BATCH):
        source.model.base_model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return moments, sizes
