"""The inference graph: ids and a key/value cache in, logits and the longer cache out, over the same weight file.

It is stitched from the same torch block as the training graphs, exported once more with a cache, and its
initialisers are external references into `weights.bin`: one copy of the weights on the device, two uses. The
adapter enters as plain inputs, so a freshly trained one needs no file format.

Inputs: ids [B, S] int64; mask [B, 1, S, P+S] added to scores; cos, sin [1, S, d] rows of the rotary tables at the
positions of ids; k{i}, v{i} [B, kv_heads, P, d]; L{i}/{module}.A|B. Outputs: logits [B, S, V]; nk{i}, nv{i} of length
P+S. The first call has P = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from fedge.lora import LoraConfig
from fedge.release import WEIGHTS, TensorPlace
from quantize.anatomy import Anatomy
from quantize.blocks import block_parameters, frozen_block
from quantize.formats import EMBEDDING_FORMAT, FORMATS, WeightFormat
from quantize.graph import GraphWriter, canonical, expand_powers, fold, make_model, select, tensor_input
from quantize.joint import export_norm, to_onnx
from quantize.lower import DecodeLowering, Matrix
from quantize.placeholder import DOMAIN, EMBEDDING, LINEAR
from quantize.training import head_dim

LEVEL_EXACT: Final = 0  # MatMulNBits adds in floats
LEVEL_INT8: Final = 4  # it rounds activations to 8 bits first

# At one row the 8-bit head costs 130 of 150 ms a token when exact and 7 ms when rounded, for 0.01 nats; blocks are
# fast either way, and rounding them costs three times as many nats.
_BLOCK_LEVEL: Final = LEVEL_EXACT
_HEAD_LEVEL: Final = LEVEL_INT8

_HEAD: Final = "HEAD"  # the embedding once more, as MatMulNBits declares its shape
_AUX: Final = ("mask", "cos", "sin")


def is_decodable(anatomy: Anatomy) -> bool:
    """Whether this module can write the inference graph of a model: rotary positions, layers of one kind."""
    if anatomy.aux != _AUX or anatomy.kinds or anatomy.logit_cap or anatomy.call.cache is None:
        return False
    grouped = getattr(anatomy.model.config, "num_key_value_heads", None) is not None
    return grouped and anatomy.call.shapes["cos"][-1] == head_dim(anatomy.model)


class _Cache:
    """What transformers' attention sees as its cache: joins old and new keys and values, and remembers them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.was_updated = keys, values, False

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.was_updated = True
        return self.keys, self.values


class _CachedBlock(nn.Module):
    def __init__(self, anatomy: Anatomy, block: nn.Module, names: list[str]) -> None:
        super().__init__()
        # In a list, so that the block's parameters are no parameters of this module.
        self._block, self._anatomy, self._names = [block], [anatomy], names

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor
    ) -> Any:
        cache = _Cache(k, v)
        # The mask's length is a symbol of its own to the exporter; the cut ties it to the cache.
        mask = mask[:, :, :, : k.shape[2] + x.shape[1]]
        parameters = dict(zip(self._names, rest, strict=True))
        aux = {"mask": mask, "cos": cos, "sin": sin}
        y = self._anatomy[0].call(self._block[0], parameters, x, aux, cache=cache)
        assert cache.was_updated, "attention did not use the cache it was given"
        return y, cache.keys, cache.values


def export_cached_block(anatomy: Anatomy, block: nn.Module, config: Any, width: int) -> onnx.ModelProto:
    """Inputs x, k, v, mask, cos, sin, adapter, frozen tensors; outputs y, nk, nv."""
    adapter, frozen = block_parameters(block)
    tensors = {**adapter, **frozen}
    new, past = 5, 7
    cache = torch.randn(2, config.num_key_value_heads, past, width)
    x, mask = torch.randn(2, new, config.hidden_size), torch.zeros(2, 1, new, past + new + 3)
    table = torch.rand(1, new, width)
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, *[{0: auto, 2: auto}] * 2, {0: auto, 2: auto, 3: auto}, *[{1: auto}] * 2)
    program = torch.export.export(
        _CachedBlock(anatomy, block, list(tensors)),
        (x, cache, cache.clone(), mask, table, table.clone(), *tensors.values()),
        dynamic_shapes=(*shapes, (None,) * len(tensors)),
        strict=False,
    )
    return to_onnx(program, ("x", "k", "v", *_AUX, *tensors), ("y", "nk", "nv"))


