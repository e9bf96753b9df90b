"""The gates of a classifier of sound: those of any classifier, on sounds instead of texts.

Features come from transformers' own code here, never from the device's: a gate must not trust what it protects.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from fedge.audio import AudioInput
from fedge.lora import LoraConfig
from quantize.classifier_gates import ClassifierExam, LabelledBatch, logits_of
from quantize.formats import WeightFormat
from quantize.runner import Array
from quantize.source import Source

_CUT_ROWS: Final = (1, 3)
_RANGE, _SHIFT = 8.0, 4.0


@dataclass(frozen=True, slots=True)
class AudioExam(ClassifierExam):
    """The exam of a model that hears. All its batches have the one length that it takes."""

    @classmethod
    def of(cls, source: Source, *, exact: bool, fmt: WeightFormat, lora: LoraConfig) -> AudioExam:
        """With a few sounds: a tone, a glide, noise, and clicks in silence."""
        assert source.audio is not None, "a model of texts has another exam"
        features = np.stack([features_of(sound, source.audio) for sound in sounds(source.audio)])
        labels = [row % len(source.classes) for row in range(len(features))]
        batch = _batch(features, labels, source.audio)
        return cls(source, lora, fmt, exact, batch, logits_of(source.model, batch))

    def _cut_config(self, layers: Sequence[int]) -> Any:
        config = copy.deepcopy(self.source.model.config)
        config.encoder_layers = config.num_hidden_layers = len(layers)
        return config

    def _cut_batches(self, random: np.random.Generator, pad: int) -> Iterator[LabelledBatch]:
        audio = self.source.audio
        assert audio is not None, "a model of texts has another exam"
        for count in _CUT_ROWS:
            features = random.standard_normal((count, audio.mels, audio.frames)).astype(np.float32)
            yield _batch(features, random.integers(0, len(self.source.classes), count).tolist(), audio)

    def _longest(self) -> LabelledBatch:
        return self.batch


def sounds(audio: AudioInput) -> list[Array]:
    """Four sounds of a window's length, from -1 to 1."""
    times = np.arange(audio.samples) / audio.sample_rate
    draw = np.random.default_rng(0)
    clicks = np.zeros(audio.samples)
    clicks[:: audio.sample_rate // 8] = 1.0
    return [
        0.5 * np.sin(2 * np.pi * 440.0 * times),
        0.3 * np.sin(2 * np.pi * (200.0 + 900.0 * times) * times),
        0.1 * draw.standard_normal(audio.samples),
        clicks,
    ]


def features_of(sound: Array, audio: AudioInput) -> Array:
    """Log-mel features float32 [mels, frames] of a window, as WhisperFeatureExtractor makes them."""
    filters = mel_filter_bank(
        1 + audio.n_fft // 2, audio.mels, 0.0, audio.sample_rate / 2, audio.sample_rate, "slaney", "slaney"
    )
    logs = spectrogram(
        sound,
        window_function(audio.n_fft, "hann"),
        frame_length=audio.n_fft,
        hop_length=audio.hop,
        power=2.0,
        mel_filters=filters,
        log_mel="log10",
    )[:, : audio.frames]
    found: Array = ((np.maximum(logs, logs.max() - _RANGE) + _SHIFT) / _SHIFT).astype(np.float32)
    return found


def _batch(features: Array, labels: Sequence[int], audio: AudioInput) -> LabelledBatch:
    mask = np.ones((len(features), audio.positions), np.int64)
    return LabelledBatch(features, mask, np.array(labels, np.int64))
