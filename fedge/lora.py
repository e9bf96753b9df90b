"""One config, one scale, one order of the adapter's numbers, for trainer, codec, aggregation and export.

Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W' = W + scale * B A, with A of shape (r, in) and B of
shape (out, r). What a config means is PEFT's meaning, word for word: a list of targets names modules by the end of
their path, a string is a regular expression for the whole path, patterns give single modules another rank or alpha.

A *slot* is one adapted matrix of one layer. All layers share one graph per direction, so a module whose slots differ
gets the largest rank in the graph, and `fed` fills up the others with zeros, which changes no value and no gradient.

numpy is imported inside the functions that compute: the idle agent reads manifests, and with them this module.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from fedge.errors import DataError, UnsupportedError
from fedge.limits import ADAPTER_MATRICES_MAX, ADAPTER_NUMBERS_MAX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

N = TypeVar("N", int, float)
A_SEED_BYTES: Final = 16
ALL_LINEAR: Final = "all-linear"  # PEFT's word for every matrix of a block
RULES: Final = ("ffa", "fedit", "alternating", "core", "sketch")  # of federated training: fedge.rules
LAYER_PATH: Final = "model.layers"  # where most families keep their blocks
DENSE: Final = "dense/"  # prefix of what is trained in full beside A and B
_DOMAIN: Final = b"fedge frozen A v1\x00"
_PATTERN_CHARS_MAX: Final = 256
_REPEATS_MAX: Final = 4  # `*`, `+`, `{`: a pattern's time is at most a path's length to this power
_REPEATED_GROUP: Final = re.compile(r"\)[*+{]")  # nested repetition may take for ever


def module_scale(alpha: float, r: int, *, rslora: bool) -> float:
    """The factor before B A: alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732).

    The only place that computes it, for training graph, inference graph, import and export.
    """
    return alpha / (math.sqrt(r) if rslora else r)


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What turns A and B into the change of a weight, and of which weights. Field for field PEFT's `LoraConfig`."""

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")  # names, a regular expression, or "all-linear"
    rslora: bool = False
    rank_pattern: dict[str, int] = {}  # end of a path, as a regular expression -> rank
    alpha_pattern: dict[str, float] = {}
    layers: tuple[int, ...] = ()  # of which layers, PEFT's `layers_to_transform`; () = all
    modules_to_save: tuple[str, ...] = ()  # heads that are trained in full

    def __post_init__(self) -> None:
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        for pattern in patterns if isinstance(self.targets, tuple) else [*patterns, self.targets]:
            _require_tame(pattern)
        if self.layers and isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise UnsupportedError(
                "a pattern for targets names the layers itself", field="layers", value=self.layers
            )

    @property
    def scale(self) -> float:
        """Of a module that no pattern names."""
        return module_scale(self.alpha, self.r, rslora=self.rslora)

    def adapts(self, path: str, layer: int) -> bool:
        """Whether the matrix with this path from the model's root, in this layer, gets an A and a B."""
        if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in self.modules_to_save):
            return False
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            return re.fullmatch(self.targets, path) is not None
        if isinstance(self.targets, tuple) and path in self.targets:
            return True
        named = self.targets == ALL_LINEAR or any(path.endswith("." + name) for name in self.targets)
        return named and (not self.layers or layer in self.layers)

    def saves(self, name: str) -> bool:
        """Whether the parameter called `name` from the model's root is trained in full.

        PEFT's rule: it lies in a module whose path ends with one of the names, so `classifier` means
        `pre_classifier` as well.
        """
        modules = [name[: at.start()] for at in re.finditer(r"\.", name)]
        return any(module.endswith(end) for module in modules for end in self.modules_to_save)

    def rank_of(self, path: str) -> int:
        """r of the module with this path."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale_of(self, path: str) -> float:
        """The scale of the module with this path."""
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return module_scale(alpha, self.rank_of(path), rslora=self.rslora)


def _by_pattern(patterns: Mapping[str, N], path: str, default: N) -> N:
    """PEFT's `get_pattern_key`: the first pattern that matches the end of the path, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _require_tame(pattern: str) -> None:
    """Patterns come with bundles and files of others: what would not end in time is refused unread."""
    repeats = sum(map(pattern.count, "*+{"))
    if len(pattern) > _PATTERN_CHARS_MAX or repeats > _REPEATS_MAX or _REPEATED_GROUP.search(pattern):
        raise UnsupportedError(
            "pattern is too complex", field="pattern", value=pattern, hint="Name the modules in a list"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise DataError(f"pattern cannot be read: {error}", field="pattern", value=pattern) from error


@dataclass(frozen=True, slots=True)
class Slot:
    """One adapted matrix: `path` in its block, `out` x `n_in`, and what its own A and B are."""

    layer: int
    path: str
    out: int
    n_in: int
    r: int
    scale: float

    @property
    def name(self) -> str:
        """`L3/self_attn.q_proj`; `.A` and `.B` make the tensors' names."""
        return f"L{self.layer}/{self.path}"


@dataclass(frozen=True, slots=True)
class GraphModule:
    """A module as the block graphs have it, for all layers: rank of A and B, and the scale that is built in."""

    out: int
    n_in: int
    r: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The order of the adapter's numbers: B layer by layer, modules sorted, in C order; then `dense`, sorted by name.

    Dense numbers are the *change* from the bundle's start values, so that zeros are always the untouched model.
    Make it with `of`.
    """

    layers: int
    modules: tuple[tuple[str, int, int], ...]  # (path in a block, out, in) of all layers together, by path
    slots: tuple[Slot, ...]
    layer_path: str = LAYER_PATH
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(
        cls,
        layers: int,
        lora_shapes: Mapping[str, tuple[int, int]],
        lora: LoraConfig | int,
        *,
        layer_path: str = LAYER_PATH,
        dense: Mapping[str, tuple[int, ...]] | None = None,
    ) -> AdapterLayout:
        """From a manifest's fields; a bare rank means every module of every layer.

        Raises UnsupportedError when out of range, or for a config that adapts nothing.
        """
        config = LoraConfig(r=lora, targets=ALL_LINEAR) if isinstance(lora, int) else lora
        modules = tuple((path, *lora_shapes[path]) for path in sorted(lora_shapes))
        if not 0 < layers * len(modules) <= ADAPTER_MATRICES_MAX:
            raise UnsupportedError("adapter size is out of range", field="layers", value=layers)
        slots = tuple(_slots(layers, modules, config, layer_path))
        layout = cls(layers, modules, slots, layer_path, tuple(sorted((dense or {}).items())))
        if not 0 < layout.numbers <= ADAPTER_NUMBERS_MAX:
            raise UnsupportedError("adapter size is out of range", field="numbers", value=layout.numbers)
        return layout

    def like(self, config: LoraConfig) -> AdapterLayout:
        """The layout of another config on the same model, as far as this one's modules go."""
        shapes = {path: (out, n_in) for path, out, n_in in self.modules}
        dense = {name: shape for name, shape in self.dense if config.saves(name)}
        return AdapterLayout.of(self.layers, shapes, config, layer_path=self.layer_path, dense=dense)

    # ------------------------------------------------------------ shapes
    @property
    def r(self) -> int:
        """The largest rank."""
        return max((slot.r for slot in self.slots), default=0)

    @property
    def numbers(self) -> int:
        """How many numbers B and the dense part have: what is trained, and travels, under the rule `ffa`."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def b_shapes(self) -> dict[str, tuple[int, int]]:
        """`L{i}/{module}.B` -> (out, r), in the order of the vector."""
        return {f"{slot.name}.B": (slot.out, slot.r) for slot in self.slots}

    @property
    def a_shapes(self) -> dict[str, tuple[int, int]]:
        """`L{i}/{module}.A` -> (r, in), in the same order."""
        return {f"{slot.name}.A": (slot.r, slot.n_in) for slot in self.slots}

    @property
    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """`dense/{name}` -> shape, in the order of the vector."""
        return {DENSE + name: shape for name, shape in self.dense}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of everything in the vector, in its order."""
        return {**self.b_shapes, **self.dense_shapes}

    # ------------------------------------------------------------ the vector
    def split(self, vector: Floats) -> dict[str, Floats]:
        """Views of a vector of `numbers` float32, one per tensor. Raises DataError for another length."""
        return split(self.shapes, vector)

    def join(self, tensors: Mapping[str, Floats]) -> Floats:
        """The vector of these tensors; inverse of `split`. Raises DataError for a missing, surplus or misshapen one."""
        return join(self.shapes, tensors)

    def frozen(self, seed: bytes) -> dict[str, Floats]:
        """Every A of the public `seed`, by name."""
        return {name: frozen_a(seed, name, r, n_in) for name, (r, n_in) in self.a_shapes.items()}

    # ------------------------------------------------------------ the graphs' view
    @property
    def graph(self) -> dict[str, GraphModule]:
        """Module path in a block -> what the graphs of all layers have for it."""
        found = {}
        for path, out, n_in in self.modules:
            slots = [slot for slot in self.slots if slot.path == path]
            scales = {slot.scale for slot in slots}
            scale = scales.pop() if len(scales) == 1 else 1.0
            found[path] = GraphModule(out, n_in, max((slot.r for slot in slots), default=1), scale)
        return found

    @property
    def uniform(self) -> bool:
        """Whether every slot is just what the graph has, so that `fed` and `taken` have nothing to do."""
        graph = self.graph
        whole = len(self.slots) == self.layers * len(self.modules)
        return whole and all((s.r, s.scale) == (graph[s.path].r, graph[s.path].scale) for s in self.slots)

    def fed(self, tensors: Mapping[str, Floats]) -> dict[str, Floats]:
        """A and B as the graphs read them: filled up to the graph's rank, and B in the graph's scale."""
        import numpy as np

        if self.uniform:
            return dict(tensors)
        graph, known = self.graph, {(slot.layer, slot.path): slot for slot in self.slots}
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(DENSE)}
        for layer in range(self.layers):
            for path, module in graph.items():
                a = np.zeros((module.r, module.n_in), np.float32)
                b = np.zeros((module.out, module.r), np.float32)
                slot = known.get((layer, path))
                if slot is not None:
                    a[: slot.r] = tensors[f"{slot.name}.A"]
                    b[:, : slot.r] = tensors[f"{slot.name}.B"] * np.float32(slot.scale / module.scale)
                found[f"L{layer}/{path}.A"], found[f"L{layer}/{path}.B"] = a, b
        return found

    def taken(self, gradients: Mapping[str, Floats]) -> dict[str, Floats]:
        """Gradients by what `fed` gave -> gradients by the slots' own A and B; those that are there."""
        import numpy as np

        if self.uniform:
            return dict(gradients)
        graph = self.graph
        found = {name: value for name, value in gradients.items() if name.startswith(DENSE)}
        for slot in self.slots:
            a, b = f"{slot.name}.A", f"{slot.name}.B"
            if a in gradients:
                found[a] = gradients[a][: slot.r]
            if b in gradients:
                found[b] = gradients[b][:, : slot.r] * np.float32(slot.scale / graph[slot.path].scale)
        return found


