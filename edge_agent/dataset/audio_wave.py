"""WAV files as people record them, to one channel of floats: only as much of a file is read as the model hears.

PCM of 8, 16, 24 and 32 bits, one channel or two, 4 to 192 kHz, in the plain form or in WAVE_FORMAT_EXTENSIBLE.
Whatever is wrong with a file is told with its name, before anything is learnt; memory does not depend on how long the
file is.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.audio_resample import WEIGHTS_MAX, reach_of, resample, weights_of
from fedge.errors import DataError, StorageError

Floats = NDArray[np.float32]

RATES: Final = range(4_000, 192_001)  # Hz
_CHANNELS_MAX: Final = 2
_WIDTHS: Final = (1, 2, 3, 4)  # bytes
_BLOCK_FRAMES: Final = 65_536
_EXTENSIBLE: Final = b"\xfe\xff"  # the format's tag: what the samples are comes later, as a tag and this
_WITH_A_TAG: Final = bytes.fromhex("000000001000800000aa00389b71")
_TAG_AT, _SUBTAG_AT, _FMT_BYTES = 8, 32, 48  # from where the chunk "fmt " begins
_HINT: Final = "Save it as PCM: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le NEW.wav"


@dataclass(frozen=True, slots=True)
class Sound:
    """The beginning of a recording: `samples` (n,) from -1 to 1; `more` when it goes on after them."""

    samples: Floats
    more: bool


def read_wave(path: Path, samples_max: int, rate: int) -> Sound:
    """At most `samples_max` samples at `rate` Hz, both channels as their mean.

    Raises DataError with the file and what is wrong with it, StorageError when it cannot be read.
    """
    try:
        with path.open("rb") as stream, wave.open(_plain(stream)) as source:
            _check(path, source, rate)
            own = source.getframerate()
            wanted = ceil(samples_max * own / rate) + reach_of(own, rate)
            total = source.getnframes()
            sound = _frames(path, source, min(wanted, total))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path} is no file", field="audio", value=path.name) from error
    except (wave.Error, EOFError) as error:
        raise _bad(path, str(error) or "it ends within its header") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", field="audio", value=str(path)) from error
    more = total * rate > samples_max * own
    return Sound(resample(sound, own, rate)[:samples_max], more)


class _Retagged(io.RawIOBase):
    """A file with other bytes at one place. Not for writing."""

    def __init__(self, stream: BinaryIO, at: int, other: bytes) -> None:
        self._stream, self._at, self._other = stream, at, other

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # what io.BufferedReader gives
        start = self._stream.tell()
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        for place, byte in enumerate(self._other, self._at - start):
            if 0 <= place < len(data):
                buffer[place] = byte
        return len(data)


def _plain(stream: BinaryIO) -> BinaryIO:
    """The file; one in WAVE_FORMAT_EXTENSIBLE with the tag of what it extends, as `wave` of Python 3.11 knows it."""
    head = stream.read(12)
    at = stream.tell()
    while len(chunk := stream.read(8)) == 8 and chunk[:4] not in (b"fmt ", b"data"):
        at = stream.seek((int.from_bytes(chunk[4:], "little") + 1) & ~1, io.SEEK_CUR)
    chunk += stream.read(_FMT_BYTES - 8)
    stream.seek(0)
    tag = chunk[_SUBTAG_AT : _SUBTAG_AT + 2]
    extended = chunk[_TAG_AT : _TAG_AT + 2] == _EXTENSIBLE and chunk[_SUBTAG_AT + 2 :] == _WITH_A_TAG
    if head[:4] != b"RIFF" or chunk[:4] != b"fmt " or not extended:
        return stream
    return io.BufferedReader(_Retagged(stream, at + _TAG_AT, tag))


def _check(path: Path, source: wave.Wave_read, wanted: int) -> None:
    channels, width, rate = source.getnchannels(), source.getsampwidth(), source.getframerate()
    if channels > _CHANNELS_MAX:
        raise _bad(path, f"it has {channels} channels; one or two are handled")
    if width not in _WIDTHS:
        raise _bad(path, f"its samples have {8 * width} bits; 8, 16, 24 and 32 are handled")
    if rate not in RATES or weights_of(rate, wanted) > WEIGHTS_MAX:
        raise _bad(
            path, f"its rate is {rate} Hz; the usual ones of {RATES.start} to {RATES.stop - 1} are handled"
        )


def _frames(path: Path, source: wave.Wave_read, count: int) -> Floats:
    """The first `count` frames as one channel."""
    channels, width = source.getnchannels(), source.getsampwidth()
    found = np.empty(count, np.float32)
    at = 0
    while at < count:
        data = source.readframes(min(_BLOCK_FRAMES, count - at))
        whole = len(data) // (channels * width)
        if not whole:
            raise _bad(
                path, f"it is cut off: its header promises {source.getnframes():,} frames, {at:,} are there"
            )
        values = _values(data[: whole * channels * width], width)
        found[at : at + whole] = values.reshape(whole, channels).mean(axis=1)
        at += whole
    return found


def _values(data: bytes, width: int) -> Floats:
    """Whole numbers of `width` bytes, little-endian, from -1 to 1; those of one byte have no sign."""
    if width == 1:
        values: Floats = np.frombuffer(data, np.uint8).astype(np.float32)
        values -= 128
    elif width == 3:  # as the upper three bytes of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = wide.view("<i4")[:, 0].astype(np.float32)
    else:
        values = np.frombuffer(data, f"<i{width}").astype(np.float32)
    values /= 2 ** (7 if width == 1 else 15 if width == 2 else 31)
    return values


def _bad(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be heard: {reason}", field="audio", value=path.name, hint=_HINT)
