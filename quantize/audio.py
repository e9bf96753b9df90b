"""Classifiers of sound: Whisper's encoder with a head, cut to the window that a device shall hear.

A checkpoint for audio classification keeps its head. Any other Whisper gets a fresh one of the same make: a
projection, the mean over time, one matrix to the classes, so that transformers' own `WhisperForAudioClassification`
is what is trained, and what stock PEFT loads the adapter into. Whisper hears 30 seconds at a time, whatever is in
them; with its table of positions cut after the first so many, it hears less, for as much less work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForAudioClassification
from transformers.utils import logging

from fedge.audio import FFT_SAMPLES, HOP_SAMPLES, POSITION_SAMPLES, SAMPLE_RATE, AudioInput
from fedge.errors import DataError, UnsupportedError, UsageError
from quantize.checkpoint import read_checkpoint
from quantize.encoders import check_fresh, check_head, check_names
from quantize.supported import check_keys, check_plain

MODEL_TYPE: Final = "whisper"
_WITH_HEAD: Final = "WhisperForAudioClassification"
_WITHOUT: Final = ("WhisperModel", "WhisperForConditionalGeneration")
_POSITIONS_A_SECOND: Final = SAMPLE_RATE // POSITION_SAMPLES
_PREPROCESSOR: Final = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class AudioClassifier:
    """A model that gives `logits` for features, what its outputs are called, and what it hears."""

    model: Any
    classes: tuple[str, ...]
    audio: AudioInput


def is_audio(config: Mapping[str, object]) -> bool:
    """Whether a config.json is that of a model that hears."""
    return config.get("model_type") == MODEL_TYPE


def check_audio_config(config: Mapping[str, object]) -> str:
    """The architecture of such a config.json. Raises UnsupportedError."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else str(named)
    check_plain(architecture, config)
    if architecture not in (_WITH_HEAD, *_WITHOUT):
        raise UnsupportedError(
            "this model architecture is not supported",
            field="architecture",
            value=architecture,
            hint=f"Of Whisper: {', '.join((_WITH_HEAD, *_WITHOUT))}",
        )
    if config.get("use_weighted_layer_sum"):
        raise UnsupportedError(
            "a head that reads every layer is not handled", field="use_weighted_layer_sum", value=True
        )
    check_keys(architecture, config)
    return architecture


def open_audio(folder: Path, architecture: str, classes: Sequence[str], seconds: float) -> AudioClassifier:
    """The classifier in a folder; `classes` as `encoders.open_classifier` has them, `seconds` 0 = the whole window.

    Raises UsageError, UnsupportedError, DataError.
    """
    _check_preprocessor(folder)
    if architecture == _WITH_HEAD:
        check_names(classes)
        model = read_checkpoint(WhisperForAudioClassification, folder)
        names = check_head(model, classes)
    else:
        check_fresh(architecture, classes, vectors=False)
        with _quietly():
            model = read_checkpoint(
                WhisperForAudioClassification, folder, optional=("projector.", "classifier."), surplus=True
            )
        _fresh_head(model, classes)
        names = tuple(classes)
    return AudioClassifier(model, names, cut_window(model, seconds))


def outline_audio(folder: Path, architecture: str, classes: Sequence[str], seconds: float) -> AudioClassifier:
    """What `open_audio` would give, with shapes and without values. Raises the same but for what weights show."""
    _check_preprocessor(folder)
    config = WhisperConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = WhisperForAudioClassification(config)
        if architecture == _WITH_HEAD:
            check_names(classes)
            names = check_head(model, classes)
        else:
            check_fresh(architecture, classes, vectors=False)
            _fresh_head(model, classes)
            names = tuple(classes)
        return AudioClassifier(model, names, cut_window(model, seconds))


def cut_window(model: Any, seconds: float = 0) -> AudioInput:
    """Let the model hear the first so many seconds, 0 = all that it knows; returns what it hears then.

    For stock PEFT: the base that an adapter is loaded into is cut in the same way. Raises UsageError.
    """
    config, table = model.config, model.encoder.embed_positions
    known = int(config.max_source_positions)
    wanted = seconds * _POSITIONS_A_SECOND if seconds else known
    positions = round(wanted) if math.isfinite(wanted) else 0
    if not 1 <= positions <= known or not math.isclose(positions, wanted, abs_tol=1e-6):
        raise UsageError(
            "the model cannot hear a window of this length",
            field="seconds",
            value=seconds,
            hint=f"From 0.02 to {known / _POSITIONS_A_SECOND:g} s, in steps of 0.02 s",
        )
    if positions < known:
        rows = table.weight.detach()[:positions].clone()
        model.encoder.embed_positions = nn.Embedding.from_pretrained(rows, freeze=True)
        config.max_source_positions = positions
    config.max_position_embeddings = positions  # where families of texts have it
    return AudioInput(mels=int(config.num_mel_bins), samples=positions * POSITION_SAMPLES)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers warns of a head that is not in the checkpoint: it is known, and a fresh one comes next."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _fresh_head(model: Any, classes: Sequence[str]) -> None:
    """Matrices of the size of their inputs, so that logits begin at the size of the hidden states; biases zero."""
    config = model.config
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    model.num_labels = len(classes)
    model.classifier = nn.Linear(config.classifier_proj_size, len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for matrix in (model.projector, model.classifier):
            nn.init.normal_(matrix.weight, std=1 / math.sqrt(matrix.in_features))
            nn.init.zeros_(matrix.bias)


def _check_preprocessor(folder: Path) -> None:
    """Raise UnsupportedError where the folder says that its features are made in another way than devices make them."""
    path = folder / _PREPROCESSOR
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{_PREPROCESSOR} is not JSON", field="model", value=str(path)) from error
    known = {
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP_SAMPLES,
        "n_fft": FFT_SAMPLES,
        "dither": 0.0,
        "do_normalize": False,
    }
    for key, value in known.items():
        if said.get(key, value) != value:
            raise UnsupportedError(
                "features made in this way are not handled",
                field=key,
                value=said[key],
                hint=f"Handled: {value}",
            )
