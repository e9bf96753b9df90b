"""Sound to features: Whisper's log-mel as transformers makes it, and other rates brought to 16 kHz."""

from __future__ import annotations

import numpy as np
import pytest
import whispers
from scipy.signal import resample_poly
from transformers import WhisperFeatureExtractor

from edge_agent.dataset.audio_mel import log_mel
from edge_agent.dataset.audio_resample import resample
from fedge.audio import AudioInput


def noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(round(16_000 * seconds))


SOUNDS = {
    "noise": noise(1),
    "too short": noise(0.37),
    "too long": noise(1.6),
    "tone": whispers.tone(440, 1),
    "clipped": np.clip(3 * whispers.tone(200, 1), -1, 1),
    "silence": np.zeros(16_000),
    "nothing": np.zeros(0),
}


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("name", SOUNDS)
def test_features_are_those_of_transformers(name: str, mels: int) -> None:
    """Their numpy path; the path through torch adds in single precision, and is off by 4e-5 itself."""
    sound = SOUNDS[name].astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=1)
    window = np.zeros((1, 16_000), np.float32)
    window[0, : len(sound)] = sound[:16_000]
    expected = extractor._np_extract_fbank_features(window, "cpu")[0]
    found = log_mel(sound, AudioInput(mels=mels, samples=16_000))
    assert found.shape == (mels, 100)
    assert np.abs(found - expected).max() <= 1e-5
    if len(sound):
        public = extractor(sound, sampling_rate=16_000, return_tensors="np").input_features[0]
        assert np.abs(found - public).max() <= (1e-5 if "noise" in name or "too" in name else 2e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_another_rate_keeps_what_is_heard_and_lets_nothing_alias(rate: int) -> None:
    times = np.arange(rate) / rate
    kept = resample(np.sin(2 * np.pi * 1_000 * times).astype(np.float32), rate, 16_000)
    assert len(kept) == 16_000
    inner = slice(400, -400)
    expected = np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000)
    assert np.abs(kept - expected)[inner].max() <= 1e-4
    if rate > 18_000:
        lost = resample(np.sin(2 * np.pi * 9_000 * times).astype(np.float32), rate, 16_000)
        assert np.abs(lost[inner]).max() <= 1e-4  # 80 dB


def test_speech_like_noise_agrees_with_scipy() -> None:
    """Below the passband's end two different filters give the same."""
    rough = np.convolve(np.random.default_rng(1).standard_normal(44_100), np.hanning(40) / 20, "same")
    found = resample(rough.astype(np.float32), 44_100, 16_000)
    expected = resample_poly(rough, 160, 441, window=("kaiser", 12.0))
    assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected)


def test_the_same_rate_changes_nothing() -> None:
    sound = noise(0.1).astype(np.float32)
    assert resample(sound, 16_000, 16_000) is sound
    assert len(resample(sound[:0], 8_000, 16_000)) == 0
