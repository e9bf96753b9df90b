"""What must hold before a bundle is signed; the figures go into its manifest.

(a) a two-layer cut of the architecture with random weights: gradients of the shipped graphs against torch autograd;
(b) the whole model, one batch: loss and gradients against torch on the dequantised weights;
    and, without an adapter, the features at every position of a text longer than any sliding window;
(c) loss of the source against the quantised model, and KL(source || quantised), on a fixed text;
(d) the decoding graph against the training graphs, and cached decoding against a full re-run;
(e) only operators that a device allows; (f) all layers alike (`blocks.check_layers`, before any work).

Of a format that rounds activations, (a), (b) and (d) hold for its graphs with the rounding taken out
(`quantize.unrounded`), to the same bounds; and with it, for loss and gradient as a whole: the direction in which an
adapter moves. A single tensor of it may be all noise: 1.1 of its length, where the whole is wrong by a third.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fedge.errors import IntegrityError
from fedge.io.weight_file import map_weights
from fedge.lora import LoraConfig
from fedge.release import OPERATORS_ALLOWED, WEIGHTS, TensorPlace
from quantize.decode import LEVEL_EXACT, at_level
from quantize.formats import WeightFormat
from quantize.reference import (
    Batch,
    cut,
    features,
    largest_window,
    layers_of_every_kind,
    log_probabilities,
    outer_inputs,
    positions_max,
    random_adapter,
    torch_gradients,
)
from quantize.runner import IGNORE, Array, Decoder, Runner
from quantize.source import Source
from quantize.unrounded import without_rounding
from quantize.weights import Progress, quantise

# Relative, per tensor: 1e-6 as a rule, 3e-5 where random attention saturates; planted mistakes are far above.
CUT_GRADIENT_ERROR_MAX: Final = 1e-4
GRADIENT_ERROR_MAX: Final = 1e-3  # through 30 layers of float32; measured 2e-4
LOSS_ERROR_MAX: Final = 1e-4
# Where activations are rounded to 8 bits; unrelated vectors give 1.4 and 0.
ROUNDED_ERROR_MAX: Final = 0.9  # of one tensor, or one position's features
ROUNDED_GRADIENT_ERROR_MAX: Final = 0.45  # of the whole gradient; measured 0.26 (SmolLM2-135M), 0.02 (random)
ROUNDED_COSINE_MIN: Final = 0.9  # of the whole gradient with torch's; measured 0.968
EXACT_LOSS_CHANGE_MAX: Final = 1e-3
DECODE_ERROR_MAX: Final = 1e-5  # mean over labels, relative to the loss, adding in floats; measured 2e-6
CACHE_ERROR_MAX: Final = 1e-4  # of a logit, relative to the largest
DECODE_CHANGE_GOAL: Final = 0.03  # nats, with 8-bit activations everywhere; measured 0.01
DECODE_CHANGE_MAX: Final = 0.1  # nats, of the shipped graph, whose head rounds in any case

POSITION_ERROR_MAX: Final = 1e-3  # relative, of the features at the worst position; a lost window is near 1
AUX_ERROR_MAX: Final = 1e-4  # of what precedes the layers; masks must be equal in what they hide

_CUT_VOCABULARY: Final = 320
_CUT_SHAPES: Final = ((1, 5), (3, 17), (2, 40))
_POSITIONS: Final = 64  # at least so many are compared, and some beyond a window where there is one
_BEYOND: Final = 9
_FEATURES_POSITIONS_MAX: Final = 640  # of a whole model; a longer window is looked for in the masks alone
_MASK_POSITIONS_MAX: Final = 8_192  # a mask of so many squared is 268 MB
_BATCH_TOKENS: Final = 48
_CACHED_STEPS: Final = 8
TEXTS: Final = (
    "Friend: Hi! How was your weekend?\nMe: It was great, I went hiking with my sister. We saw a fox near the lake.",
    "The small device woke up at 7:05, read 31 messages, learnt a little from each, and went back to sleep.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 14))",
    "Water boils at 100 degrees Celsius at sea level; higher up, where the air is thinner, it boils sooner.",
)


class GateError(IntegrityError):
    """The graphs do not compute what the source computes. Nothing was signed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An unsigned bundle: its folder, and what the manifest will say of it."""

    folder: Path
    places: Mapping[str, TensorPlace]
    operators: frozenset[str]
    infer: onnx.ModelProto | None  # None: this family cannot be decoded yet
    head_rows: int


@dataclass(frozen=True, slots=True)
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
        width = min(_BATCH_TOKENS, positions_max(source.model.config))
        rows = [tokenizer.encode(text, add_special_tokens=False).ids[:width] for text in TEXTS]
        batch = Batch.of([row for row in rows if len(row) > 2], source.pad_id)
        return cls(source, lora, fmt, exact, batch, log_probabilities(source.model, batch))

    def run(self, draft: Draft, tell: Progress) -> dict[str, float]:
        """Figures of all gates. Raises GateError, naming gate, figure and bound."""
        check_operators(draft.operators)
        figures = {"cut_gradient_error": self._cut(draft.folder)}
        tell("gates", 0.2)
        figures |= self._quantisation()
        tell("gates", 0.4)
        tensors = map_weights(draft.folder / WEIGHTS, draft.places)
        anatomy = self.source.anatomy

        def runner_of(*, rounds: bool) -> Runner:
            return Runner(
                draft.folder,
                tensors,
                len(anatomy.layers),
                draft.head_rows,
                kinds=anatomy.kinds,
                cap=anatomy.logit_cap,
                rounds=rounds,
            )

        rounded_runner = None if self.fmt.gradient_gate else runner_of(rounds=True)
        runner = runner_of(rounds=rounded_runner is None)
        figures |= self._whole(runner, rounded_runner)
        tell("gates", 0.7)
        if draft.infer is not None:
            figures |= self._decoding(draft.folder, draft.infer, runner)
        tell("gates", 1.0)
        return {name: rounded(value) for name, value in figures.items()}

    def _cut(self, folder: Path) -> float:
        anatomy = self.source.anatomy
        chosen = layers_of_every_kind(anatomy)
        model = cut(self.source.model.config, chosen, _CUT_VOCABULARY)
        small = Source(model, "", b"", "", "", "", 0, 0)
        tensors = quantise(small, self.fmt, lambda phase, fraction: None)
        runner = Runner(
            folder,
            tensors,
            len(chosen),
            head_rows=_CUT_VOCABULARY // 2 - 1,
            kinds=[anatomy.kinds[index] for index in chosen] if anatomy.kinds else (),
            cap=anatomy.logit_cap,
            rounds=self.fmt.gradient_gate,
        )
        random = np.random.default_rng(0)
        adapter = random_adapter(model, self.lora, random, scale=0.02)
        errors = []
        window = largest_window(self.source.model.config) + _BEYOND
        shapes = [*_CUT_SHAPES, (1, window)] if 40 < window <= _FEATURES_POSITIONS_MAX else _CUT_SHAPES
        longest = positions_max(self.source.model.config)
        for count, full in shapes:
            width = min(full, longest)
            rows = [random.integers(0, _CUT_VOCABULARY, width - 2 * row).tolist() for row in range(count)]
            batch = Batch.of(rows, pad=0)
            loss, expected = torch_gradients(model, self.lora, adapter, batch)
            errors.append(compare(runner, adapter, batch, loss, expected)[1])
        return below("cut_gradient_error", max(errors), CUT_GRADIENT_ERROR_MAX)

    def _quantisation(self) -> dict[str, float]:
        log_q = log_probabilities(self.source.model, self.batch)
        labels = torch.from_numpy(self.batch.labels)
        chosen = labels != IGNORE
        losses = [
            -log[chosen].gather(-1, labels[chosen][:, None]).mean().item()
            for log in (self.source_log_p, log_q)
        ]
        p, q = self.source_log_p[chosen], log_q[chosen]
        divergence = abs((p.exp() * (p - q)).sum(-1).mean().item())  # rounding may make it a little negative
        below("kl", divergence, EXACT_LOSS_CHANGE_MAX if self.exact else self.fmt.refit_kl_max)
        if self.exact:
            below("loss_change", abs(losses[1] - losses[0]), EXACT_LOSS_CHANGE_MAX)
        return {"source_loss": losses[0], "quantised_loss": losses[1], "kl": divergence}

    def _whole(self, runner: Runner, rounded_runner: Runner | None) -> dict[str, float]:
        adapter = random_adapter(self.source.model, self.lora, np.random.default_rng(1), scale=0.01)
        loss, expected = torch_gradients(self.source.model, self.lora, adapter, self.batch)
        loss_error, gradient_error = compare(runner, adapter, self.batch, loss, expected)
        aux_error, position_error = self._positions(runner)
        figures = {
            "loss_error": below("loss_error", loss_error, LOSS_ERROR_MAX),
            "gradient_error": below("gradient_error", gradient_error, GRADIENT_ERROR_MAX),
            "aux_error": below("aux_error", aux_error, AUX_ERROR_MAX),
            "position_error": below("position_error", position_error, POSITION_ERROR_MAX),
        }
        if rounded_runner is not None:
            found = rounded_runner.gradients(self.batch.ids, self.batch.mask, self.batch.labels, adapter)
            figures |= rounding(found, (loss, expected), self.fmt.loss_error_max)
        return figures

    def _positions(self, runner: Runner) -> tuple[float, float]:
        """(error of what precedes the layers, worst relative error of the features at any position)."""
        anatomy, pad = self.source.anatomy, self.source.pad_id
        longest = positions_max(self.source.model.config)
        wanted = max(_POSITIONS, largest_window(self.source.model.config) + _BEYOND)
        text = np.resize(self.batch.ids[self.batch.mask > 0], min(wanted, longest, _MASK_POSITIONS_MAX))
        batch = Batch.of([text.tolist(), text[: len(text) // 2].tolist()], pad)
        aux_error = worst_aux(runner.prologue(batch.ids, batch.mask), outer_inputs(anatomy, batch))
        short = Batch.of([text[:_FEATURES_POSITIONS_MAX].tolist(), text[: len(text) // 2].tolist()], pad)
        short = short if len(text) > _FEATURES_POSITIONS_MAX else batch
        adapter = random_adapter(self.source.model, self.lora, np.random.default_rng(1), scale=0.0)
        found = runner.features(short.ids, short.mask, adapter)[0][short.mask > 0]
        expected = features(anatomy, short)[short.mask > 0]
        norms = np.linalg.norm(expected, axis=-1)
        return aux_error, float((np.linalg.norm(found - expected, axis=-1) / norms).max())

    def _decoding(self, folder: Path, infer: onnx.ModelProto, runner: Runner) -> dict[str, float]:
        """The stitched graph must equal the training graphs when both add in floats; the shipped one may round."""
        adapter = random_adapter(self.source.model, self.lora, np.random.default_rng(1), scale=0.01)
        texts = [ids[kept > 0][None] for ids, kept in zip(self.batch.ids, self.batch.mask, strict=True)]
        batches = [Batch.of(text.tolist(), self.source.pad_id) for text in texts]
        trained = np.concatenate([runner.losses(one.ids, one.mask, one.labels, adapter) for one in batches])

        def losses(decoder: Decoder) -> Array:
            found = (decoder.step(text, decoder.start(1))[0] for text in texts)
            return np.concatenate([_losses(logits, one) for logits, one in zip(found, batches, strict=True)])

        exact = folder / "exact.onnx"  # beside weights.bin: external data is found relative to the graph
        rounds = not self.fmt.gradient_gate
        plain = at_level(infer, LEVEL_EXACT)
        exact.write_bytes((without_rounding(plain) if rounds else plain).SerializeToString())
        try:
            decoder = Decoder(exact, adapter, folds=not rounds)
        finally:
            exact.unlink()
        # The mean of differences: a difference of means lets errors cancel.
        error = float(np.abs(losses(decoder) - trained).mean()) / max(1.0, float(trained.mean()))

        def change_of_shipped() -> float:
            return abs(float((losses(Decoder(folder / "infer.onnx", adapter)) - trained).mean()))

        change = change_of_shipped()
        if change > DECODE_CHANGE_GOAL:  # activations that 8 bits do not hold: only the head rounds them then
            with (folder / "infer.onnx").open("wb") as stream:
                stream.write(at_level(infer, LEVEL_EXACT, head=False).SerializeToString(deterministic=True))
                stream.flush()
                os.fsync(stream.fileno())
            change = change_of_shipped()
        return {
            "decode_error": below("decode_error", error, DECODE_ERROR_MAX),
            "cache_error": below("cache_error", _cache_error(decoder, texts[0]), CACHE_ERROR_MAX),
            "decode_change": below("decode_change", change, max(DECODE_CHANGE_MAX, self.fmt.loss_error_max)),
        }


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


def rounding(
    found: tuple[float, Mapping[str, Array]],
    expected: tuple[float, Mapping[str, Array]],
    loss_error_max: float,
) -> dict[str, float]:
    """What rounding does to loss and gradient as a whole. Raises GateError when that is more than noise."""
    mine, torchs = (
        np.concatenate([gradients[name].ravel() for name in sorted(expected[1])])
        for gradients in (found[1], expected[1])
    )
    length = float(np.linalg.norm(torchs))
    error = float(np.linalg.norm(mine - torchs)) / length
    cosine = float(mine @ torchs) / max(length * float(np.linalg.norm(mine)), 1e-30)
    below("rounded_gradient_angle", 1 - cosine, 1 - ROUNDED_COSINE_MIN)
    return {
        "rounded_loss_error": below("rounded_loss_error", abs(found[0] - expected[0]), loss_error_max),
        "rounded_gradient_error": below("rounded_gradient_error", error, ROUNDED_GRADIENT_ERROR_MAX),
        "rounded_gradient_cosine": cosine,
    }


def check_operators(found: frozenset[str]) -> None:
    """Raise GateError unless a device allows all of them."""
    foreign = sorted(found - OPERATORS_ALLOWED)
    if foreign:
        raise GateError("the graphs use operators that devices refuse", field="operators", value=foreign)


def worst_aux(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Largest difference of any tensor; of a mask, only what it hides counts."""
    worst = 0.0
    for name, value in expected.items():
        mine = found[name]
        if name.partition("@")[0] == "mask" and value.dtype == np.float32:
            mine, value = mine < -1.0, value < -1.0
        worst = max(worst, float(np.abs(np.subtract(mine, value, dtype=np.float32)).max()))
    return worst


