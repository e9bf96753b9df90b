"""What must hold before a bundle is signed; the figures go into its manifest.

(a) a two-layer cut of the architecture with random weights: gradients of the shipped graphs against torch autograd;
(b) the whole model, one batch: loss and gradients against torch on the dequantised weights;
(c) loss of the source against the quantised model, and KL(source || quantised), on a fixed text;
(d) the decoding graph against the training graphs, and cached decoding against a full re-run;
(e) only operators that a device allows; (f) all layers alike (`blocks.check_layers`, before any work).
The torch side uses transformers' own modules with hooks, not the rewritten block that was exported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fedge.errors import IntegrityError
from fedge.lora import LoraConfig
from fedge.release import OPERATORS_ALLOWED, WEIGHTS, TensorPlace
from quantize.blocks import adapted_modules, layers_of
from quantize.formats import WeightFormat
from quantize.runner import IGNORE, Array, Runner
from quantize.source import Source, build_model
from quantize.weights import Progress, map_weights, quantise

CUT_GRADIENT_ERROR_MAX: Final = 1e-5  # relative, per tensor; measured 1e-6
GRADIENT_ERROR_MAX: Final = 1e-3  # through 30 layers of float32; measured 2e-4
LOSS_ERROR_MAX: Final = 1e-4
EXACT_LOSS_CHANGE_MAX: Final = 1e-3

_CUT_VOCABULARY: Final = 320
_CUT_SHAPES: Final = ((1, 5), (3, 17), (2, 40))
_BATCH_TOKENS: Final = 48
_TEXTS: Final = (
    "Friend: Hi! How was your weekend?\nMe: It was great, I went hiking with my sister. We saw a fox near the lake.",
    "The small device woke up at 7:05, read 31 messages, learnt a little from each, and went back to sleep.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 14))",
    "Water boils at 100 degrees Celsius at sea level; higher up, where the air is thinner, it boils sooner.",
)


class GateError(IntegrityError):
    """The graphs do not compute what the source computes. Nothing was signed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, attention mask and shifted labels (IGNORE where none), int64 [B, S], padded on the right."""

    ids: Array
    mask: Array
    labels: Array

    @staticmethod
    def of(rows: Sequence[Sequence[int]], pad: int) -> Batch:
        width = max(map(len, rows))
        ids = np.full((len(rows), width), pad, np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(mask[:, 1:] > 0, ids[:, 1:], IGNORE)
        return Batch(ids, mask, labels)


@dataclass(slots=True)
class Exam:
    """Takes the source's answers before its weights are quantised, and compares afterwards."""

    source: Source
    lora: LoraConfig
    fmt: WeightFormat
    exact: bool
    batch: Batch
    source_log_p: Tensor

    @classmethod
    def of(cls, source: Source, *, exact: bool, fmt: WeightFormat, lora: LoraConfig) -> Exam:
        tokenizer = Tokenizer.from_str(source.tokenizer.decode())
        width = min(_BATCH_TOKENS, source.model.config.max_position_embeddings)
        rows = [tokenizer.encode(text, add_special_tokens=False).ids[:width] for text in _TEXTS]
        batch = Batch.of([row for row in rows if len(row) > 2], source.pad_id)
        return cls(source, lora, fmt, exact, batch, _log_p(source.model, batch))

    def run(
        self,
        folder: Path,
        places: Mapping[str, TensorPlace],
        operators: set[str],
        head_rows: int,
        tell: Progress,
    ) -> dict[str, float]:
        """Figures of all gates. Raises GateError, naming gate, figure and bound."""
        foreign = sorted(operators - OPERATORS_ALLOWED)
        if foreign:
            raise GateError("the graphs use operators that devices refuse", field="operators", value=foreign)
        figures = {"cut_gradient_error": self._cut(folder)}
        tell("gates", 0.2)
        figures |= self._quantisation()
        tell("gates", 0.4)
        tensors = map_weights(folder / WEIGHTS, places)
        runner = Runner(folder, tensors, self.source.model.config.num_hidden_layers, head_rows)
        figures |= self._whole(runner)
        tell("gates", 1.0)
        return {name: _rounded(value) for name, value in figures.items()}

    def _cut(self, folder: Path) -> float:
        model = two_layer_cut(self.source.model.config)
        cut = Source(model, "", b"", "", "", "", 0, 0)
        tensors = quantise(cut, self.fmt, lambda phase, fraction: None)
        runner = Runner(folder, tensors, 2, head_rows=_CUT_VOCABULARY // 2 - 1)
        random = np.random.default_rng(0)
        adapter = random_adapter(model, self.lora, random, scale=0.02)
        errors = []
        for count, width in _CUT_SHAPES:
            rows = [random.integers(0, _CUT_VOCABULARY, width - 2 * row).tolist() for row in range(count)]
            batch = Batch.of(rows, pad=0)
            loss, expected = torch_gradients(model, self.lora, adapter, batch)
            errors.append(compare(runner, adapter, batch, loss, expected)[1])
        return _below("cut_gradient_error", max(errors), CUT_GRADIENT_ERROR_MAX)

    def _quantisation(self) -> dict[str, float]:
        log_q = _log_p(self.source.model, self.batch)
        labels = torch.from_numpy(self.batch.labels)
        chosen = labels != IGNORE
        losses = [
            -log[chosen].gather(-1, labels[chosen][:, None]).mean().item()
            for log in (self.source_log_p, log_q)
        ]
        p, q = self.source_log_p[chosen], log_q[chosen]
        divergence = max(0.0, (p.exp() * (p - q)).sum(-1).mean().item())
        _below("kl", divergence, EXACT_LOSS_CHANGE_MAX if self.exact else self.fmt.refit_kl_max)
        if self.exact:
            _below("loss_change", abs(losses[1] - losses[0]), EXACT_LOSS_CHANGE_MAX)
        return {"source_loss": losses[0], "quantised_loss": losses[1], "kl": divergence}

    def _whole(self, runner: Runner) -> dict[str, float]:
        adapter = random_adapter(self.source.model, self.lora, np.random.default_rng(1), scale=0.01)
        loss, expected = torch_gradients(self.source.model, self.lora, adapter, self.batch)
        loss_error, gradient_error = compare(runner, adapter, self.batch, loss, expected)
        return {
            "loss_error": _below("loss_error", loss_error, LOSS_ERROR_MAX),
            "gradient_error": _below("gradient_error", gradient_error, GRADIENT_ERROR_MAX),
        }


def two_layer_cut(config: Any) -> Any:
    """The same architecture with two layers, a small vocabulary and random weights."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers, cut.vocab_size, cut.pad_token_id = 2, _CUT_VOCABULARY, None
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:2]
    return build_model(cut)


def random_adapter(
    model: Any, lora: LoraConfig, random: np.random.Generator, *, scale: float
) -> dict[str, npt.NDArray[np.float32]]:
    """A and B of every layer, B not zero: with B = 0 the gradient of A would vanish and prove nothing."""
    adapter = {}
    for index in range(len(layers_of(model))):
        for name, (rows, columns) in sorted(adapted_modules(model, lora).items()):
            a = random.standard_normal((lora.r, columns)) / columns**0.5
            adapter[f"L{index}/{name}.A"] = a.astype(np.float32)
            adapter[f"L{index}/{name}.B"] = (random.standard_normal((rows, lora.r)) * scale).astype(
                np.float32
            )
    return adapter


def torch_gradients(
    model: Any, lora: LoraConfig, adapter: Mapping[str, Array], batch: Batch
) -> tuple[float, dict[str, Array]]:
    """Loss and adapter gradients by torch autograd through transformers' own modules."""
    leaves = {name: torch.from_numpy(value).clone().requires_grad_() for name, value in adapter.items()}
    model.requires_grad_(False)
    with _adapted(model, lora, leaves):
        logits = model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), ignore_index=IGNORE
        )
        found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {name: value.numpy() for name, value in zip(leaves, found, strict=True)}


