"""A small random Whisper that hears 0.4 seconds of 16 mels, and recordings of tones to teach it."""

from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any, Final

import numpy as np

CLASSES: Final = ("low", "middle", "high")
HERTZ: Final = {"low": 300.0, "middle": 1_200.0, "high": 3_600.0}
SECONDS: Final = 0.2  # of the 0.4 that the model knows: its table of positions is cut
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 64,
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "max_source_positions": 20,
    "max_target_positions": 16,
    "classifier_proj_size": 24,
    "init_std": 0.15,  # at 0.02 attention is all but uniform, and a mistake in it would not show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "begin_suppress_tokens": None,
}


def write_model(folder: Path, name: str = "WhisperForAudioClassification") -> Path:
    """A model folder of random weights, by its class in transformers; biases and norms are not left at 0 and 1."""
    import torch
    import transformers

    names = dict(enumerate(CLASSES))
    labels = {"id2label": names, "label2id": {label: index for index, label in names.items()}}
    head = labels if name == "WhisperForAudioClassification" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(transformers.WhisperConfig(**_SIZES, **head))
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                torch.nn.init.normal_(value, std=0.1)
            elif value.dim() == 1:
                torch.nn.init.normal_(value, mean=1.0, std=0.1)
            elif "embed_positions" in parameter:
                torch.nn.init.normal_(value, std=0.3)  # no sinusoids: a table that is cut wrongly shows
    model.save_pretrained(folder)
    return folder


def tone(hertz: float, seconds: float, rate: int = 16_000, *, seed: int = 0) -> np.ndarray:
    """A tone with a little noise, float64 from -1 to 1."""
    draw = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    phase = draw.uniform(0, 2 * np.pi)
    return 0.4 * np.sin(2 * np.pi * hertz * times + phase) + 0.01 * draw.standard_normal(len(times))


def write_wave(path: Path, samples: np.ndarray, rate: int = 16_000, *, width: int = 2) -> Path:
    """`samples` [n] or [n, channels] from -1 to 1 as PCM of `width` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    top = 2 ** (8 * width - 1)
    values = np.clip(np.rint(samples.reshape(-1) * top), -top, top - 1).astype(np.int64)
    if width == 1:
        data = (values + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(struct.pack("<q", value)[:width] for value in values.tolist())
    with wave.open(str(path), "wb") as target:
        target.setnchannels(channels)
        target.setsampwidth(width)
        target.setframerate(rate)
        target.writeframes(data)
    return path


def write_recordings(folder: Path, each: int, *, seconds: float = SECONDS) -> Path:
    """A folder with a folder for each class, and `each` tones in it."""
    for label, hertz in HERTZ.items():
        for number in range(each):
            write_wave(
                folder / label / f"{number}.wav", tone(hertz * (1 + 0.01 * number), seconds, seed=number)
            )
    return folder
