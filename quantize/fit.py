"""Fitting float matrices to a 4-bit grid by what they do to activations, not by how near the weights come.

GPTQ (Frantar et al. 2022, arXiv 2210.17323), layer by layer: the columns of a matrix are rounded one after another,
and the error of each is passed on to the columns that are still to come, weighted by the inverse of the activations'
second moments H. Each block of 32 gets its scale and offset when its turn comes. Then, the codes fixed, all scales
and offsets of a row are solved for at once, so that (w - Aθ) H (w - Aθ)' is least: two unknowns a block against the
whole row. With half-precision offsets that is what brings 4 bits near the source.

The activations come from text that the model writes itself (as in LLM-QAT, arXiv 2305.17888), so no data are needed.
The same seed gives the same codes on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from quantize.blocks import linears_of, matrix_of
from quantize.formats import BLOCK, Parts, WeightFormat, assemble, decode
from quantize.reference import positions_max
from quantize.source import Source
from quantize.watching import arguments_of

FITTED: Final = ("int4d", "int4gz")  # the formats that are worth the minutes
Progress = Callable[[str, float], None]

_LEVELS: Final = 15
_DAMPING: Final = 0.01  # of the mean diagonal, added to it
_SHRINKS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)  # of a block's range: outliers may be cut
_SWEEPS: Final = 2  # of coordinate descent over the codes, each after solving for the scales
_RIDGE: Final = 1e-4  # added to the diagonal of the normal equations, relative
_SOLVED_ROWS: Final = 32  # rows whose scales are solved for at a time


@dataclass(frozen=True, slots=True)
class Calibration:
    """How much text the model writes to be measured on: `rows` of `tokens` each, from one seed."""

    rows: int = 32
    tokens: int = 128
    seed: int = 0


def fit(
    source: Source, fmt: WeightFormat, tell: Progress, calibration: Calibration | None = None
) -> dict[str, Parts]:
    """Parts of every matrix of the blocks, by parameter name. The model's own weights become the fitted ones.

    Costs minutes: 427 CPU seconds for 106 million weights on a crowded machine, the text's 25 left out.
    """
    given = calibration or Calibration()
    anatomy, found = source.anatomy, {}
    with torch.no_grad():
        flows = _watched(source, own_text(source, given))
        for index, layer in enumerate(anatomy.layers):
            matrices = linears_of(layer)
            for group in _groups(layer, flows[0], index):
                moments = _second_moments(layer, matrices[group[0]], flows, index)
                for name in group:
                    weight = matrix_of(matrices[name])
                    parts = fit_matrix(weight.float(), moments, fmt)
                    weight.copy_(torch.from_numpy(decode(parts, fmt)))
                    found[f"{anatomy.layers_path}.{index}.{name}.weight"] = parts
            for flow in flows:
                flow.step(layer, index)
            tell("quantise", (index + 1) / (len(anatomy.layers) + 1))
    return found


def own_text(source: Source, calibration: Calibration) -> Tensor:
    """Token ids [rows, tokens] that the model wrote, each row begun by a token drawn at random."""
    model, rows = source.model, source.anatomy.vocabulary
    draw = torch.Generator().manual_seed(calibration.seed)
    length = min(calibration.tokens, positions_max(model.config))
    if source.anatomy.head is None:  # an encoder writes nothing
        return torch.randint(0, rows, (calibration.rows, length), generator=draw)
    ids = torch.randint(0, rows, (calibration.rows, 1), generator=draw)
    last, past = ids, None
    with torch.no_grad():
        for _ in range(length - 1):
            output = model(input_ids=last, past_key_values=past, use_cache=True)
            past = output.past_key_values
            last = torch.multinomial(torch.softmax(output.logits[:, -1], -1), 1, generator=draw)
            ids = torch.cat([ids, last], 1)
    return ids


def fit_matrix(weight: Tensor, moments: Tensor, fmt: WeightFormat) -> Parts:
    """Parts of a (N, K) matrix for activations with second moments H (K, K)."""
    moments = moments.double()
    dead = moments.diagonal() == 0
    moments = moments + torch.diag(dead.double() + _DAMPING * moments.diagonal().mean())
    codes, scale, low = _rounded(weight, moments, fmt)
    for _ in range(_SWEEPS):
        scale, low = _solved(weight, moments, codes, scale, low, fmt)
        codes = _descended(weight, moments, codes, scale, low)
    scale, low = _solved(weight, moments, codes, scale, low, fmt)
    shape = (weight.shape[0], -1, BLOCK)
    return assemble(codes.to(torch.uint8).reshape(shape).numpy(), scale.numpy(), low.numpy(), fmt)


def _rounded(weight: Tensor, moments: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), scale and value of code 0 (N, blocks), by GPTQ."""
    inverse = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True
    ).float()
    importance = moments.diagonal().float()
    left, codes = weight.clone(), torch.empty_like(weight)
    scales, lows = [], []
    for start in range(0, weight.shape[1], BLOCK):
        end = start + BLOCK
        block, errors = left[:, start:end].clone(), torch.empty(weight.shape[0], BLOCK)
        scale, low = _grid(block, importance[start:end], fmt)
        within = inverse[start:end, start:end]
        for column in range(BLOCK):
            code = ((block[:, column] - low) / scale).round_().clamp_(0, _LEVELS)
            codes[:, start + column] = code
            error = (block[:, column] - (code * scale + low)) / within[column, column]
            block[:, column + 1 :] -= error[:, None] * within[column, column + 1 :]
            errors[:, column] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
        scales.append(scale)
        lows.append(low)
    return codes, torch.stack(scales, 1), torch.stack(lows, 1)