def _cache_error(decoder: Decoder, text: Array) -> float:
    """Largest difference between token-by-token decoding and one pass over the whole text."""
    logits, _ = decoder.step(text, decoder.start(1))
    first = max(1, text.shape[1] - _CACHED_STEPS)
    found, cache = decoder.step(text[:, :first], decoder.start(1))
    rows = [found]
    for index in range(first, text.shape[1]):
        found, cache = decoder.step(text[:, index : index + 1], cache)
        rows.append(found)
    return float(np.abs(np.concatenate(rows, 1) - logits).max() / np.abs(logits).max())


def _losses(logits: Array, batch: Batch) -> Array:
    labels = torch.from_numpy(batch.labels).flatten()
    values = torch.from_numpy(logits).flatten(0, 1)[labels != IGNORE]
    losses: Array = torch.nn.functional.cross_entropy(
        values, labels[labels != IGNORE], reduction="none"
    ).numpy()
    return losses


def below(gate: str, value: float, bound: float) -> float:
    """The value. Raises GateError when it is above its bound, or no number."""
    if not value <= bound:  # also catches NaN
        raise GateError(
            "a gate failed: the bundle would not compute what the model computes",
            field=gate,
            value=float(f"{value:.3g}"),
            hint=f"At most {bound:g} is allowed; nothing was signed",
        )
    return value


def rounded(value: float) -> float:
    """Enough digits to judge by, few enough that the manifest does not depend on the last bit of a sum."""
    return float(f"{value:.4f}") if value >= 0.01 else float(f"{value:.1g}")
