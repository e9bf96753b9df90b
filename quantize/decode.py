"""The inference graph: ids, positions and a key/value cache in, logits and the longer cache out, over the same weights.

Its initialisers are external references into `weights.bin`: one copy of the weights on the device, two uses. The
adapter enters as plain inputs of any rank, so a freshly trained one needs no file format.

Inputs: ids, positions [B, S] int64; at [W] int64: places along S whose logits are wanted; k{i}, v{i}
[B, heads, P, width]; L{i}/{module}.A|B. Outputs: logits [B, W, V]; nk{i}, nv{i}. The first call has P = 0.

Where the layers can be written in fused operators (`fused`) they are, and then a cache may be longer than what it
holds: bound to the session as k{i} and nk{i} at once, it is written in place. Otherwise P is exactly what was read,
and nk{i} is longer by S. A graph with GroupQueryAttention is of the first kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from fedge.lora import LoraConfig
from fedge.release import WEIGHTS, TensorPlace
from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters, frozen_block
from quantize.decode_cache import CacheShape, Remembered, cache_shape
from quantize.decode_lowering import DecodeLowering
from quantize.decode_start import (
    MASK,
    ROTARY,
    check_arguments,
    export_start,
    mask_windows,
    start_outputs,
    undecodable,
    write_masks,
)
from quantize.formats import EMBEDDING_FORMAT, FORMATS, WeightFormat
from quantize.fused import FusedLayers, agrees, final_norm, recognise
from quantize.graph import GraphWriter, canonical, expand_powers, fold, make_model, select, tensor_input
from quantize.joint import export_norm, to_onnx
from quantize.lower import Matrix
from quantize.placeholder import DOMAIN, LINEAR
from quantize.reference import positions_max
from quantize.tracing import tracing

LEVEL_EXACT: Final = 0  # MatMulNBits adds in floats
LEVEL_INT8: Final = 4  # it rounds activations to 8 bits first

_TABLE_BYTES_MAX: Final = 16 * 1024**2  # of rotary tables of all positions
_TABLE: Final = "EMB"
# The output matrix; when tied, the embedding once more as MatMulNBits declares its shape.
_HEAD: Final = "HEAD"


def inference_graph(
    anatomy: Anatomy,
    lora: LoraConfig,
    fmt: WeightFormat,
    places: Mapping[str, TensorPlace],
    *,
    may_fuse: bool = True,
    block_level: int = LEVEL_INT8,
    centred: frozenset[str] = frozenset(),
) -> onnx.ModelProto:
    """infer.onnx over the tensors at `places` of weights.bin.

    `block_level` is the accuracy level of the layers' products; the head's is LEVEL_INT8: exact, it alone would take
    twenty times as long as all layers. `centred` names the matrices (L0/PATH.w) whose offsets are all what their scales
    say, so that nothing of them is left to compute. Raises UnsupportedError for a family that cannot be decoded.
    """
    check_arguments(anatomy)
    block = frozen_block(anatomy, lora)
    stack = _Stack(anatomy, block, cache_shape(anatomy, block), mask_windows(anatomy))
    stitched = stack.write(may_fuse=may_fuse)
    _, frozen = block_parameters(block)
    layers = range(len(anatomy.layers))
    matrices = {
        f"L{index}/{name}": Matrix(value.shape[0], value.shape[1], fmt)
        for index in layers
        for name, value in frozen.items()
        if name.endswith(".w")
    }
    table = Matrix(anatomy.vocabulary, anatomy.hidden, FORMATS[EMBEDDING_FORMAT])
    levels = dict.fromkeys(matrices, block_level) | {_HEAD: LEVEL_INT8}
    lowered = DecodeLowering({**matrices, _TABLE: table, _HEAD: table}, levels, centred=centred).run(stitched)
    return canonical(_externalised(lowered, places))


def centred_matrices(tensors: Mapping[str, npt.NDArray], fmt: WeightFormat) -> frozenset[str]:
    """Names (L0/PATH.w) of the matrices in which every offset is -zero x scale, as in all that comes from Q4_0.

    `tensors` are those of the weight file. A product by what is left of such offsets would add nothing but zeros.
    """
    if not fmt.has_offset:
        return frozenset()
    names = [name.removesuffix(".m") for name in tensors if name.endswith(".w.m")]

    def is_centred(name: str) -> bool:
        scale, low = (tensors[f"{name}.{part}"].astype(np.float32) for part in "sm")
        return not (low + np.float32(fmt.zero) * scale).any()

    return frozenset(filter(is_centred, names))


def at_level(model: onnx.ModelProto, level: int, *, head: bool = True) -> onnx.ModelProto:
    """A copy of the graph with one accuracy level for all its MatMulNBits, or for all but the head's."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "MatMulNBits" and (head or node.input[1] != f"{_HEAD}.q"):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level
    return copy


