"""A Llama-like stack of layers written in the runtime's fused operators, where it computes what the traced one does.

The tracer's graph of a layer has 120 small operators, and its cache grows by a copy at every token. The runtime has
the same arithmetic in a few: root-mean-square norms that add the residual on the way, and grouped query attention
that rotates queries and keys and writes into a cache that stays where it is. Activations are [B, S, D] throughout;
matrices that read the same ones are one product (`quantize.decode_lowering`).

Attention rotates by tables of all positions, which the runtime computes once, when it loads. Where they would be too
large, and where heads have norms of their own to pass first, rotation is an operator by itself.

Nothing is believed by name. `recognise` reads the parts from a layer's modules, and `agrees` compares one layer, with
and without a past, with torch; where the two differ the traced graph is taken. The gates then judge the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters
from quantize.decode_cache import CacheShape, Remembered
from quantize.decode_lowering import apart, joined_node
from quantize.decode_start import MASK, ROTARY
from quantize.graph import MICROSOFT, GraphWriter, tensor_input
from quantize.placeholder import DOMAIN

SAME: Final = 1e-5  # relative, between a fused layer and torch; measured 1e-6
_QKV: Final = ("q_proj", "k_proj", "v_proj")
_COUNTS: Final = (5, 3, 1)  # tokens that a layer is tried on, one reading after the other


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a layer is made of: paths within it, and the numbers that its operators need."""

    attention: str  # path of the attention module
    feed: str  # path of the feed-forward module
    norms: tuple[str, str]  # before attention, before feed-forward
    epsilons: tuple[float, float]
    head_norms: float | None  # epsilon of norms over the heads of q and k, where there are any
    packed: bool  # qkv_proj and gate_up_proj instead of five matrices
    activation: str  # "silu" or "gelu_tanh"
    heads: int
    kv_heads: int
    width: int
    scale: float
    cap: float  # of attention scores, 0 = none
    frozen: Mapping[str, nn.Module]  # path -> FrozenLinear


def recognise(
    anatomy: Anatomy, block: nn.Module, cache: CacheShape, windows: Mapping[str, int]
) -> Recipe | None:
    """The recipe of a pre-norm, gated, rotary layer whose attention sees all of the past; None for any other."""
    modules = dict(block.named_modules())
    parts = {name: type(module).__name__ for name, module in modules.items()}
    attention = next((n.removesuffix(".o_proj") for n in modules if n.endswith(".o_proj")), None)
    feed = next((n.removesuffix(".down_proj") for n in modules if n.endswith(".down_proj")), None)
    norms = [n for n, kind in parts.items() if n and "." not in n and kind.endswith("RMSNorm")]
    if attention is None or feed is None or len(norms) != 2 or set(anatomy.aux) != {MASK, *ROTARY}:
        return None
    linears = {n: m for n, m in modules.items() if hasattr(m, "w")}
    packed = f"{attention}.qkv_proj" in linears
    expected = {f"{attention}.o_proj", f"{feed}.down_proj"}
    expected |= {f"{attention}.{n}" for n in (("qkv_proj",) if packed else _QKV)}
    expected |= {f"{feed}.{n}" for n in (("gate_up_proj",) if packed else ("gate_proj", "up_proj"))}
    head_norms = [modules.get(f"{attention}.{name}") for name in ("q_norm", "k_norm")]
    activation = _activation(modules[feed])
    if set(linears) != expected or activation is None or any(windows.values()):
        return None
    module = modules[attention]
    return Recipe(
        attention=attention,
        feed=feed,
        norms=(norms[0], norms[1]),
        epsilons=(_epsilon(modules[norms[0]]), _epsilon(modules[norms[1]])),
        head_norms=None if head_norms[0] is None else _epsilon(head_norms[0]),
        packed=packed,
        activation=activation,
        heads=int(anatomy.model.config.num_attention_heads),
        kv_heads=cache.heads,
        width=cache.width,
        scale=float(getattr(module, "scaling", cache.width**-0.5)),
        cap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
        frozen=linears,
    )


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 1e-6)


def _activation(feed: nn.Module) -> str | None:
    found = next((getattr(feed, n) for n in ("act_fn", "activation_fn") if hasattr(feed, n)), None)
    if found is None:
        return None
    x = torch.linspace(-4, 4, 65)
    with torch.no_grad():
        y = found(x)
    known = {
        "silu": torch.nn.functional.silu(x),
        "gelu_tanh": torch.nn.functional.gelu(x, approximate="tanh"),
    }
    return next((name for name, value in known.items() if torch.allclose(y, value, atol=1e-6)), None)