def inference_graph(
    anatomy: Anatomy, lora: LoraConfig, fmt: WeightFormat, places: Mapping[str, TensorPlace]
) -> onnx.ModelProto:
    """infer.onnx over the tensors at `places` of weights.bin."""
    model = anatomy.model
    block, config = frozen_block(anatomy, lora), model.config
    adapter, frozen = block_parameters(block)
    layers = config.num_hidden_layers
    cached = expand_powers(fold(export_cached_block(anatomy, block, config, head_dim(model))))
    norm = select(expand_powers(fold(export_norm(anatomy.norm, config.hidden_size))), ["f"])
    stitched = _stitch(cached, norm, config, {n: tuple(v.shape) for n, v in adapter.items()}, head_dim(model))
    matrices = {
        f"L{index}/{name}": Matrix(value.shape[0], value.shape[1], fmt)
        for index in range(layers)
        for name, value in frozen.items()
        if name.endswith(".w")
    }
    table = Matrix(config.vocab_size, config.hidden_size, FORMATS[EMBEDDING_FORMAT])
    levels = dict.fromkeys(matrices, _BLOCK_LEVEL) | {_HEAD: _HEAD_LEVEL}
    lowered = DecodeLowering({**matrices, "EMB": table, _HEAD: table}, levels).run(stitched)
    return canonical(_externalised(lowered, places))


def at_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    """A copy of the graph with one accuracy level for all its MatMulNBits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    return copy


def _stitch(
    block: onnx.ModelProto,
    norm: onnx.ModelProto,
    config: Any,
    adapter: dict[str, tuple[int, ...]],
    width: int,
) -> onnx.ModelProto:
    """Embedding, one copy of the block per layer, norm and head, all matrices still placeholders."""
    writer, heads = GraphWriter("join"), config.num_key_value_heads
    inputs = [tensor_input("ids", "int64", ["B", "S"]), tensor_input("mask", "float32", ["B", 1, "S", "T"])]
    inputs += [tensor_input(name, "float32", [1, "S", width]) for name in ("cos", "sin")]
    outputs = [tensor_input("logits", "float32", ["B", "S", config.vocab_size])]
    x = writer.add(EMBEDDING, ["ids", "EMB"], domain=DOMAIN)
    for index in range(config.num_hidden_layers):
        own = {name: f"{name}{index}" for name in ("k", "v", "nk", "nv")}
        x = _inline(writer, block, f"L{index}/", {"x": x, **own, **{name: name for name in _AUX}})["y"]
        for name in ("k", "v"):
            inputs.append(tensor_input(own[name], "float32", ["B", heads, "P", width]))
            outputs.append(tensor_input(own[f"n{name}"], "float32", ["B", heads, "T", width]))
        inputs += [tensor_input(f"L{index}/{name}", "float32", shape) for name, shape in adapter.items()]
        inputs += [
            tensor_input(f"L{index}/{v.name}", "float32", _sizes(v)) for v in _frozen_inputs(block, adapter)
        ]
    features = _inline(writer, norm, "", {"h": x})["f"]
    inputs += [tensor_input(value.name, "float32", _sizes(value)) for value in norm.graph.input[1:]]
    writer.add(LINEAR, [features, _HEAD], "logits", domain=DOMAIN)
    return writer.model(inputs, outputs)


def _inline(
    writer: GraphWriter, model: onnx.ModelProto, prefix: str, names: dict[str, str]
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
        place = places.get(value.name) or places.get(value.name.replace(f"{_HEAD}.", "EMB."))
        if place is None:
            kept.append(value)
        else:
            tensors.append(_reference(value, place))
    return make_model(model.graph.node, kept, model.graph.output, tensors)


def _reference(value: onnx.ValueInfoProto, place: TensorPlace) -> onnx.TensorProto:
    """The declared shape may group the same bytes differently: MatMulNBits wants codes with three axes."""
    kind = value.type.tensor_type
    size = math.prod(place.shape) * np.dtype(place.dtype).itemsize
    tensor = TensorProto(
        name=value.name, data_type=kind.elem_type, dims=_sizes(value), data_location=TensorProto.EXTERNAL
    )
    for key, entry in (("location", WEIGHTS), ("offset", place.offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def _frozen_inputs(block: onnx.ModelProto, adapter: Mapping[str, object]) -> list[onnx.ValueInfoProto]:
    """Frozen tensors of the block that are no matrices (norms, biases); matrices get their parts when lowered."""
    known = {"x", "k", "v", *_AUX, *adapter}
    return [value for value in block.graph.input if value.name not in known]


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [size.dim_value for size in value.type.tensor_type.shape.dim]
