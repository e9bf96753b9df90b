"""The repeated block of a Llama-family model: where it is, and how it looks when its matrices are frozen.

Rule: nothing of the caller's model is changed. A copy of the first layer becomes the pattern of all layers, which
is sound only while every layer has the same modules, names and shapes; `check_layers` refuses otherwise.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedge.errors import ConfigError, UnsupportedError
from fedge.lora import LoraConfig
from quantize.formats import BLOCK
from quantize.placeholder import linear


class FrozenLinear(nn.Module):
    """x W^T + b + scale (x A^T) B^T: W behind a placeholder operator, A and B present when the module is a target."""

    def __init__(self, source: nn.Linear, lora: LoraConfig | None) -> None:
        super().__init__()
        rows, columns = source.weight.shape
        self.w = nn.Parameter(source.weight.detach(), requires_grad=False)
        self.b = None if source.bias is None else nn.Parameter(source.bias.detach(), requires_grad=False)
        self.lora = lora
        if lora is not None:
            self.A = nn.Parameter(torch.randn(lora.r, columns) / columns**0.5)
            self.B = nn.Parameter(torch.randn(rows, lora.r) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.w)
        if self.b is not None:
            y = y + self.b
        if self.lora is not None:
            y = y + ((x @ self.A.t()) @ self.B.t()) * self.lora.scale
        return y


class SigmoidLinearUnit(nn.Module):
    """x sigmoid(x), spelt out: the derivative of aten.silu decomposes into a longer graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return list(model.model.layers)


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix product of a layer: module path -> module, in sorted order."""
    return dict(
        sorted((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))
    )


def check_layers(model: nn.Module) -> None:
    """Raise UnsupportedError unless all layers have one signature and every matrix fits blocks of 32."""
    signatures = [_signature(layer) for layer in layers_of(model)]
    for index, signature in enumerate(signatures):
        if signature != signatures[0]:
            odd = sorted(set(signature) ^ set(signatures[0]))[0]
            raise UnsupportedError(f"layer {index} differs from layer 0", field="layer", value=odd)
    for name, module in linears_of(layers_of(model)[0]).items():
        if module.in_features % BLOCK:
            raise UnsupportedError(
                f"rows of {name} are not a multiple of {BLOCK} long",
                field="in_features",
                value=module.in_features,
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
    for target in lora.targets:
        if not any(_is_target(name, (target,)) for name in linears):
            known = ", ".join(sorted({name.rsplit(".")[-1] for name in linears}))
            raise ConfigError(
                "no module has this name", field="lora-targets", value=target, hint=f"This model has {known}"
            )
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items() if _is_target(n, lora.targets)}
    if not 1 <= lora.r <= min(map(min, shapes.values())):
        raise ConfigError("rank is out of range", field="lora-rank", value=lora.r)
    return shapes


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def frozen_block(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """A copy of the first layer with FrozenLinear in the place of every nn.Linear."""
    block = copy.deepcopy(layers_of(model)[0]).eval().requires_grad_(False)
    adapted = adapted_modules(model, lora)
    for name, module in linears_of(block).items():
        block.set_submodule(name, FrozenLinear(module, lora if name in adapted else None))
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
            block.set_submodule(name, SigmoidLinearUnit())
    return block


def block_parameters(block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapter tensors, frozen tensors) of a frozen block, by name within the block."""
    tensors = {name: value.detach() for name, value in block.named_parameters()}
    adapter = {name: value for name, value in tensors.items() if name.endswith((".A", ".B"))}
    return adapter, {name: value for name, value in tensors.items() if name not in adapter}
