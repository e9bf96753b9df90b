"""One config, one scale, one order of the adapter's numbers, for trainer, codec, aggregation and export.

Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * B A, with A of shape (r, in) and B of
shape (out, r). Under the rule `ffa` (Sun et al. 2024, arXiv 2403.12313) only B is trained and sent; A has
orthonormal rows, stays as it is and follows from a public seed, so that the mean of the devices' B is exactly the
mean of their updates.

numpy is imported inside the functions that compute: the idle agent reads manifests, and with them this module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fedge.errors import DataError, UnsupportedError
from fedge.limits import ADAPTER_NUMBERS_MAX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

A_SEED_BYTES: Final = 16
_DOMAIN: Final = b"fedge frozen A v1\x00"


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What turns A and B into the change of a weight. The only place where the scale is computed."""

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The order of the adapter's numbers: layer by layer, modules sorted, B in C order. Make it with `of`."""

    layers: int
    r: int
    modules: tuple[tuple[str, int, int], ...]  # (path in a block, out, in), sorted by path

    @classmethod
    def of(cls, layers: int, lora_shapes: Mapping[str, tuple[int, int]], r: int) -> AdapterLayout:
        """From a manifest's `layers`, `lora_shapes` and `lora.r`. Raises UnsupportedError when out of range."""
        modules = tuple((path, *lora_shapes[path]) for path in sorted(lora_shapes))
        layout = cls(layers, r, modules)
        if not 0 < layout.numbers <= ADAPTER_NUMBERS_MAX:
            raise UnsupportedError("adapter size is out of range", field="numbers", value=layout.numbers)
        for path, out, n_in in modules:
            if not 0 < r <= min(out, n_in):
                raise UnsupportedError("rank must be between 1 and the matrix's own", field=path, value=r)
        return layout

    @property
    def numbers(self) -> int:
        """How many numbers are trained, and travel."""
        return self.layers * self.r * sum(out for _, out, _ in self.modules)

    @property
    def b_shapes(self) -> dict[str, tuple[int, int]]:
        """`L{i}/{module}.B` -> (out, r), in the order of the vector."""
        return {f"L{i}/{path}.B": (out, self.r) for i in range(self.layers) for path, out, _ in self.modules}

    @property
    def a_shapes(self) -> dict[str, tuple[int, int]]:
        """`L{i}/{module}.A` -> (r, in), in the same order."""
        return {
            f"L{i}/{path}.A": (self.r, n_in) for i in range(self.layers) for path, _, n_in in self.modules
        }

    def split(self, vector: Floats) -> dict[str, Floats]:
        """Views of a vector of `numbers` float32, one per B. Raises DataError for another length."""
        if vector.shape != (self.numbers,):
            raise DataError(
                "adapter vector has another length than its layout", field="numbers", value=vector.shape
            )
        views, start = {}, 0
        for name, (out, r) in self.b_shapes.items():
            views[name] = vector[start : start + out * r].reshape(out, r)
            start += out * r
        return views

    def join(self, tensors: Mapping[str, Floats]) -> Floats:
        """The vector of these B; inverse of `split`. Raises DataError for a missing, surplus or misshapen one."""
        import numpy as np

        shapes = self.b_shapes
        for name in [*shapes, *tensors]:
            found = tensors[name].shape if name in tensors else None
            if shapes.get(name) != found:
                raise DataError("adapter tensor does not fit the layout", field=name, value=found)
        return np.concatenate([tensors[name].reshape(-1) for name in shapes]).astype(np.float32, copy=False)

    def frozen(self, seed: bytes) -> dict[str, Floats]:
        """Every A of the public `seed`, by name."""
        return {name: frozen_a(seed, name, r, n_in) for name, (r, n_in) in self.a_shapes.items()}


def frozen_a(seed: bytes, name: str, r: int, n_in: int) -> Floats:
    """The frozen A called `name`: (r, n_in) float32, orthonormal rows, bit for bit the same on every machine.

    SHAKE-256 of seed, name and shape gives nearly normal integers (sums of four 16-bit ones); Gram-Schmidt, done
    twice, makes the rows orthonormal: a QR factorisation whose R has a positive diagonal. It uses only single
    IEEE 754 operations in a stated order, because LAPACK's last bits depend on the processor.
    """
    import numpy as np

    if len(seed) != A_SEED_BYTES:
        raise DataError("seed of A must have 16 bytes", field="a_seed", value=len(seed))
    public = _DOMAIN + seed + f"{name}|{r}|{n_in}".encode()
    draws = np.frombuffer(hashlib.shake_256(public).digest(8 * r * n_in), dtype="<i2").reshape(r, n_in, 4)
    rows = draws.sum(axis=2, dtype=np.int64).astype(np.float64)
    for j in range(r):
        # Once leaves an error that grows with the condition number; twice is enough (Giraud et al. 2005).
        for _ in range(2):
            for shadow in rows[:j] * _tree_sum(rows[:j] * rows[j])[:, None]:
                rows[j] -= shadow
            rows[j] /= np.sqrt(_tree_sum(rows[j] * rows[j]))
    frozen: Floats = rows.astype(np.float32)
    return frozen


def _tree_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the last axis by halving: elementwise additions only, so no SIMD width changes the order."""
    import numpy as np

    while (n := values.shape[-1]) > 1:
        half = n // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = folded if n % 2 == 0 else np.concatenate([folded, values[..., -1:]], axis=-1)
    return values[..., 0]
