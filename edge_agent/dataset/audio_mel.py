"""Log-mel features as Whisper has them, in numpy alone: equal to transformers' WhisperFeatureExtractor within 1e-5.

Whisper's front end (Radford et al. 2022, arXiv 2212.04356, 2.2): a Hann window of 25 ms every 10 ms, the ends
reflected, the last frame left out; mel scale and area-normalised triangles of Slaney's Auditory Toolbox (1998) from 0
to 8 kHz; log10 of the power, at most 8 below the loudest of the window, plus 4, over 4. Computed in double precision.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge.audio import AudioInput

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_LINEAR_BELOW_HZ: Final = 1_000.0  # Slaney's scale is linear below and logarithmic above
_MELS_A_HZ: Final = 3 / 200
_LINEAR_MELS: Final = _LINEAR_BELOW_HZ * _MELS_A_HZ
_LOG_STEP: Final = np.log(6.4) / 27  # 27 mels from 1,000 to 6,400 Hz
_POWER_MIN: Final = 1e-10
_RANGE: Final = 8.0  # decades below the loudest
_SHIFT: Final = 4.0


def log_mel(sound: Floats, audio: AudioInput) -> Floats:
    """Features [mels, frames] of at most `audio.samples` samples; what is missing to the window is silence."""
    whole = np.zeros(audio.samples, np.float64)
    whole[: len(sound)] = sound[: audio.samples]
    half = audio.n_fft // 2
    padded = np.pad(whole, half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, audio.n_fft)[:: audio.hop][: audio.frames]
    spectrum = np.fft.rfft(frames * _hann(audio.n_fft), axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    found = np.log10(np.maximum(power @ mel_filters(audio.mels, audio.n_fft, audio.sample_rate), _POWER_MIN))
    found = np.maximum(found, found.max() - _RANGE)
    return np.ascontiguousarray(((found + _SHIFT) / _SHIFT).T, np.float32)


@lru_cache(maxsize=2)
def mel_filters(mels: int, n_fft: int, sample_rate: int) -> Doubles:
    """Triangles [n_fft / 2 + 1, mels] between points that are evenly spaced in mels, each of area one."""
    top = _mel_of(sample_rate / 2)
    points = _hertz_of(np.linspace(0.0, top, mels + 2))
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    widths = np.diff(points)
    rising = (bins[:, None] - points[None, :-2]) / widths[None, :-1]
    falling = (points[None, 2:] - bins[:, None]) / widths[None, 1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: Doubles = triangles * (2.0 / (points[2:] - points[:-2]))
    filters.setflags(write=False)
    return filters


@lru_cache(maxsize=2)
def _hann(samples: int) -> Doubles:
    """The periodic window."""
    window: Doubles = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(samples) / samples)
    window.setflags(write=False)
    return window


def _mel_of(hertz: float) -> float:
    if hertz < _LINEAR_BELOW_HZ:
        return hertz * _MELS_A_HZ
    return float(_LINEAR_MELS + np.log(hertz / _LINEAR_BELOW_HZ) / _LOG_STEP)


def _hertz_of(mels: Doubles) -> Doubles:
    above = _LINEAR_BELOW_HZ * np.exp(_LOG_STEP * (mels - _LINEAR_MELS))
    found: Doubles = np.where(mels < _LINEAR_MELS, mels / _MELS_A_HZ, above)
    return found
