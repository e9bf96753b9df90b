"""What a layer sees as its key/value cache while it is traced or run: it joins old and new, and remembers them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters
from quantize.decode_start import undecodable
from quantize.joint import EXAMPLE, example_aux


class Remembered:
    """The part of transformers' cache that a decoder layer uses."""

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.was_updated = keys, values, False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The cached and the new keys and values, joined along the positions."""
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.was_updated = True
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """How many positions are remembered."""
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of one layer's keys, and values: [B, heads, positions, width]."""

    heads: int
    width: int


class _Shapes(Remembered):
    def __init__(self) -> None:
        super().__init__(torch.empty(0), torch.empty(0))

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.was_updated = keys, values, True
        return keys, values


def cache_shape(anatomy: Anatomy, block: nn.Module) -> CacheShape:
    """Found by running the layer. Raises UnsupportedError when it does not use the cache that it is given."""
    adapter, frozen = block_parameters(block)
    aux = dict(zip(anatomy.aux, example_aux(anatomy), strict=True))
    cache = _Shapes()
    try:
        with torch.no_grad():
            anatomy.call(
                block, {**adapter, **frozen}, torch.randn(*EXAMPLE, anatomy.hidden), aux, cache=cache
            )
    except Exception as error:  # whatever a layer's own code may ask of a cache
        raise undecodable("its layers want another cache", str(error)[:160]) from error
    if not cache.was_updated or cache.keys.dim() != 4 or cache.keys.shape != cache.values.shape:
        raise undecodable("its layers do not use the cache that they are given", anatomy.layers_path)
    return CacheShape(cache.keys.shape[1], cache.keys.shape[3])
