"""A model watched at work: how its layers are called, what they give, and what is called after the last one.

Hooks see what happens and change nothing. What cannot be seen, or is not one list of layers called once each, is
refused, naming the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedge.errors import DataError, UnsupportedError
from quantize.inputs import words_of

# Two batches of different shape: a size that follows the batch or the length shows by changing.
SHAPES: Final = ((2, 13), (3, 17))
_SAME: Final = 1e-5  # relative, between a layer and the pattern in its place
_HINT: Final = (
    "Handled is any causal LM of equal layers whose graphs pass the gates; docs/models.md lists those tested"
)


@dataclass(slots=True)
class Seen:
    """One run of the model: per layer its arguments and output, then what followed the last layer."""

    arguments: list[dict[str, Any]]
    outputs: list[Tensor]
    after: list[tuple[str, nn.Module, Tensor, Tensor]]  # called behind them: name, module, input, output
    logits: Tensor
    tuples: bool = False


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, first to last: the list of modules that holds most of the model."""
    return repeated(model)[1]


def layers_path_of(model: nn.Module) -> str:
    """Where that list is, from the model's root."""
    return repeated(model)[0]


def repeated(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Both at once: where the list is, and its layers. Raises UnsupportedError when there is none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise odd("no list of layers in this model", "layers", type(model).__name__)
    path, found = max(lists, key=lambda entry: sum(value.numel() for value in entry[1].parameters()))
    return path.removeprefix(getattr(model, "within", "")), list(found)


def check_numbers(model: nn.Module) -> None:
    """With a weight that is no number nothing can be compared."""
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise DataError("the model has weights that are no numbers", field="tensor", value=name)


def watch(model: Any, path: str, layers: list[nn.Module], ids: Tensor, mask: Tensor) -> Seen:
    """What happens when the model is called. Raises UnsupportedError for layers not called once each, in order."""
    seen = Seen([], [], [], torch.empty(0))
    order: list[int] = []
    inside = {id(module) for layer in layers for module in layer.modules()}

    def of_layer(index: int) -> Any:
        def hook(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            order.append(index)
            seen.arguments.append(arguments_of(module, args, keywords))
            seen.outputs.append(first_of(output))
            seen.tuples = isinstance(output, tuple)

        return hook

    def of_other(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (
                len(order) == len(layers)
                and args
                and isinstance(args[0], Tensor)
                and isinstance(output, Tensor)
            ):
                seen.after.append((name, module, args[0], output))

        return hook

    with _hooks() as handles, torch.no_grad():
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(of_layer(index), with_kwargs=True))
        for name, module in model.named_modules():
            if id(module) not in inside:
                handles.append(module.register_forward_hook(of_other(name)))
        try:
            seen.logits = model(**words_of(model, ids, mask)).logits
        except Exception as error:  # whatever the model's own code may raise
            raise untraceable("a model that is given ids and a mask", model, error) from error
    if order != list(range(len(layers))):
        raise odd("the layers are not called once each, in order", path, order[:8])
    return seen


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def arguments_of(layer: nn.Module, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    signature = inspect.signature(layer.forward)
    bound = signature.bind(*args, **keywords)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise odd("a layer takes arguments without names", "layer", type(layer).__name__)
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def first_of(output: Any) -> Tensor:
    """The hidden states of what a layer gives."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same but for the order of additions."""
    return bool((found - expected).norm() <= _SAME * expected.norm())


def untraceable(where: str, module: nn.Module, error: Exception) -> UnsupportedError:
    """The refusal of a module whose code cannot be followed by torch's tracer."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return UnsupportedError(
        f"{where} cannot be traced: {line}", field="module", value=type(module).__name__, hint=_HINT
    )


def odd(message: str, where: str, value: object) -> UnsupportedError:
    """The refusal of a model that is not put together as expected."""
    return UnsupportedError(message, field=where, value=value, hint=_HINT)


class StandIn(nn.Module):
    """Stands where a layer stood, and looks like the layer to whoever asks it something."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: its parameters are none of this module's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)
