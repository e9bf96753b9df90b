"""One float matrix on a 4-bit grid, so that its products with the activations change least.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): the columns of a matrix are rounded one after another, and the error of
each is passed on to the columns that are still to come, weighted by the inverse of the activations' second moments H.
Each block of 32 gets its scale and offset when its turn comes. Then the blocks are gone through again, a few times:
every column takes its best code and every block its best scale and offset, all others as they are, so that
(w - ŵ) H (w - ŵ)' falls with every move. On the grids that were found GPTQ starts a second time,
and each row keeps the better of both.

Measured on layer 10 of SmolLM2-135M: the descent ends 1 to 2 % below solving for all scales of a row at once, in a
third to a ninth of the time. Starts from HQQ's grid or from the nearest codes end 5 to 45 % higher. Columns scaled as
AWQ does beforehand change the result by 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from quantize.formats import BLOCK, Parts, WeightFormat, assemble, decode

_LEVELS: Final = 15
_DAMPING: Final = 0.01  # of the mean diagonal, added to it
_SHRINKS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)  # of a block's range: outliers may be cut
_STARTS: Final = 2  # of GPTQ; the second takes 3 % off the error
_SWEEPS: Final = 4  # over the blocks after each start; ten take 0.5 % off
_TURNS: Final = 2  # of codes and grid within a block, before the next one
_RIDGE: Final = 1e-4  # against moves of a scale that codes without spread do not bear out, relative


@dataclass(frozen=True, slots=True)
class _Coded:
    """A matrix (N, K) on its grid: codes (N, K), scale and value of code 0 (N, blocks)."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def miss(self, weight: Tensor) -> Tensor:
        """What the grid leaves of the weights, (N, K)."""
        scale, low = (each.repeat_interleave(BLOCK, 1) for each in (self.scale, self.low))
        return weight - (self.codes * scale + low)

    def losses(self, weight: Tensor, moments: Tensor) -> Tensor:
        """(w - ŵ) H (w - ŵ)' of every row."""
        miss = self.miss(weight)
        return ((miss @ moments) * miss).sum(1)

    def or_else(self, other: _Coded, rows: Tensor) -> _Coded:
        """These rows of this, the rest of another."""
        here, there = (self.codes, self.scale, self.low), (other.codes, other.scale, other.low)
        return _Coded(*(torch.where(rows[:, None], a, b) for a, b in zip(here, there, strict=True)))


def fit_matrix(weight: Tensor, moments: Tensor, fmt: WeightFormat) -> Parts:
    """Parts of a (N, K) matrix for activations with second moments H (K, K)."""
    moments = _damped(moments)
    single = moments.float()
    best = _descended(weight, single, _rounded(weight, moments, fmt), fmt)
    for _ in range(1, _STARTS):
        again = _descended(weight, single, _rounded(weight, moments, fmt, best), fmt)
        best = again.or_else(best, again.losses(weight, single) < best.losses(weight, single))
    codes = best.codes.to(torch.uint8).reshape(weight.shape[0], -1, BLOCK)
    return assemble(codes.numpy(), best.scale.numpy(), best.low.numpy(), fmt)


def _damped(moments: Tensor) -> Tensor:
    """H in double precision that can be inverted, also where activations are few or never there."""
    moments = moments.double()
    dead = moments.diagonal() == 0
    return moments + torch.diag(dead.double() + _DAMPING * moments.diagonal().mean())


def weighted_error(weight: Tensor, parts: Parts, fmt: WeightFormat, moments: Tensor) -> float:
    """Mean squared error of the products, relative: (w - ŵ) H (w - ŵ)' over w H w'."""
    dense = torch.from_numpy(np.ascontiguousarray(decode(parts, fmt)))
    miss = (weight - dense).double()
    moments = moments.double()
    lost, whole = ((d @ moments * d).sum() for d in (miss, weight.double()))
    return float(lost / whole)


def _rounded(weight: Tensor, moments: Tensor, fmt: WeightFormat, grids: _Coded | None = None) -> _Coded:
    """The matrix rounded by GPTQ; on the scales and offsets of `grids` where they are given."""
    inverse = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True
    ).float()
    importance = moments.diagonal().float()
    left, codes = weight.clone(), torch.empty_like(weight)
    scales, lows = [], []
    for number, start in enumerate(range(0, weight.shape[1], BLOCK)):
        end = start + BLOCK
        block, errors = left[:, start:end].clone(), torch.empty(weight.shape[0], BLOCK)
        if grids is None:
            scale, low = _grid(block, importance[start:end], fmt)
        else:
            scale, low = grids.scale[:, number], grids.low[:, number]
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
    return _Coded(codes, torch.stack(scales, 1), torch.stack(lows, 1))


def _descended(weight: Tensor, moments: Tensor, start: _Coded, fmt: WeightFormat) -> _Coded:
    """What block coordinate descent makes of a start: each block to its best, all others as they are.

    Everything lies transposed here, so that what is done to a column of all rows runs over neighbours in memory.
    """
    codes, scale, low = (each.T.contiguous() for each in (start.codes, start.scale, start.low))
    pull = (start.miss(weight) @ moments).T.contiguous()
    for _ in range(_SWEEPS):
        for number in range(len(scale)):
            at = slice(number * BLOCK, (number + 1) * BLOCK)
            block, step, first = codes[at], scale[number], low[number]
            here, within = pull[at].clone(), moments[at, at].contiguous()
            before = block * step + first
            for _ in range(_TURNS):
                _recode(block, here, within, step)
                wider, higher = _regrid(block, here, within, step, first, fmt)
                here -= within @ (block * (wider - step) + (higher - first))
                step, first = wider, higher
            pull -= moments[:, at] @ (block * step + first - before)
            scale[number], low[number] = step, first
    return _Coded(codes.T.contiguous(), scale.T.contiguous(), low.T.contiguous())


def _recode(codes: Tensor, here: Tensor, within: Tensor, scale: Tensor) -> None:
    """One column of a block (32, N) after the other to its best code, in place; `here` is (w - ŵ) H of the block."""
    worth = within.diagonal()[:, None] * scale
    for column in range(BLOCK):
        best = (here[column] / worth[column]).add_(codes[column]).round_().clamp_(0, _LEVELS)
        move = (best - codes[column]).mul_(scale)
        here.addr_(within[column], move, alpha=-1)
        codes[column] = best


def _regrid(
    codes: Tensor, here: Tensor, within: Tensor, scale: Tensor, low: Tensor, fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Scale and value of code 0 of a block (32, N) that lose least for its codes; a zero stays where it is.

    The offset is found after the scale was rounded, so that it makes up for that.
    """
    if not fmt.has_offset:
        zero = (-low / scale).round()
        shape = codes - zero
        curve = ((within @ shape) * shape).sum(0)
        step = _moved(scale, (here * shape).sum(0) / (curve * (1 + _RIDGE)), curve > 0)
        return step, -zero * step
    through = within @ codes
    curve, both = (through * codes).sum(0) * (1 + _RIDGE), through.sum(0)
    flat = within.sum() * (1 + _RIDGE)
    slope, shift = (here * codes).sum(0), here.sum(0)
    spread = curve * flat - both**2
    step = _moved(scale, (slope * flat - shift * both) / spread, spread > 0)
    return step, (low + (shift - both * (step - scale)) / flat).half().float()


def _moved(scale: Tensor, move: Tensor, sound: Tensor) -> Tensor:
    """Scales after a move; one that would vanish or turn belongs to a block without spread, and stays."""
    step = (scale + move).half().float()
    return torch.where(sound & (step > 0.3 * scale), step, scale)


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
