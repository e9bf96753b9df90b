"""How sound becomes the numbers that a bundle's first graph reads: said in its manifest, followed by its device.

The only way that is known here is Whisper's (Radford et al. 2022, arXiv 2212.04356): sound of 16 kHz, cut or filled
with silence to one window, the power of a short-time Fourier transform through triangular mel filters, its decimal
logarithm no more than 8 below the loudest, moved and scaled by 4. The rule: whatever else a manifest says is refused
by name, for features that are a little different give a model that is wrong and does not say so.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fedge.errors import IntegrityError, UnsupportedError

LOG_MEL: Final = "whisper-log-mel"
SAMPLE_RATE: Final = 16_000  # Hz
FFT_SAMPLES: Final = 400  # 25 ms
HOP_SAMPLES: Final = 160  # 10 ms
FRAMES_A_POSITION: Final = 2  # the second convolution takes two steps at a time
POSITION_SAMPLES: Final = HOP_SAMPLES * FRAMES_A_POSITION  # 20 ms
MELS_MAX: Final = 256  # Whisper has 80 or 128; there are 201 frequencies to make them of
SECONDS_MAX: Final = 30  # Whisper's own window


class AudioInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The window of a bundle that hears: `samples` of it at `sample_rate` Hz become `mels` x `frames` numbers."""

    mels: int
    samples: int
    kind: str = LOG_MEL
    sample_rate: int = SAMPLE_RATE
    n_fft: int = FFT_SAMPLES
    hop: int = HOP_SAMPLES

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.samples / self.sample_rate

    @property
    def frames(self) -> int:
        """Columns of the features."""
        return self.samples // self.hop

    @property
    def positions(self) -> int:
        """Positions of the model's layers."""
        return self.frames // FRAMES_A_POSITION


def check_audio(audio: AudioInput, positions_max: int) -> None:
    """Raises UnsupportedError for features that are not made here, IntegrityError for sizes that cannot be."""
    known = {"kind": LOG_MEL, "sample_rate": SAMPLE_RATE, "n_fft": FFT_SAMPLES, "hop": HOP_SAMPLES}
    for field, value in known.items():
        found = getattr(audio, field)
        if found != value:
            raise UnsupportedError(
                "this way to make features of sound is not known here",
                field=f"audio.{field}",
                value=found,
                hint=f"Known is {value}; a newer fedge may know more",
            )
    if not 1 <= audio.mels <= MELS_MAX:
        raise IntegrityError("number of mel filters is out of range", field="audio.mels", value=audio.mels)
    if not 0 < audio.samples <= SECONDS_MAX * SAMPLE_RATE or audio.samples % POSITION_SAMPLES:
        raise IntegrityError("window is out of range", field="audio.samples", value=audio.samples)
    if audio.positions != positions_max:
        raise IntegrityError(
            "window and positions do not belong together", field="positions_max", value=positions_max
        )