class FusedLayers:
    """Writes layers into a graph that has ids [B, S], positions [B, S] and the rotary tables by name."""

    def __init__(
        self, writer: GraphWriter, recipe: Recipe, tables: Mapping[str, str], rotary: int, *, whole: bool
    ) -> None:
        """`tables`: cos and sin, per kind as cos@KIND; halves are equal.

        They are [1, P, `rotary`] of all positions where `whole`, else [1 or B, S, `rotary`] of the tokens.
        """
        self._writer, self._recipe, self._rotary, self._whole = writer, recipe, rotary, whole
        last = writer.add("ReduceMax", ["positions"], keepdims=0)
        as_int32 = {"to": onnx.TensorProto.INT32}
        length = writer.add("Cast", [last], **as_int32)
        batch = writer.add("Shape", ["ids"], start=0, end=1)
        self._last = writer.add("Expand", [length, batch])  # [B]: the length of each sequence, less one
        self._total = writer.add("Add", [length, writer.constant(np.array(1, np.int32))])
        self._shape = writer.add("Shape", ["ids"])
        self._silence: dict[int, str] = {}
        if not whole:
            tokens = writer.add("Mul", [batch, writer.add("Shape", ["ids"], start=1, end=2)])
            zero, one = (writer.constant(np.array(value, np.int64)) for value in (0, 1))
            rows = writer.add("Range", [zero, writer.add("Squeeze", [tokens]), one])
            self._rows = writer.add("Reshape", [rows, self._shape])  # row of each token in the tables
        self._tables = {name: self._half(value) for name, value in tables.items()}

    def _half(self, table: str) -> str:
        """[P, rotary / 2] of a table of all positions, [B S, rotary / 2] of one of the tokens."""
        writer, half = self._writer, self._rotary // 2
        first = writer.add("Slice", [table, writer.integers(0), writer.integers(half), writer.integers(-1)])
        if not self._whole:
            shape = writer.add("Concat", [self._shape, writer.integers(half)], axis=0)
            first = writer.add("Expand", [first, shape])
        return writer.add("Reshape", [first, writer.integers(-1, half)])

    def layer(self, index: int, x: str, skip: str | None, kind: str) -> tuple[str, str]:
        """(residual, what is still to be added to it) after layer `index`, from the same before it."""
        recipe, prefix = self._recipe, f"L{index}/"
        normed, x = self.norm(x, skip, f"{prefix}{recipe.norms[0]}.weight", recipe.epsilons[0])
        y = self._attention(index, normed, kind)
        normed, x = self.norm(x, y, f"{prefix}{recipe.norms[1]}.weight", recipe.epsilons[1])
        return x, self._feed(prefix, normed)

    def norm(self, x: str, skip: str | None, weight: str, epsilon: float) -> tuple[str, str]:
        """(norm of x + skip, x + skip)."""
        writer = self._writer
        if skip is None:
            normed = writer.add(
                "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=epsilon, stash_type=1
            )
            return normed, x
        normed, total = writer.fresh(), writer.fresh()
        writer.nodes.append(
            onnx.helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [x, skip, weight],
                [normed, "", "", total],
                domain=MICROSOFT,
                epsilon=epsilon,
            )
        )
        return normed, total

    def _attention(self, index: int, x: str, kind: str) -> str:
        recipe, writer, prefix = self._recipe, self._writer, f"L{index}/"
        names = ("qkv_proj",) if recipe.packed else _QKV
        read = self._product(prefix, [f"{recipe.attention}.{name}" for name in names], x)
        queries, y = [read, "", ""], writer.fresh()
        if not self._whole or recipe.head_norms is not None:
            queries = self._heads(prefix, read, kind)
        tables = [self._table(name, kind) for name in ROTARY] if self._whole else []
        words: dict[str, Any] = {"softcap": recipe.cap} if recipe.cap else {}
        words |= {"do_rotary": 1} if self._whole else {}
        writer.nodes.append(
            onnx.helper.make_node(
                "GroupQueryAttention",
                [*queries, f"k{index}", f"v{index}", self._last, self._total, *tables],
                [y, f"nk{index}", f"nv{index}"],
                domain=MICROSOFT,
                num_heads=recipe.heads,
                kv_num_heads=recipe.kv_heads,
                scale=recipe.scale,
                **words,
            )
        )
        return self._product(prefix, [f"{recipe.attention}.o_proj"], y)

    def _heads(self, prefix: str, read: str, kind: str) -> list[str]:
        """Queries, keys and values apart: normed where heads are, rotated where attention does not rotate."""
        recipe = self._recipe
        own, shared = recipe.heads * recipe.width, recipe.kv_heads * recipe.width
        q, k, v = self._parts(read, own, shared, shared)
        if recipe.head_norms is not None:
            q = self._head_norm(q, f"{prefix}{recipe.attention}.q_norm.weight")
            k = self._head_norm(k, f"{prefix}{recipe.attention}.k_norm.weight")
        if not self._whole:
            q, k = self._rotated(q, recipe.heads, kind), self._rotated(k, recipe.kv_heads, kind)
        return [q, k, v]

    def _rotated(self, x: str, heads: int, kind: str) -> str:
        return self._writer.add(
            "RotaryEmbedding",
            [x, self._rows, self._table("cos", kind), self._table("sin", kind)],
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=0 if self._rotary == self._recipe.width else self._rotary,
        )

    def _feed(self, prefix: str, x: str) -> str:
        recipe, writer = self._recipe, self._writer
        names = ("gate_up_proj",) if recipe.packed else ("gate_proj", "up_proj")
        paths = [f"{recipe.feed}.{name}" for name in names]
        both = self._product(prefix, paths, x)
        half = sum(recipe.frozen[path].w.shape[0] for path in paths) // 2
        gate, up = self._parts(both, half, half)
        if recipe.activation == "silu":
            bent = writer.add("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)  # x sigmoid(1 x)
        else:
            bent = writer.add("FastGelu", [gate], domain=MICROSOFT)
        return self._product(prefix, [f"{recipe.feed}.down_proj"], writer.add("Mul", [bent, up]))

    def _product(self, prefix: str, paths: Sequence[str], x: str) -> str:
        """[B, S, rows of all] of the modules at `paths`, side by side, with their biases and adapters."""
        writer, frozen = self._writer, self._recipe.frozen
        addends = []
        if any(getattr(frozen[path], "b", None) is not None for path in paths):
            addends.append(self._beside([self._bias(prefix, path) for path in paths], axis=0))
        if any(frozen[path].lora is not None for path in paths):
            addends.append(self._beside([self._adapted(prefix, path, x) for path in paths], axis=-1))
        y = writer.fresh()
        writer.nodes.append(joined_node(x, [f"{prefix}{path}.w" for path in paths], addends, y))
        return y

    def _beside(self, parts: list[str], axis: int) -> str:
        return parts[0] if len(parts) == 1 else self._writer.add("Concat", parts, axis=axis)

    def _bias(self, prefix: str, path: str) -> str:
        module = self._recipe.frozen[path]
        if getattr(module, "b", None) is not None:
            return f"{prefix}{path}.b"
        return self._writer.constant(np.zeros(module.w.shape[0], np.float32))

    def _adapted(self, prefix: str, path: str, x: str) -> str:
        """What the adapter of a module adds to it, [B, S, N]; zeros where it has none."""
        writer, module = self._writer, self._recipe.frozen[path]
        if module.lora is None:
            return self._zeros(int(module.w.shape[0]))
        # The scale in the second product: the runtime has a fast kernel for one row only without one.
        low = writer.add("FusedMatMul", [x, f"{prefix}{path}.A"], domain=MICROSOFT, transB=1)
        return writer.add(
            "FusedMatMul",
            [low, f"{prefix}{path}.B"],
            domain=MICROSOFT,
            transB=1,
            alpha=float(lora_scale(module)),
        )

    def _zeros(self, columns: int) -> str:
        """[B, S, `columns`] of zeros, the same for all layers."""
        if columns not in self._silence:
            writer = self._writer
            shape = writer.add("Concat", [self._shape, writer.integers(columns)], axis=0)
            self._silence[columns] = writer.add("Expand", [writer.constant(np.float32(0)), shape])
        return self._silence[columns]

    def _head_norm(self, x: str, weight: str) -> str:
        recipe, writer = self._recipe, self._writer
        heads = writer.add("Reshape", [x, writer.integers(0, 0, -1, recipe.width)])
        normed, _ = self.norm(heads, None, weight, recipe.head_norms or 0.0)
        return writer.add("Reshape", [normed, writer.integers(0, 0, -1)])

    def _parts(self, x: str, *sizes: int) -> list[str]:
        names = [self._writer.fresh() for _ in sizes]
        node = onnx.helper.make_node("Split", [x, self._writer.integers(*sizes)], names, axis=-1)
        self._writer.nodes.append(node)
        return names

    def _table(self, name: str, kind: str) -> str:
        return self._tables.get(f"{name}@{kind}") or self._tables[name]


def lora_scale(module: Any) -> float:
    """What a FrozenLinear multiplies B A by."""
    return float(module.scale if hasattr(module, "scale") else module.lora.scale)


def agrees(anatomy: Anatomy, block: nn.Module, recipe: Recipe, *, whole: bool) -> bool:
    """Whether a fused layer gives what torch gives: first tokens, then more of them and one after a past."""
    width = int(anatomy.call.shapes["cos"][-1])
    session = _one_layer(block, recipe, anatomy.hidden, width, whole=whole)
    adapter, frozen = block_parameters(block)
    weights = {f"L0/{name}": value.numpy() for name, value in {**adapter, **frozen}.items()}
    draw, past = torch.Generator().manual_seed(0), 0
    shape = (1, recipe.kv_heads, 0, recipe.width)
    mine = {name: np.zeros(shape, np.float32) for name in ("k0", "v0")}
    keys, values = torch.zeros(shape), torch.zeros(shape)
    angles = torch.rand(1, sum(_COUNTS) + 2, width // 2, generator=draw).repeat(1, 1, 2) * 6
    for count in _COUNTS:
        total = past + count
        x = torch.randn(1, count, anatomy.hidden, generator=draw)
        row, column = torch.arange(past, total)[:, None], torch.arange(total)[None]
        mask = torch.where(column <= row, 0.0, torch.finfo(torch.float32).min)[None, None]
        theirs, turned = Remembered(keys, values), angles[:, past:total]
        aux = {MASK: mask, "cos": turned.cos(), "sin": turned.sin()}
        with torch.no_grad():
            expected = anatomy.call(block, {**adapter, **frozen}, x, aux, cache=theirs)
        keys, values, past = theirs.keys, theirs.values, total
        feeds = {
            "ids": np.zeros((1, count), np.int64),
            "positions": np.arange(total - count, total)[None],
            "x": x.numpy(),
            "cos": (angles.cos() if whole else aux["cos"]).numpy(),
            "sin": (angles.sin() if whole else aux["sin"]).numpy(),
            **mine,
            **weights,
        }
        try:
            y, mine["k0"], mine["v0"] = session.run(["y", "nk0", "nv0"], feeds)
        except Exception:  # the runtime's errors share no base class; shapes that do not fit are no agreement
            return False
        if not np.linalg.norm(y - expected.numpy()) <= SAME * float(expected.norm()):
            return False
    return True


def _one_layer(
    block: nn.Module, recipe: Recipe, hidden: int, rotary: int, *, whole: bool
) -> ort.InferenceSession:
    """Layer 0 with dense weights as inputs: ids, positions, x, cos, sin, k0, v0; outputs y, nk0, nv0."""
    writer = GraphWriter()
    layers = FusedLayers(writer, recipe, {name: name for name in ROTARY}, rotary, whole=whole)
    x, skip = layers.layer(0, "x", None, "")
    writer.add("Add", [x, skip], "y")
    placed, writer.nodes = writer.nodes, []
    for node in placed:
        if node.domain == DOMAIN:
            _write_dense(writer, node)
        else:
            writer.nodes.append(node)
    adapter, frozen = block_parameters(block)
    inputs = [tensor_input(name, "int64", [1, "S"]) for name in ("ids", "positions")]
    inputs += [tensor_input("x", "float32", [1, "S", hidden])]
    inputs += [tensor_input(name, "float32", [1, "R", rotary]) for name in ROTARY]
    inputs += [tensor_input(f"L0/{n}", "float32", list(t.shape)) for n, t in {**adapter, **frozen}.items()]
    caches = {"k0": "P", "v0": "P", "nk0": "T", "nv0": "T"}
    shaped = {n: tensor_input(n, "float32", [1, recipe.kv_heads, d, recipe.width]) for n, d in caches.items()}
    outputs = [tensor_input("y", "float32", [1, "S", hidden]), shaped["nk0"], shaped["nv0"]]
    model = writer.model([*inputs, shaped["k0"], shaped["v0"]], outputs)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _write_dense(writer: GraphWriter, node: onnx.NodeProto) -> None:
    """A dense product in a placeholder's place."""
    x, weights, addends = apart(node)
    stacked = weights[0] if len(weights) == 1 else writer.add("Concat", weights, axis=0)
    product = writer.add("FusedMatMul", [x, stacked], domain=MICROSOFT, transB=1)
    writer.add("Sum", [product, *addends], node.output[0])


def final_norm(anatomy: Anatomy) -> float | None:
    """Epsilon of the last norm where it is the plain root-mean-square norm, which is tried on numbers; else None."""
    norm = anatomy.norm
    weight = dict(norm.named_parameters())
    if set(weight) != {"weight"}:
        return None
    epsilon, x = _epsilon(norm), torch.randn(3, anatomy.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = norm(x)
        expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight["weight"]
    return epsilon if bool((found - expected).norm() <= SAME * expected.norm()) else None
