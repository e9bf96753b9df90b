"""Recordings to rows: the features of sound that a model hears, and its class.

Every file is read once before anything is learnt, so that a bad one is told in time. Features that fit a fixed room
stay in memory; those of further recordings are made again whenever a batch has them, so that a device's memory does
not depend on how much was recorded. Paths lead nowhere but into the folder of the list that names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.audio_mel import log_mel
from edge_agent.dataset.audio_wave import read_wave
from edge_agent.dataset.choices import Reading
from edge_agent.dataset.reading import Tally, read_records
from edge_agent.dataset.record import Record, Recording
from edge_agent.dataset.row import Row, Seen
from edge_agent.dataset.rows import Dataset, class_of, placed
from edge_agent.jobs import Counts
from fedge.audio import AudioInput
from fedge.errors import DataError

Floats = NDArray[np.float32]

KEPT_BYTES_MAX: Final = 32_000_000  # a thousand recordings of a second, or 33 of half a minute
_NO_IDS: Final = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioRow(Row):
    """A recording of class `label`. It has no tokens; `kept` are its features where they stay in memory."""

    path: Path
    audio: AudioInput
    kept: Floats | None = None

    @property
    def tokens(self) -> int:
        """How many positions of the model it takes."""
        return self.audio.positions

    def features(self) -> Floats:
        """Float32 [mels, frames]. Raises DataError or StorageError when the file is no longer as it was."""
        if self.kept is not None:
            return self.kept
        return log_mel(read_wave(self.path, self.audio.samples, self.audio.sample_rate).samples, self.audio)


def load_recordings(
    path: Path,
    audio: AudioInput,
    classes: Sequence[str],
    *,
    reading: Reading | None = None,
    tally: Tally | None = None,
    kept_bytes_max: int = KEPT_BYTES_MAX,
) -> Dataset:
    """Rows of a folder with a folder for each class, or of a list of files and labels; `tally` is told what was read.

    What is longer than the window loses its end; what is shorter is filled up with silence; what has no sound at all
    is left out. Raises DataError for a bad file, path or label and when no row is left, and what `read_records` raises.
    """
    how, tally = reading or Reading(), tally if tally is not None else Tally()
    root = how.root(path).resolve()
    maker = _Maker(root, audio, classes, kept_bytes_max)
    rows: list[Row] = []
    for record in read_records(path, how, tally):
        try:
            row = maker.row(record)
        except DataError as error:
            told = not record.line or error.what.startswith(str(root))  # by the path of the recording
            tally.refused(error if told else placed(error, path, record.line), how)
            continue
        if row is not None:
            rows.append(row)
    counts = maker.counts(tally)
    if not rows:
        raise DataError(
            f"{path}: no usable recording",
            field="examples",
            value=msgspec.to_builtins(counts),
            hint='Give a folder with a folder for each class, or a list of {"audio": "PATH.wav", "label": …}',
        )
    return Dataset(tuple(rows), counts)


class _Maker:
    """Makes the row of one recording after the other, and counts what becomes of them."""

    def __init__(self, root: Path, audio: AudioInput, classes: Sequence[str], room: int) -> None:
        self._root, self._audio, self._classes, self._room = root, audio, classes, room
        self._seen = Seen()

    def row(self, record: Record) -> AudioRow | None:
        """The row; None for a recording without any sound. Raises DataError, StorageError."""
        if not isinstance(record, Recording):
            raise DataError(
                "this bundle hears recordings, and reads no text",
                field="audio",
                hint='It learns from {"audio": "PATH.wav", "label": …}, or from a folder with a folder for each class',
            )
        number, path = class_of(record.label, self._classes), self._inside(record.audio)
        sound = read_wave(path, self._audio.samples, self._audio.sample_rate)
        self._seen.examples += 1
        if not len(sound.samples):
            self._seen.empty += 1
            return None
        self._seen.kept += 1
        self._seen.shortened += sound.more
        size = 4 * self._audio.mels * self._audio.frames
        kept = log_mel(sound.samples, self._audio) if size <= self._room else None
        self._room -= size if kept is not None else 0
        return AudioRow(
            ids=_NO_IDS,
            prompt_tokens=0,
            conversation=record.conversation,
            label=number,
            path=path,
            audio=self._audio,
            kept=kept,
        )

    def counts(self, tally: Tally) -> Counts:
        """What became of everything so far."""
        seen = self._seen
        return Counts(
            records=tally.records,
            examples=seen.examples,
            kept=seen.kept,
            empty=seen.empty,
            shortened=seen.shortened,
            bad=tally.bad,
        )

    def _inside(self, given: str) -> Path:
        """The file of that path, which lies in the root. Raises DataError."""
        try:
            found = (self._root / given).resolve()
        except (ValueError, RuntimeError) as error:  # a NUL, a ring of links
            raise DataError("path of a recording is none", field="audio", hint=str(error)) from error
        if not found.is_relative_to(self._root):
            raise DataError(
                "path of a recording leads out of the folder of its list",
                field="audio",
                value=given,
                hint=f"Paths begin in {self._root}, and stay there",
            )
        return found
