"""The repeated block of a model with its matrices frozen: what is trained in it, and what is only read.

Rule: nothing of the caller's model is changed. A copy of the pattern layer stands for all layers, which is sound
only while every layer has the same modules, names and shapes; `check_layers` refuses otherwise. How a matrix lies
is read from its module, never from its shape: transformers' Conv1D keeps (in, out) where nn.Linear has (out, in).
"""

from __future__ import annotations

import copy
import re
from typing import Any, TypeAlias

import msgspec
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedge.errors import ConfigError, UnsupportedError
from fedge.lora import AdapterLayout, LoraConfig
from quantize.anatomy import Anatomy
from quantize.formats import BLOCK
from quantize.placeholder import linear
from quantize.watching import layers_of, layers_path_of

MatrixModule: TypeAlias = Any  # nn.Linear, or transformers' Conv1D, which has no types


class FrozenLinear(nn.Module):
    """x W^T + b + scale (x A^T) B^T: W behind a placeholder operator, A and B present when the module is a target."""

    def __init__(self, source: MatrixModule, lora: LoraConfig | None, path: str = "") -> None:
        super().__init__()
        weight = matrix_of(source)
        rows, columns = weight.shape
        self.w = nn.Parameter(weight.detach(), requires_grad=False)
        self.b = None if source.bias is None else nn.Parameter(source.bias.detach(), requires_grad=False)
        self.lora = lora
        if lora is not None:
            r, self.scale = lora.rank_of(path), lora.scale_of(path)
            self.A = nn.Parameter(torch.randn(r, columns) / columns**0.5)
            self.B = nn.Parameter(torch.randn(rows, r) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.w)
        if self.b is not None:
            y = y + self.b
        if self.lora is not None:
            y = y + ((x @ self.A.t()) @ self.B.t()) * self.scale
        return y


class SigmoidLinearUnit(nn.Module):
    """x sigmoid(x), spelt out: the derivative of aten.silu decomposes into a longer graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _AllSeen:
    """A layer's own causal mask that hides nothing: the mask that the layer is given hides the future already."""

    def __getitem__(self, place: Any) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)


def linears_of(layer: nn.Module) -> dict[str, MatrixModule]:
    """Every matrix product of a layer: module path -> module, in sorted order."""
    return dict(
        sorted((n, module) for n, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D))
    )


def matrix_of(module: MatrixModule) -> Tensor:
    """The weight of a matrix product as (out, in), a view of the module's own."""
    weight: Tensor = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight


def check_layers(model: nn.Module) -> None:
    """Raise UnsupportedError unless all layers have one signature and every matrix fits blocks of 32."""
    layers = layers_of(model)
    signatures = [_signature(layer) for layer in layers]
    for index, signature in enumerate(signatures):
        if signature != signatures[0]:
            odd = sorted(set(signature) ^ set(signatures[0]))[0]
            raise UnsupportedError(f"layer {index} differs from layer 0", field="layer", value=odd)
    for name, module in linears_of(layers[0]).items():
        columns = matrix_of(module).shape[1]
        if columns % BLOCK:
            raise UnsupportedError(
                f"rows of {name} are not a multiple of {BLOCK} long", field="in_features", value=columns
            )


def _signature(layer: nn.Module) -> list[str]:
    modules = [f"{name}: {type(module).__name__}" for name, module in layer.named_modules()]
    tensors = [f"{name}: {tuple(value.shape)}" for name, value in layer.state_dict().items()]
    return modules + tensors


def adapted_modules(model: nn.Module, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every matrix that the targets name. Raises ConfigError for a bad target or rank."""
    linears = linears_of(layers_of(model)[0])
    if not lora.targets:
        raise ConfigError("no module gets an adapter", field="lora-targets", value=lora.targets)
    targets = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    for target in targets:
        if not any(_is_target(name, (target,)) for name in linears):
            known = ", ".join(sorted({name.rsplit(".")[-1] for name in linears}))
            raise ConfigError(
                "no module has this name", field="lora-targets", value=target, hint=f"This model has {known}"
            )
    shapes = {}
    for name, module in linears.items():
        if _is_target(name, targets):
            rows, columns = matrix_of(module).shape
            shapes[name] = (rows, columns)
    for name, shape in shapes.items():
        if not 1 <= lora.rank_of(name) <= min(shape):
            raise ConfigError("rank is out of range", field="lora-rank", value=lora.rank_of(name))
    return shapes


def graph_config(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """The config of the graphs that all layers share: module by module, the largest rank and the scale built in.

    What `lora` says of single layers is the device's affair (`AdapterLayout.fed`). Raises ConfigError for a target or
    layer that does not exist, or a rank above the matrix's own.
    """
    path, layers = layers_path_of(model), layers_of(model)
    linears = linears_of(layers[0])
    if isinstance(lora.targets, tuple):
        adapted_modules(model, msgspec.structs.replace(lora, layers=(), rank_pattern={}))
    if lora.layers and max(lora.layers) >= len(layers):
        raise ConfigError("the model has no such layer", field="lora-layers", value=max(lora.layers))
    chosen = [
        name for name in linears if any(lora.adapts(f"{path}.{i}.{name}", i) for i in range(len(layers)))
    ]
    if not chosen:
        known = ", ".join(f"{path}.0.{name}" for name in linears)
        raise ConfigError(
            "no module gets an adapter",
            field="lora-targets",
            value=lora.targets,
            hint=f"This model has {known}",
        )
    shapes = {}
    for name in chosen:
        rows, columns = matrix_of(linears[name]).shape
        shapes[name] = (rows, columns)
        rank = max(lora.rank_of(f"{path}.{i}.{name}") for i in range(len(layers)))
        if not 1 <= rank <= min(rows, columns):
            raise ConfigError("rank is out of range", field="lora-rank", value=rank)
    if not lora.rank_pattern and not lora.alpha_pattern:
        return LoraConfig(r=lora.r, alpha=lora.alpha, targets=tuple(chosen), rslora=lora.rslora)
    graph = AdapterLayout.of(len(layers), shapes, lora, layer_path=path).graph
    return LoraConfig(
        r=lora.r,
        targets=tuple(chosen),
        rank_pattern={re.escape(name): module.r for name, module in graph.items()},
        alpha_pattern={re.escape(name): module.scale * module.r for name, module in graph.items()},
    )


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def frozen_block(anatomy: Anatomy, lora: LoraConfig) -> nn.Module:
    """A copy of the pattern layer with FrozenLinear in the place of every matrix product."""
    block = copy.deepcopy(anatomy.layers[anatomy.pattern]).eval().requires_grad_(False)
    adapted = adapted_modules(anatomy.model, lora)
    for name, module in linears_of(block).items():
        block.set_submodule(name, FrozenLinear(module, lora if name in adapted else None, name))
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
            block.set_submodule(name, SigmoidLinearUnit())
        if "mask" in anatomy.aux:
            _drop_causal_masks(module)
    return block


def _drop_causal_masks(module: nn.Module) -> None:
    """A buffer of the length of the position table would end up in the graph, and the mask says the same."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        square = buffer.dtype == torch.bool and buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2]
        if square and torch.equal(buffer, torch.ones_like(buffer).tril()):
            delattr(module, name)
            setattr(module, name, _AllSeen())


def block_parameters(block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapter tensors, frozen tensors) of a frozen block, by name within the block."""
    tensors = {name: value.detach() for name, value in block.named_parameters()}
    adapter = {name: value for name, value in tensors.items() if name.endswith((".A", ".B"))}
    return adapter, {name: value for name, value in tensors.items() if name not in adapter}
