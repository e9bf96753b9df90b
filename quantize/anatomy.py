"""The parts of a transformer, found by watching it work: embedding, repeated layers, last norm, head.

No architecture is known by name. The model runs on two small batches with hooks on every module, and what is found
is what was seen: how each layer was called, which of its arguments it reads, that each layer's input is the output
of the one before, and which module lies between the last layer and the head. One layer's code then stands for all
(the *pattern*), and it must prove it: with another layer's parameters and arguments it must give what that layer
gave. What cannot be found or proven is refused, naming the module.

Layers that read different values of an argument (a sliding and a full mask, two rotary tables, no rotary at all)
are of different *kinds*; their code is still one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from quantize.inputs import example, hears
from quantize.tail import NO_TAIL, Tail, TailNames, tail_names
from quantize.watching import (
    SHAPES,
    Seen,
    check_numbers,
    close,
    first_of,
    odd,
    repeated,
    untraceable,
    watch,
)

BATCH: Final = "batch"
LENGTH: Final = "length"
Size = int | str

_CACHES: Final = ("past_key_values", "past_key_value", "layer_past", "cache")
_MASKS: Final = ("attention_mask", "causal_mask")
_ROTARY: Final = "position_embeddings"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an aux tensor goes in a layer's call: an argument, or one element of a tuple that is an argument."""

    argument: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls its pattern layer, with hidden states, aux tensors and cache left open.

    `shapes` has the sizes of each aux tensor, BATCH and LENGTH where they follow the batch.
    """

    hidden: str  # the argument that takes the hidden states
    slots: Mapping[str, Slot]
    fixed: Mapping[str, Any]
    cache: str | None  # the argument that takes a key/value cache, where the layer has one
    shapes: Mapping[str, tuple[Size, ...]]

    def __call__(
        self,
        block: nn.Module,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        aux: Mapping[str, Tensor],
        *,
        cache: object | None = None,
    ) -> Tensor:
        """Output [B, S, D] of `block` with these parameters, called as the model calls it. `aux` has every slot."""
        words = {**self.fixed, self.hidden: x}
        for name, slot in self.slots.items():
            if slot.index is None:
                words[slot.argument] = aux[name]
            else:
                parts = list(words[slot.argument])
                parts[slot.index] = aux[name]
                words[slot.argument] = tuple(parts)
        if cache is not None:
            assert self.cache is not None, "this layer takes no cache"
            words[self.cache] = cache
        return first_of(torch.func.functional_call(block, dict(parameters), (), words))


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model taken apart; all modules are the model's own.

    `kinds` has a name for each layer when the layers read different aux tensors, and is empty when they do not;
    `shared` are the aux tensors that are the same for all kinds.
    `readers` has, per kind ("" when there are none), a layer of that kind and where that layer reads its aux.
    """

    model: Any
    layers: tuple[nn.Module, ...]
    layers_path: str
    embedding: nn.Embedding | None  # None: a model that hears
    norm: nn.Module
    norm_path: str
    head: nn.Linear | None  # None: a classifier
    head_tied: bool
    logit_cap: float
    pattern: int
    call: Call
    tuples: bool  # whether a layer returns its output in a tuple
    kinds: tuple[str, ...]
    shared: frozenset[str]
    readers: Mapping[str, tuple[int, Mapping[str, Slot]]]
    tail: TailNames = NO_TAIL  # what a classifier reads after its last layer

    @property
    def aux(self) -> tuple[str, ...]:
        """Names of the aux tensors that a block reads."""
        return tuple(self.call.slots)

    @property
    def aux_outputs(self) -> tuple[str, ...]:
        """What the prologue gives beside x: every aux tensor, once a kind where the kinds read different ones."""
        return tuple(
            output
            for name in self.aux
            for output in ([name] if name in self.shared else [f"{name}@{kind}" for kind in self.readers])
        )

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(
            self.model.config.hidden_size if self.embedding is None else self.embedding.weight.shape[1]
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, 0 of a model that hears."""
        return 0 if self.embedding is None else int(self.embedding.weight.shape[0])


def dissect(model: Any) -> Anatomy:
    """The anatomy of a causal LM or a classifier in evaluation mode.

    Raises UnsupportedError naming what was not found or proven.
    """
    check_numbers(model)
    path, layers = repeated(model)
    runs = [watch(model, path, layers, *example(model, *shape)) for shape in SHAPES]
    hidden = _hidden_argument(path, layers, runs[0])
    embedding = None if hears(model) else model.get_input_embeddings()
    if embedding is not None and not isinstance(embedding, nn.Embedding):
        raise odd("the input embedding is no table", "embedding", type(embedding).__name__)
    outside = _outside(model, layers, runs[0])
    head = outside.head
    reads = [_reads(path, index, layer, hidden, run) for index, (layer, run) in _each(layers, runs[0])]
    pattern = max(range(len(layers)), key=lambda index: (len(reads[index]), -index))
    call = _call(layers[pattern], hidden, reads[pattern], [run.arguments[pattern] for run in runs])
    values = [_values(call, reads[i], runs[0].arguments[i]) for i in range(len(layers))]
    kinds = _kinds(model, values)
    for index, layer in enumerate(layers):
        own = dict(layer.named_parameters())
        x = runs[0].arguments[index][hidden]
        with torch.no_grad():
            found = call(layers[pattern], own, x, values[index])
        if not close(found, runs[0].outputs[index]):
            raise odd(
                f"{path}.{index} computes something else than {path}.{pattern} with the same numbers",
                "layer",
                _difference(layer, layers[pattern]),
            )
    names = kinds or ("",) * len(layers)
    first = {kind: names.index(kind) for kind in dict.fromkeys(names)}
    return Anatomy(
        model=model,
        layers=tuple(layers),
        layers_path=path,
        embedding=embedding,
        norm=outside.norm,
        norm_path=outside.norm_path,
        head=head,
        head_tied=head is None or (embedding is not None and head.weight is embedding.weight),
        logit_cap=outside.logit_cap,
        pattern=pattern,
        call=call,
        tuples=runs[0].tuples,
        kinds=kinds,
        shared=frozenset(name for name in call.slots if _is_shared(name, kinds, values)),
        readers={kind: (index, reads[index]) for kind, index in first.items()},
        tail=outside.tail,
    )


def take(slot: Slot, arguments: Mapping[str, Any]) -> Tensor:
    """The tensor that a call has at a slot."""
    value = arguments[slot.argument]
    tensor: Tensor = value if slot.index is None else value[slot.index]
    return tensor


def unrotated(name: str, like: Tensor) -> Tensor:
    """What a layer without rotary positions reads in the place of a rotary table: a turn by nothing."""
    return torch.ones_like(like) if name == "cos" else torch.zeros_like(like)


def _check_causal(model: Any, logits: Tensor) -> None:
    """A token may change nothing before it."""
    ids, mask = example(model, *SHAPES[0])
    ids[0, -1] = (ids[0, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        changed = model(input_ids=ids, attention_mask=mask).logits
    if not close(changed[0, :-1], logits[0, :-1]):
        raise odd("a token changes what comes before it: no causal LM", "architecture", type(model).__name__)


@dataclass(frozen=True, slots=True)
class _Outside:
    """What follows the layers: norm and head of a causal LM, or the tail of a classifier."""

    norm: nn.Module
    norm_path: str = ""
    head: nn.Linear | None = None
    logit_cap: float = 0.0
    tail: TailNames = NO_TAIL


def _outside(model: Any, layers: list[nn.Module], seen: Seen) -> _Outside:
    head = model.get_output_embeddings()
    if head is None:
        ids, mask = example(model, *SHAPES[0])
        try:
            found = tail_names(Tail(model, layers, tuples=seen.tuples), seen.outputs[-1], ids, mask)
        except Exception as error:  # whatever the model's own code may raise under a tracer
            raise untraceable("what comes after the layers", model, error) from error
        return _Outside(nn.Identity(), tail=found)
    _check_causal(model, seen.logits)
    if not isinstance(head, nn.Linear):
        raise odd("the output layer is no matrix product", "head", type(head).__name__)
    if head.bias is not None:
        raise odd("an output layer with a bias is not handled", "head", "bias")
    norm_path, norm = _between(model, seen, head)
    return _Outside(norm, norm_path, head, _logit_cap(model, seen, norm_path, head))


def _hidden_argument(path: str, layers: list[nn.Module], seen: Seen) -> str:
    hidden = next(iter(inspect.signature(layers[0].forward).parameters))
    for index, arguments in enumerate(seen.arguments):
        if not isinstance(arguments.get(hidden), Tensor):
            raise odd("a layer is not given its hidden states first", f"{path}.{index}", hidden)
        if index and not torch.equal(arguments[hidden], seen.outputs[index - 1]):
            raise odd("something happens between two layers", f"{path}.{index}", hidden)
    return hidden


def _between(model: Any, seen: Seen, head: nn.Linear) -> tuple[str, nn.Module]:
    """The one module that leads from the last layer's output to the head's input."""
    into_head = next((entry[2] for entry in seen.after if entry[1] is head), None)
    if into_head is None:
        raise odd("the output layer is not called", "head", type(head).__name__)
    for name, module, given, output in seen.after:
        is_norm = module is not head and given.shape == output.shape == into_head.shape
        if is_norm and torch.equal(given, seen.outputs[-1]) and torch.equal(output, into_head):
            return name, module
    called = [name for name, module, *_ in seen.after if module is not head and name]
    raise odd("between the last layer and the head there is not one norm", "norm", called[:6])


def _each(layers: list[nn.Module], seen: Seen) -> Iterator[tuple[int, tuple[nn.Module, dict[str, Any]]]]:
    yield from enumerate(zip(layers, seen.arguments, strict=True))


def _reads(path: str, index: int, layer: nn.Module, hidden: str, given: dict[str, Any]) -> dict[str, Slot]:
    """The tensor arguments that a layer's output depends on, under the names that the graphs use."""
    slots = [Slot(name) for name, value in given.items() if isinstance(value, Tensor) and name != hidden]
    for name, value in given.items():
        if isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
            slots += [Slot(name, position) for position in range(len(value))]
    call = Call(hidden, {str(number): slot for number, slot in enumerate(slots)}, given, None, {})

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return call(layer, {}, x, {str(number): tensor for number, tensor in enumerate(tensors)})

    try:
        with torch.no_grad():
            graph = make_fx(run)(given[hidden], *(take(slot, given) for slot in slots)).graph
    except Exception as error:  # whatever the layer's own code may raise under a tracer
        raise untraceable(f"{path}.{index}", layer, error) from error
    graph.eliminate_dead_code()
    _, *places = [node for node in graph.nodes if node.op == "placeholder"]
    read = [slot for slot, place in zip(slots, places, strict=True) if place.users]
    named = {_slot_name(slot): slot for slot in read}
    if len(named) != len(read):  # two rotary tables at once, say: call them by their full names
        named = {_full_name(slot): slot for slot in read}
    order = {"mask": 0, "cos": 1, "sin": 2}
    return dict(sorted(named.items(), key=lambda entry: (order.get(entry[0], 9), entry[0])))


def _slot_name(slot: Slot) -> str:
    if slot.argument in _MASKS:
        return "mask"
    if slot.argument.startswith(_ROTARY) and slot.index in (0, 1):
        return ("cos", "sin")[slot.index]
    return _full_name(slot)


def _full_name(slot: Slot) -> str:
    return slot.argument if slot.index is None else f"{slot.argument}.{slot.index}"


def _call(layer: nn.Module, hidden: str, slots: Mapping[str, Slot], runs: list[dict[str, Any]]) -> Call:
    known = {**inspect.signature(layer.forward).parameters, **runs[0]}
    cache = next((name for name in _CACHES if name in known), None)
    shapes = {}
    for name, slot in slots.items():
        sizes = zip(*(take(slot, arguments).shape for arguments in runs), strict=True)
        shapes[name] = tuple(_size(name, pair) for pair in sizes)
    return Call(hidden, slots, runs[0], cache, shapes)


def _size(name: str, pair: tuple[int, ...]) -> Size:
    if len(set(pair)) == 1:
        return pair[0]
    for axis, symbol in enumerate((BATCH, LENGTH)):
        if pair == tuple(shape[axis] for shape in SHAPES):
            return symbol
    raise odd("a tensor's size follows neither batch nor length", name, pair)


def _values(call: Call, slots: Mapping[str, Slot], given: Mapping[str, Any]) -> dict[str, Tensor]:
    """A layer's own aux tensors; one that it does not read must be a rotary table, which then turns nothing."""
    found = {}
    for name, slot in call.slots.items():
        if name in slots:
            found[name] = take(slots[name], given)
        elif name in ("cos", "sin"):
            found[name] = unrotated(name, take(slot, given))
        else:
            raise odd("some layers read this argument and some do not", "argument", name)
    return found


def _kinds(model: Any, values: list[dict[str, Tensor]]) -> tuple[str, ...]:
    groups: list[dict[str, Tensor]] = []
    of_layer = []
    for own in values:
        same = [n for n, group in enumerate(groups) if all(torch.equal(group[k], own[k]) for k in own)]
        if not same:
            groups.append(own)
        of_layer.append(same[0] if same else len(groups) - 1)
    # A short batch does not show a sliding window: layers that the configuration tells apart stay apart.
    pairs = list(zip(_declared_kinds(model, len(values)), of_layer, strict=True))
    if len(set(pairs)) == 1:
        return ()
    numbers: dict[str, set[int]] = {}
    for name, number in pairs:
        numbers.setdefault(name, set()).add(number)
    return tuple(name if name and len(numbers[name]) == 1 else f"{name}{number}" for name, number in pairs)


def _is_shared(name: str, kinds: tuple[str, ...], values: list[dict[str, Tensor]]) -> bool:
    told_apart = name == "mask" and len({kind.rstrip("0123456789") for kind in kinds}) > 1
    return not told_apart and all(torch.equal(own[name], values[0][name]) for own in values)


def _declared_kinds(model: Any, layers: int) -> tuple[str, ...]:
    declared = getattr(model.config, "layer_types", None)
    if isinstance(declared, list) and len(declared) == layers:
        return tuple(str(name).removesuffix("_attention") for name in declared)
    return ("",) * layers


def _logit_cap(model: Any, seen: Seen, norm_path: str, head: nn.Linear) -> float:
    """c of a soft-cap c tanh(z / c) after the head; what else may follow a head is refused."""
    with torch.no_grad():
        plain = head(next(output for name, _, _, output in seen.after if name == norm_path))
        if close(plain, seen.logits):
            return 0.0
        cap = getattr(model.config, "final_logit_softcapping", None)
        if isinstance(cap, (int, float)) and cap > 0 and close(cap * torch.tanh(plain / cap), seen.logits):
            return float(cap)
    raise odd("what the model does after its output layer is not handled", "head", type(model).__name__)


def _difference(layer: nn.Module, pattern: nn.Module) -> str:
    """Settings in which a layer differs from the pattern, for the message."""
    theirs = dict(pattern.named_modules())
    found = []
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) and key != "layer_idx"
            if plain and getattr(theirs.get(name), key, None) != value:
                found.append(f"{name}.{key}".lstrip("."))
    return ", ".join(found[:4]) or type(layer).__name__