def compare(
    runner: Runner, adapter: Mapping[str, Array], batch: Batch, loss: float, expected: Mapping[str, Array]
) -> tuple[float, float]:
    """(difference of the losses, largest relative error of a gradient tensor)."""
    found_loss, found = runner.gradients(batch.ids, batch.mask, batch.labels, adapter)
    if found.keys() != expected.keys():
        raise GateError(
            "gradients are missing", field="gradients", value=sorted(found.keys() ^ expected.keys())[:4]
        )
    errors = [
        float(np.linalg.norm(found[name] - value) / max(float(np.linalg.norm(value)), 1e-30))
        for name, value in expected.items()
    ]
    return abs(found_loss - loss), max(errors)


@contextmanager
def _adapted(model: Any, lora: LoraConfig, leaves: Mapping[str, Tensor]) -> Iterator[None]:
    def hook(prefix: str) -> Any:
        a, b = leaves[f"{prefix}.A"], leaves[f"{prefix}.B"]
        return lambda module, inputs, output: output + lora.scale * (inputs[0] @ a.t() @ b.t())

    handles = []
    for index, layer in enumerate(layers_of(model)):
        for name in adapted_modules(model, lora):
            handles.append(layer.get_submodule(name).register_forward_hook(hook(f"L{index}/{name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _log_p(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
        return torch.log_softmax(logits, -1)


def _below(gate: str, value: float, bound: float) -> float:
    if not value <= bound:  # also catches NaN
        raise GateError(
            "a gate failed: the bundle would not compute what the model computes",
            field=gate,
            value=float(f"{value:.3g}"),
            hint=f"At most {bound:g} is allowed; nothing was signed",
        )
    return value


def _rounded(value: float) -> float:
    """Enough digits to judge by, few enough that the manifest does not depend on the last bit of a sum."""
    return float(f"{value:.4f}") if value >= 0.01 else float(f"{value:.1g}")