class _Stack:
    """Embedding, one copy of the block per layer, norm and head, all matrices still placeholders."""

    def __init__(
        self, anatomy: Anatomy, block: nn.Module, cache: CacheShape, windows: Mapping[str, int]
    ) -> None:
        self._anatomy, self._block, self._cache, self._windows = anatomy, block, cache, windows
        adapter, self._frozen = block_parameters(block)
        self._adapter = {name: list(value.shape) for name, value in adapter.items()}
        self._layers = range(len(anatomy.layers))
        self._kinds = anatomy.kinds or ("",) * len(anatomy.layers)

    def write(self, *, may_fuse: bool) -> onnx.ModelProto:
        """The graph before it is lowered."""
        writer, anatomy = GraphWriter("join"), self._anatomy
        start = expand_powers(fold(export_start(anatomy)))
        features = self._fused(writer, start) if may_fuse else None
        if features is None:
            known = _inline(writer, start, "start/", _outer(start))
            features = self._traced(writer, known.pop("x"), known)
        writer.add(LINEAR, [writer.add("Gather", [features, "at"], axis=1), _HEAD], "raw", domain=DOMAIN)
        if anatomy.logit_cap:
            bound = writer.constant(np.float32(anatomy.logit_cap))
            bent = writer.add("Tanh", [writer.add("Div", ["raw", bound])])
            writer.add("Mul", [bent, bound], "logits")
        else:
            writer.nodes[-1].output[0] = "logits"
        inputs = [tensor_input(name, "int64", ["B", "S"]) for name in ("ids", "positions")]
        inputs += [tensor_input("at", "int64", ["W"]), *self._cache_values("", "P"), *self._adapter_inputs()]
        inputs += [v for v in start.graph.input if v.name not in ("ids", "positions")]
        inputs += self._frozen_inputs()
        outputs = [tensor_input("logits", "float32", ["B", "W", anatomy.vocabulary])]
        return writer.model(inputs, [*outputs, *self._cache_values("n", "T")])

    def _fused(self, writer: GraphWriter, start: onnx.ModelProto) -> str | None:
        """Features [B, S, D] in fused operators; None, and nothing is written, where they are not what torch gives."""
        anatomy = self._anatomy
        recipe = recognise(anatomy, self._block, self._cache, self._windows)
        if recipe is None or final_norm(anatomy) is None:
            return None
        ways = (True, False) if self._has_small_tables(start) else (False,)
        whole = next((way for way in ways if agrees(anatomy, self._block, recipe, whole=way)), None)
        if whole is None:
            return None
        tables = self._tables(writer, start) if whole else {}
        read = select(start, ["x"]) if whole else start
        known = _inline(writer, read, "start/", _outer(read))
        x, skip = known.pop("x"), None
        layers = FusedLayers(
            writer, recipe, tables or known, int(anatomy.call.shapes["cos"][-1]), whole=whole
        )
        for index in self._layers:
            x, skip = layers.layer(index, x, skip, self._kinds[index])
        return layers.norm(x, skip, "norm.weight", final_norm(anatomy) or 0.0)[0]

    def _has_small_tables(self, start: onnx.ModelProto) -> bool:
        """Whether the rotary tables of all positions may lie in memory, and depend on nothing but positions."""
        names = self._table_names()
        size = 4 * positions_max(self._anatomy.model.config) * int(self._anatomy.call.shapes["cos"][-1])
        read = {value.name for value in select(start, names).graph.input}
        return read == {"positions"} and len(names) * size // 2 <= _TABLE_BYTES_MAX

    def _tables(self, writer: GraphWriter, start: onnx.ModelProto) -> dict[str, str]:
        """The rotary tables of all positions: constants, once the runtime has loaded the graph."""
        longest = positions_max(self._anatomy.model.config)
        first, end, step = (writer.constant(np.array(value, np.int64)) for value in (0, longest, 1))
        every = writer.add("Unsqueeze", [writer.add("Range", [first, end, step]), writer.integers(0)])
        return _inline(writer, select(start, self._table_names()), "tables/", {"positions": every})

    def _table_names(self) -> list[str]:
        return [name for name in start_outputs(self._anatomy) if name != "x"]

    def _traced(self, writer: GraphWriter, x: str, tables: Mapping[str, str]) -> str:
        anatomy = self._anatomy
        block = expand_powers(fold(export_cached_block(anatomy, self._block, self._cache)))
        norm = select(expand_powers(fold(export_norm(anatomy.norm, anatomy.hidden))), ["f"])
        aux = {**tables, **write_masks(writer, self._windows, "k0")}
        for index in self._layers:
            tail = f"@{self._kinds[index]}"
            names = {name: aux.get(f"{name}{tail}") or aux[name] for name in anatomy.aux}
            names |= {"x": x} | {name: f"{name}{index}" for name in ("k", "v", "nk", "nv")}
            x = _inline(writer, block, f"L{index}/", names)["y"]
        return _inline(writer, norm, "", {"h": x})["f"]

    def _cache_values(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        shape: list[int | str] = ["B", self._cache.heads, length, self._cache.width]
        names = [f"{prefix}{name}{index}" for index in self._layers for name in ("k", "v")]
        return [tensor_input(name, "float32", shape) for name in names]

    def _adapter_inputs(self) -> list[onnx.ValueInfoProto]:
        """Of any rank."""
        values = []
        for index in self._layers:
            for name, (rows, columns) in self._adapter.items():
                shape: list[int | str] = ["r", columns] if name.endswith(".A") else [rows, "r"]
                values.append(tensor_input(f"L{index}/{name}", "float32", shape))
        return values

    def _frozen_inputs(self) -> list[onnx.ValueInfoProto]:
        """Frozen tensors that are no matrices (norms, biases); matrices get their parts when lowered."""
        plain = {n: list(v.shape) for n, v in self._frozen.items() if not n.endswith(".w")}
        values = [
            tensor_input(f"L{i}/{n}", "float32", shape) for i in self._layers for n, shape in plain.items()
        ]
        norm = self._anatomy.norm.named_parameters()
        return values + [tensor_input(f"norm.{n}", "float32", list(v.shape)) for n, v in norm]


class _CachedBlock(nn.Module):
    def __init__(self, anatomy: Anatomy, block: nn.Module, names: list[str]) -> None:
        super().__init__()
        # In a list, so that the block's parameters are no parameters of this module.
        self._block, self._anatomy, self._names = [block], [anatomy], names

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, aux: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> Any:
        cache, given = Remembered(k, v), dict(zip(self._anatomy[0].aux, aux, strict=True))
        if MASK in given:  # its length is a symbol of its own to the exporter; the cut ties it to the cache
            given[MASK] = given[MASK][:, :, :, : k.shape[2] + x.shape[1]]
        parameters = dict(zip(self._names, tensors, strict=True))
        y = self._anatomy[0].call(self._block[0], parameters, x, given, cache=cache)
        return y, cache.keys, cache.values


def export_cached_block(anatomy: Anatomy, block: nn.Module, cache: CacheShape) -> onnx.ModelProto:
    """Inputs x, k, v, mask, cos, sin (those that it reads), adapter, frozen tensors; outputs y, nk, nv."""
    adapter, frozen = block_parameters(block)
    tensors = {**adapter, **frozen}
    new, past = 5, 7
    keys = torch.randn(2, cache.heads, past, cache.width)
    examples: dict[str, Tensor] = {MASK: torch.zeros(2, 1, new, past + new + 3)}
    examples |= {n: torch.rand(2, new, int(anatomy.call.shapes[n][-1])) for n in ROTARY if n in anatomy.aux}
    auto = torch.export.Dim.AUTO
    sizes = {MASK: {0: auto, 2: auto, 3: auto}} | {name: {0: auto, 1: auto} for name in ROTARY}
    try:
        with tracing():
            program = torch.export.export(
                _CachedBlock(anatomy, block, list(tensors)),
                (
                    torch.randn(2, new, anatomy.hidden),
                    keys,
                    keys.clone(),
                    tuple(examples[name] for name in anatomy.aux),
                    tuple(tensors.values()),
                ),
                dynamic_shapes=(
                    {0: auto, 1: auto},
                    *[{0: auto, 2: auto}] * 2,
                    tuple(sizes[name] for name in anatomy.aux),
                    (None,) * len(tensors),
                ),
                strict=False,
            )
    except Exception as error:  # whatever a layer's own code may raise under the exporter
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise undecodable("its layers cannot be traced with a cache", line) from error
    return to_onnx(program, ("x", "k", "v", *anatomy.aux, *tensors), ("y", "nk", "nv"))


def _outer(start: onnx.ModelProto) -> dict[str, str]:
    """Inputs and tensors of the weight file keep their names when the graph is inlined."""
    return {value.name: value.name for value in start.graph.input}


def _inline(
    writer: GraphWriter, model: onnx.ModelProto, prefix: str, names: Mapping[str, str]
) -> dict[str, str]:
    """Append a graph's nodes; what `names` does not rename gets the prefix. Returns the names of its outputs."""
    constants = {}
    for tensor in model.graph.initializer:
        constants[tensor.name] = writer.constant(numpy_helper.to_array(tensor))

    def rename(name: str) -> str:
        return name and (names.get(name) or constants.get(name) or prefix + name)

    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = map(rename, node.input)
        copy.output[:] = map(rename, node.output)
        writer.nodes.append(copy)
    return {value.name: rename(value.name) for value in model.graph.output}


def _externalised(model: onnx.ModelProto, places: Mapping[str, TensorPlace]) -> onnx.ModelProto:
    """Inputs that lie in the weight file become initialisers that point there."""
    kept, tensors = [], list(model.graph.initializer)
    for value in model.graph.input:
        place = places.get(value.name) or places.get(value.name.replace(f"{_HEAD}.", f"{_TABLE}."))
        if place is None:
            kept.append(value)
        else:
            tensors.append(_reference(value, place))
    return make_model(model.graph.node, kept, model.graph.output, tensors)


def _reference(value: onnx.ValueInfoProto, place: TensorPlace) -> onnx.TensorProto:
    """The declared shape may group the same bytes differently: MatMulNBits wants codes with three axes."""
    kind = value.type.tensor_type
    size = math.prod(place.shape) * np.dtype(place.dtype).itemsize
    dims = [axis.dim_value for axis in kind.shape.dim] or list(place.shape)
    if math.prod(dims) != math.prod(place.shape):
        dims = list(place.shape)  # declared with a symbol, as the embedding's rows are
    tensor = TensorProto(
        name=value.name, data_type=kind.elem_type, dims=dims, data_location=TensorProto.EXTERNAL
    )
    for key, entry in (("location", WEIGHTS), ("offset", place.offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor
