"""The gates of a classifier: what must hold before its bundle is signed.

(a) a cut of two layers with random weights: gradients of A, B and of everything in the head against torch autograd;
(b) the whole model, one batch: loss, gradients and logits against torch on the dequantised weights, and the hidden
    states at every position of a text as long as the model takes;
(c) logits of the source against the quantised model, and KL(source || quantised) of its classes, on a fixed text;
(d) only operators that a device allows. There is nothing to decode;
(e) the head in two graphs, where it is, against the head in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fedge.io.weight_file import map_weights
from fedge.lora import DENSE, LoraConfig
from fedge.release import WEIGHTS
from quantize import encoders, gates
from quantize.features import FEATURES as FEATURES_FILE
from quantize.features import HEAD as HEAD_FILE
from quantize.formats import WeightFormat
from quantize.gates import Draft, GateError
from quantize.inputs import FEATURES, IDS, MASK, words_of
from quantize.prologue import Prologue
from quantize.reference import (
    Batch,
    adapted,
    cut_config,
    layers_of_every_kind,
    outer_inputs,
    positions_max,
    random_adapter,
)
from quantize.runner import Array, Runner
from quantize.source import Source
from quantize.weights import Progress, quantise

BLOCK_GRAPHS: Final = ("prologue", "block_fwd", "block_bwd")
LOGITS_ERROR_MAX: Final = 1e-3  # relative, of the graphs against torch; measured 2e-6
LOGITS_CHANGE_MAX: Final = 0.25  # relative, of the quantised model against its source; int8g 0.01, int4d 0.1
EXACT_LOGITS_CHANGE_MAX: Final = 1e-3
HEAD_ERROR_MAX: Final = 1e-5  # relative, of the head in two graphs against the head in one; measured 0
_CUT_VOCABULARY: Final = 320
_POSITIONS: Final = 640
_PROBED_MAX: Final = 4_096  # a mask of so many squared is 67 MB


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Token ids and mask int64 [B, S], padded on the right; one label [B] each."""

    ids: Array
    mask: Array
    labels: Array

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], labels: Sequence[int], pad: int) -> Self:
        """Rows of any lengths."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return cls(ids, mask, np.array(labels, np.int64))

    def loss(self, logits: Tensor) -> Tensor:
        """The mean loss of logits [B, C] in nats."""
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(self.labels))


class ClassifierRunner(Runner):
    """Loss, logits and gradients by the graphs of a bundle; dense tensors are absolute, by `dense/NAME`."""

    graphs: ClassVar[tuple[str, ...]] = (*BLOCK_GRAPHS, "classify")

    def __init__(
        self, folder: Path, tensors: Mapping[str, Array], layers: int, *, kinds: Sequence[str] = ()
    ) -> None:
        halves = [Path(file).stem for file in (FEATURES_FILE, HEAD_FILE) if (folder / file).exists()]
        super().__init__(folder, tensors, layers, 0, kinds=kinds, graphs=(*self.graphs, *halves))
        self.in_two = bool(halves)

    def prologue(self, ids: Array, mask: Array) -> dict[str, Array]:
        """x and the aux tensors of ids, or of features."""
        return self._named("prologue", {IDS: ids, FEATURES: ids, MASK: mask})

    def forward(
        self, ids: Array, mask: Array, adapter: Mapping[str, Array]
    ) -> tuple[list[Array], dict[str, Array]]:
        """(input of every block and output of the last, aux tensors)."""
        aux = self.prologue(ids, mask)
        inputs = [aux.pop("x")]
        for index in range(self._layers):
            more = self._layer(index, adapter) | self._own_aux(index, aux)
            inputs.append(self._run("block_fwd", more, x=inputs[-1])[0])
        return inputs, aux

    def answers(
        self, batch: LabelledBatch, adapter: Mapping[str, Array]
    ) -> tuple[Array, Array, dict[str, Array]]:
        """(losses [B], logits [B, C], gradients of the mean loss)."""
        inputs, aux = self.forward(batch.ids, batch.mask, adapter)
        count = np.float32(len(batch.labels))
        found = self.head(inputs[-1], batch, adapter)
        nll, logits, flow = found.pop("nll"), found.pop("logits"), found.pop("gh") / count
        gradients = {name.removeprefix("g:"): value / count for name, value in found.items()}
        return nll, logits, gradients | self.backward(flow, inputs, aux, adapter)

    def backward(
        self,
        flow: Array,
        inputs: Sequence[Array],
        aux: Mapping[str, Array],
        adapter: Mapping[str, Array],
    ) -> dict[str, Array]:
        """Gradients of A and B of every layer, from the one by the last block's output."""
        gradients: dict[str, Array] = {}
        for index in reversed(range(self._layers)):
            more = self._layer(index, adapter) | self._own_aux(index, aux)
            by_name = self._named("block_bwd", more, x=inputs[index], gy=flow)
            flow = by_name.pop("gx")
            gradients |= {f"L{index}/{name.removeprefix('g:')}": v for name, v in by_name.items()}
        return gradients

    def head(self, h: Array, batch: LabelledBatch, adapter: Mapping[str, Array]) -> dict[str, Array]:
        """What the head makes of the last block's output: nll, logits, gh, g:dense/NAME; gradients of the sum."""
        return self._named("classify", _head_feeds(batch, adapter), h=h)

    def head_in_two(self, h: Array, batch: LabelledBatch, adapter: Mapping[str, Array]) -> dict[str, Array]:
        """The same without gh, by way of the vector that stays as it is while the encoder is frozen."""
        feeds = _head_feeds(batch, adapter)
        vector = self._named(Path(FEATURES_FILE).stem, feeds, h=h)
        return self._named(Path(HEAD_FILE).stem, feeds, **vector)

    def _named(self, graph: str, more: Mapping[str, Array], **feed: Array) -> dict[str, Array]:
        names = [output.name for output in self._sessions[graph].get_outputs()]
        return dict(zip(names, self._run(graph, more, **feed), strict=True))