def _slots(
    layers: int, modules: tuple[tuple[str, int, int], ...], config: LoraConfig, layer_path: str
) -> list[Slot]:
    slots = []
    for layer in range(layers):
        for path, out, n_in in modules:
            whole = f"{layer_path}.{layer}.{path}"
            if not config.adapts(whole, layer):
                continue
            r = config.rank_of(whole)
            if not 0 < r <= min(out, n_in):
                raise UnsupportedError("rank must be between 1 and the matrix's own", field=path, value=r)
            slots.append(Slot(layer, path, out, n_in, r, config.scale_of(whole)))
    return slots


def split(shapes: Mapping[str, tuple[int, ...]], vector: Floats) -> dict[str, Floats]:
    """Views of `vector`, one tensor after the other. Raises DataError unless it is as long as they are together."""
    numbers = sum(map(math.prod, shapes.values()))
    if vector.shape != (numbers,):
        raise DataError(
            "adapter vector has another length than its layout", field="numbers", value=vector.shape
        )
    views, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        views[name] = vector[start:end].reshape(shape)
        start = end
    return views


def join(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Floats]) -> Floats:
    """The inverse of `split`. Raises DataError for a missing, surplus or misshapen tensor."""
    import numpy as np

    for name in [*shapes, *tensors]:
        found = tensors[name].shape if name in tensors else None
        if shapes.get(name) != found:
            raise DataError("adapter tensor does not fit the layout", field=name, value=found)
    if not shapes:
        return np.zeros(0, np.float32)
    return np.concatenate([tensors[name].reshape(-1) for name in shapes]).astype(np.float32, copy=False)


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