def _descended(weight: Tensor, moments: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """Codes after one sweep of coordinate descent: each column to its best code, all others as they are."""
    codes, through = codes.clone(), moments.float()
    dense = codes * scale.repeat_interleave(BLOCK, 1) + low.repeat_interleave(BLOCK, 1)
    pull = (weight - dense) @ through
    for number, start in enumerate(range(0, weight.shape[1], BLOCK)):
        end, step = start + BLOCK, scale[:, number]
        within, moves = through[start:end, start:end], torch.empty(weight.shape[0], BLOCK)
        here = pull[:, start:end].clone()
        for column in range(BLOCK):
            old = codes[:, start + column]
            best = old + here[:, column] / (within[column, column] * step)
            best = best.round_().clamp_(0, _LEVELS)
            moves[:, column] = (best - old) * step
            here -= moves[:, column, None] * within[column]
            codes[:, start + column] = best
        pull -= moves @ through[start:end]
    return codes


def _grid(block: Tensor, importance: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and value of code 0 of one block of each row: the best of several ranges, refitted to their own codes."""
    least, most = block.min(1).values, block.max(1).values
    if not fmt.has_offset:  # its zero is one of the codes
        least, most = least.clamp_max(0), most.clamp_min(0)
    best = torch.full_like(least, torch.inf)
    scale, low = torch.ones_like(least), torch.zeros_like(least)
    for shrink in _SHRINKS:
        middle, reach = (least + most) / 2, (most - least) / 2 * shrink
        step, start = _on_grid(2 * reach / _LEVELS, middle - reach, fmt)
        codes = _nearest(block, step, start)
        step, start = _on_grid(*_refitted(block, codes, importance, step, start), fmt)
        codes = _nearest(block, step, start)
        miss = (importance * (codes * step[:, None] + start[:, None] - block) ** 2).sum(1)
        better = miss < best
        best = torch.where(better, miss, best)
        scale, low = torch.where(better, step, scale), torch.where(better, start, low)
    return scale, low


def _refitted(
    block: Tensor, codes: Tensor, importance: Tensor, scale: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted least squares of a line through (code, weight)."""
    total = importance.sum()
    mean_code, mean = (codes @ importance) / total, (block @ importance) / total
    centred = codes - mean_code[:, None]
    spread = (centred**2) @ importance
    slope = ((centred * (block - mean[:, None])) @ importance) / spread.clamp_min(1e-30)
    slope = torch.where((spread > 1e-20) & (slope > 0), slope, scale)
    return slope, mean - slope * mean_code


def _on_grid(scale: Tensor, low: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and offset as the format stores them: half precision, and -code x scale where it has a zero."""
    scale = scale.half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if fmt.has_offset:
        return scale, low.half().float()
    return scale, -(-low / scale).round().clamp(0, _LEVELS) * scale


def _nearest(block: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    return ((block - low[:, None]) / scale[:, None]).round_().clamp_(0, _LEVELS)


def _solved(
    weight: Tensor, moments: Tensor, codes: Tensor, scale: Tensor, low: Tensor, fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Scales and offsets of whole rows that lose least for these codes; a zero stays and only scales are solved for."""
    count = weight.shape[1] // BLOCK
    fresh, moved = scale.clone(), low.clone()
    target = weight.double() @ moments
    for start in range(0, len(weight), _SOLVED_ROWS):
        rows = slice(start, start + _SOLVED_ROWS)
        held = codes[rows].double().reshape(-1, count, BLOCK)
        zeros = -(low[rows] / scale[rows]).round().double()
        bases = [held, torch.ones_like(held)] if fmt.has_offset else [held - zeros[..., None]]
        now = torch.cat([scale[rows], low[rows]], 1) if fmt.has_offset else scale[rows]
        found = _least_squares(torch.cat(bases, 1), moments, target[rows], now.double())
        step = found[:, :count].float()
        usable = step > 0.3 * scale[rows]  # a scale that vanishes or turns belongs to a block without spread
        start_values = found[:, count:].float() if fmt.has_offset else -zeros.float() * step
        new_scale, new_low = _on_grid(step, start_values, fmt)
        fresh[rows] = torch.where(usable, new_scale, scale[rows])
        moved[rows] = torch.where(usable, new_low, low[rows])
    return fresh, moved


def _least_squares(bases: Tensor, moments: Tensor, target: Tensor, now: Tensor) -> Tensor:
    """θ (rows, U) of min (w - θA) H (w - θA)', from `now` on.

    A's rows are given block-wise: bases (rows, U, 32); target = w H.
    """
    rows, unknowns, _ = bases.shape
    count = moments.shape[0] // BLOCK
    by_block = moments.reshape(count, BLOCK, -1)
    blocks = [unknown % count for unknown in range(unknowns)]
    through = torch.einsum("rub,ubk->ruk", bases, by_block[blocks]).reshape(rows, unknowns, count, BLOCK)
    normal = torch.einsum("ruvb,rvb->ruv", through[:, :, blocks], bases)
    right = torch.einsum("rub,rub->ru", bases, target.reshape(rows, count, BLOCK)[:, blocks])
    right -= (normal @ now[..., None])[..., 0]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    least = 1e-9 * diagonal.mean(1, keepdim=True)  # codes that are all 0 have no scale
    diagonal += _RIDGE * diagonal + least
    return now + torch.linalg.solve(normal, right)


@dataclass(slots=True)
class _Flow:
    """One batch on its way through the layers: its hidden states and how each layer is called."""

    hidden: str
    x: Tensor
    calls: list[dict[str, Any]]

    def run(self, layer: nn.Module, index: int) -> Tensor:
        output = layer(**{**self.calls[index], self.hidden: self.x})
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def step(self, layer: nn.Module, index: int) -> None:
        self.x = self.run(layer, index)


def _watched(source: Source, ids: Tensor, batch: int = 8) -> list[_Flow]:
    """What the layers are called with for these ids, the first one's hidden states kept."""
    anatomy, flows = source.anatomy, []
    for rows in ids.split(batch):
        calls: list[dict[str, Any]] = []
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, keywords, calls=calls: calls.append(
                    arguments_of(module, args, keywords)
                ),
                with_kwargs=True,
            )
            for layer in anatomy.layers
        ]
        try:
            source.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        flows.append(_Flow(anatomy.call.hidden, calls[0].pop(anatomy.call.hidden), calls))
        for call in calls[1:]:
            del call[anatomy.call.hidden]
    return flows


def _groups(layer: nn.Module, flow: _Flow, index: int) -> list[list[str]]:
    """The matrices of a layer in the order in which they are used; those that read the same input together."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for given, group in seen:
                if given is args[0]:
                    group.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    matrices: dict[str, Any] = dict(linears_of(layer))
    handles = [module.register_forward_pre_hook(note(name)) for name, module in matrices.items()]
    try:
        flow.run(layer, index)
    finally:
        for handle in handles:
            handle.remove()
    return [group for _, group in seen]


def _second_moments(layer: nn.Module, module: nn.Module, flows: list[_Flow], index: int) -> Tensor:
    """Mean of x x' over all tokens, (K, K), of what a module reads."""
    total, tokens = torch.zeros(()), 0

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total, tokens
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        total, tokens = total + x.T @ x, tokens + len(x)

    handle = module.register_forward_pre_hook(hook)
    try:
        for flow in flows:
            flow.run(layer, index)
    finally:
        handle.remove()
    return total / tokens


def weighted_error(weight: Tensor, parts: Parts, fmt: WeightFormat, moments: Tensor) -> float:
    """Mean squared error of the products, relative: (w - ŵ) H (w - ŵ)' over w H w'."""
    dense = torch.from_numpy(np.ascontiguousarray(decode(parts, fmt)))
    miss = (weight - dense).double()
    moments = moments.double()
    lost, whole = ((d @ moments * d).sum() for d in (miss, weight.double()))
    return float(lost / whole)