@dataclass(frozen=True, slots=True)
class ClassifierExam:
    """Takes the source's answers before its weights are quantised, and compares afterwards."""

    runner: ClassVar[type[ClassifierRunner]] = ClassifierRunner
    batches: ClassVar[type[LabelledBatch]] = LabelledBatch
    cut_shapes: ClassVar = ((1, 5), (3, 17), (2, 40))  # rows, tokens of the longest
    source: Source
    lora: LoraConfig
    fmt: WeightFormat
    exact: bool
    batch: LabelledBatch
    logits: Tensor

    @classmethod
    def of(cls, source: Source, *, exact: bool, fmt: WeightFormat, lora: LoraConfig) -> Self:
        """With a few sentences as the model is used to see them, framed by its special tokens."""
        tokenizer = Tokenizer.from_str(source.tokenizer.decode())
        width = longest_text(source)
        rows = [tokenizer.encode(text).ids[:width] for text in gates.TEXTS]
        labels = [row % max(len(source.classes), 1) for row in range(len(rows))]
        batch = cls.batches.of(rows, labels, source.pad_id)
        return cls(source, lora, fmt, exact, batch, logits_of(source.model, batch))

    def run(self, draft: Draft, tell: Progress) -> dict[str, float]:
        """Figures of all gates. Raises GateError, naming gate, figure and bound."""
        gates.check_operators(draft.operators)
        figures = {"cut_gradient_error": self._cut(draft.folder)}
        tell("gates", 0.3)
        figures |= self._quantisation()
        anatomy = self.source.anatomy
        tensors = map_weights(draft.folder / WEIGHTS, draft.places)
        runner = self.runner(draft.folder, tensors, len(anatomy.layers), kinds=anatomy.kinds)
        tell("gates", 0.5)
        figures |= self._whole(runner) | self._halves(runner)
        tell("gates", 1.0)
        return {name: gates.rounded(value) for name, value in figures.items()}

    def _cut(self, folder: Path) -> float:
        anatomy = self.source.anatomy
        chosen = layers_of_every_kind(anatomy)
        config = self._cut_config(chosen)
        pad = config.pad_token_id = self.source.pad_id if self.source.pad_id < _CUT_VOCABULARY else 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = encoders.like(self.source.model, config)
        small = dataclasses.replace(self.source, model=model, pad_id=pad, exact={})
        tensors = quantise(small, self.fmt, lambda phase, fraction: None)
        kinds = [anatomy.kinds[index] for index in chosen] if anatomy.kinds else ()
        runner = self.runner(folder, tensors, len(chosen), kinds=kinds)
        random, errors = np.random.default_rng(0), []
        adapter = {**random_adapter(model, self.lora, random, scale=0.02), **_head(small)}
        for batch in self._cut_batches(random, pad):
            errors.append(compare(runner, model, self.lora, adapter, batch)[1])
        return gates.below("cut_gradient_error", max(errors), self._rounds(gates.CUT_GRADIENT_ERROR_MAX))

    def _cut_config(self, layers: Sequence[int]) -> Any:
        return cut_config(self.source.model.config, layers, _CUT_VOCABULARY)

    def _cut_batches(self, random: np.random.Generator, pad: int) -> Iterator[LabelledBatch]:
        for count, width in self.cut_shapes:
            width = min(width, longest_text(self.source))
            rows = [
                random.integers(pad + 1, _CUT_VOCABULARY, max(3, width - 2 * row)).tolist()
                for row in range(count)
            ]
            labels = random.integers(0, max(len(self.source.classes), 1), count).tolist()
            yield self.batches.of(rows, labels, pad)

    def _quantisation(self) -> dict[str, float]:
        found = logits_of(self.source.model, self.batch)
        change = float((found - self.logits).norm() / self.logits.norm())
        log_p, log_q = (torch.log_softmax(logits, -1) for logits in (self.logits, found))
        divergence = abs((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
        bound = EXACT_LOGITS_CHANGE_MAX if self.exact else LOGITS_CHANGE_MAX
        return {"logits_change": gates.below("logits_change", change, bound), "kl": divergence}

    def _whole(self, runner: ClassifierRunner) -> dict[str, float]:
        random = np.random.default_rng(1)
        adapter = random_adapter(self.source.model, self.lora, random, scale=0.01) | _head(self.source)
        loss, gradient, logits = compare(runner, self.source.model, self.lora, adapter, self.batch)
        aux, position = self._positions(runner)
        below, rounds = gates.below, self._rounds
        return {
            "loss_error": below("loss_error", loss, max(gates.LOSS_ERROR_MAX, self.fmt.loss_error_max)),
            "gradient_error": below("gradient_error", gradient, rounds(gates.GRADIENT_ERROR_MAX)),
            "logits_error": below("logits_error", logits, rounds(LOGITS_ERROR_MAX)),
            "aux_error": below("aux_error", aux, gates.AUX_ERROR_MAX),
            "position_error": below("position_error", position, rounds(gates.POSITION_ERROR_MAX)),
        }

    def _halves(self, runner: ClassifierRunner) -> dict[str, float]:
        """Nothing where the head is in one graph alone."""
        if not runner.in_two:
            return {}
        adapter = random_adapter(self.source.model, self.lora, np.random.default_rng(1), scale=0.01)
        adapter |= _head(self.source)
        h = runner.forward(self.batch.ids, self.batch.mask, adapter)[0][-1]
        whole, found = (run(h, self.batch, adapter) for run in (runner.head, runner.head_in_two))
        error = max(
            float(np.linalg.norm(found[name] - whole[name]) / np.linalg.norm(whole[name]))
            for name in whole.keys() - {"gh"}
        )
        return {"head_error": gates.below("head_error", error, HEAD_ERROR_MAX)}

    def _positions(self, runner: ClassifierRunner) -> tuple[float, float]:
        """(error of what precedes the layers, worst relative error of the hidden states at any position)."""
        source, batch = self.source, self._longest()
        aux_error = gates.worst_aux(
            runner.prologue(batch.ids, batch.mask), outer_inputs(source.anatomy, batch)
        )
        adapter = random_adapter(source.model, self.lora, np.random.default_rng(1), scale=0.0)
        found = runner.forward(batch.ids, batch.mask, adapter)[0][-1][batch.mask > 0]
        expected = hidden_of(source, batch)[batch.mask > 0]
        norms = np.linalg.norm(expected, axis=-1)
        return aux_error, float((np.linalg.norm(found - expected, axis=-1) / norms).max())

    def _longest(self) -> Batch | LabelledBatch:
        """A text as long as the model takes, and half of it."""
        source = self.source
        text = np.resize(self.batch.ids[self.batch.mask > 0], min(_POSITIONS, longest_text(source)))
        return Batch.of([text.tolist(), text[: max(2, len(text) // 2)].tolist()], source.pad_id)

    def _rounds(self, bound: float) -> float:
        return bound if self.fmt.gradient_gate else gates.ROUNDED_ERROR_MAX


def compare(
    runner: ClassifierRunner,
    model: Any,
    lora: LoraConfig,
    adapter: Mapping[str, Array],
    batch: LabelledBatch,
) -> tuple[float, float, float]:
    """(difference of the losses, largest relative error of a gradient, relative error of the logits)."""
    loss, logits, expected = torch_answers(model, lora, adapter, batch)
    nll, found_logits, found = runner.answers(batch, adapter)
    if found.keys() != expected.keys():
        raise GateError(
            "gradients are missing", field="gradients", value=sorted(found.keys() ^ expected.keys())[:4]
        )
    # A tensor that barely matters (a bias that shifts all classes alike) is compared on the scale of the others.
    least = 1e-4 * max(float(np.linalg.norm(value)) for value in expected.values())
    errors = [
        float(np.linalg.norm(found[name] - value) / max(float(np.linalg.norm(value)), least))
        for name, value in expected.items()
    ]
    logits_error = float(np.linalg.norm(found_logits - logits) / np.linalg.norm(logits))
    return abs(float(nll.mean()) - loss), max(errors), logits_error


def torch_answers(
    model: Any, lora: LoraConfig, adapter: Mapping[str, Array], batch: LabelledBatch
) -> tuple[float, Array, dict[str, Array]]:
    """(mean loss, logits, gradients of A, B and head) of a batch by torch autograd through the model's own modules."""
    leaves = {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in adapter.items()}
    head = {name.removeprefix(DENSE): value for name, value in leaves.items() if name.startswith(DENSE)}
    model.requires_grad_(False)
    words = words_of(model, torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
    with adapted(model, lora, leaves):
        logits = torch.func.functional_call(model, head, (), words).logits
        loss = batch.loss(logits)
        found = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {name: value.numpy() for name, value in zip(leaves, found, strict=True)}
    return loss.item(), logits.detach().numpy(), gradients


def logits_of(model: Any, batch: LabelledBatch | Batch) -> Tensor:
    """Logits [B, C] of the plain model."""
    with torch.no_grad():
        words = words_of(model, torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
        found: Tensor = model(**words).logits
    return found


def hidden_of(source: Source, batch: Batch | LabelledBatch) -> Array:
    """What the model's own last layer gives for a batch, [B, S, D]."""
    caught: list[Tensor] = []

    def keep(module: object, inputs: object, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = source.anatomy.layers[-1].register_forward_hook(keep)
    try:
        logits_of(source.model, batch)
    finally:
        handle.remove()
    found: Array = caught[-1].numpy()
    return found


def longest_text(source: Source) -> int:
    """How many tokens the model takes, and no more than its maker has it read."""
    longest = _longest_taken(source)
    return min(longest, source.tokens_max or longest)


def _longest_taken(source: Source) -> int:
    """Some families count positions from behind the padding token's number."""
    told = positions_max(source.model.config)
    if source.audio is not None:
        return source.audio.positions
    if told > _PROBED_MAX:
        return told
    start = Prologue(source.anatomy)
    named = dict(source.model.named_parameters())
    tensors = [named[full] for full in start.outer.values()]
    other = (source.pad_id + 1) % source.anatomy.vocabulary
    for length in (told, told - source.pad_id - 1):
        ids = torch.full((1, max(length, 1)), other)
        try:
            with torch.no_grad():
                start(ids, torch.ones_like(ids), *tensors)
        except (IndexError, RuntimeError):
            continue
        return length
    raise GateError("no text fits the position table", field="positions", value=told)


def _head_feeds(batch: LabelledBatch, adapter: Mapping[str, Array]) -> dict[str, Array]:
    dense = {name: value for name, value in adapter.items() if name.startswith(DENSE)}
    return {**dense, IDS: batch.ids, MASK: batch.mask, "labels": batch.labels}


def _head(source: Source) -> dict[str, Array]:
    """The head's own values, by `dense/NAME`."""
    named = dict(source.model.named_parameters())
    return {DENSE + name: named[name].detach().numpy().copy() for name in source.anatomy.tail.trained}
