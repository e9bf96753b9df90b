"""A round's files on the device: delta, what was sent, the finished report, and the carry between rounds.

Every step may be repeated after a power cut: what is already done stays done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_agent.home import Home
from fedge.errors import StorageError
from fedge.frames import ChunkHeader, chunk_span, encode_frame
from fedge.io import durable


@dataclass(frozen=True, slots=True)
class Rounds:
    """The files of rounds in one home."""

    home: Home

    def frame(self, transcript: bytes, digest: bytes, index: int) -> bytes:
        """Chunk `index` of the report on disk as a frame. StorageError when it cannot be read."""
        path = self.home.report(transcript)
        try:
            with path.open("rb") as stream:
                start, length = chunk_span(os.fstat(stream.fileno()).st_size, index)
                stream.seek(start)
                body = stream.read(length)
        except OSError as error:
            raise durable.storage_error(error, path, verb="read") from error
        return encode_frame(ChunkHeader(transcript, digest, index), body)

    def carry(self) -> str:
        """The path of the carry, or nothing when there is none."""
        return str(self.home.carry) if self.home.carry.exists() else ""

    def keep_carry(self, transcript: bytes) -> None:
        """The update was not opened. What was to be sent includes the old carry and takes its place.

        A delta that was never sealed becomes the carry only where there is none, because it does not include it.
        """
        sent, delta = self.home.sent(transcript), self.home.delta(transcript)
        if sent.exists():
            self._rename(sent, self.home.carry)
        elif delta.exists() and not self.home.carry.exists():
            self._rename(delta, self.home.carry)
        self._remove(delta, self.home.report(transcript))

    def drop_carry(self, transcript: bytes) -> None:
        """The update was opened: nothing of it is kept."""
        home = self.home
        self._remove(home.carry, home.sent(transcript), home.delta(transcript), home.report(transcript))

    def sweep(self, transcript: bytes) -> None:
        """Remove what belongs to no running round, but for `transcript`'s own files."""
        durable.sweep(self.home.rounds)
        keep = transcript.hex() or "-"
        self._remove(*(path for path in self.home.rounds.iterdir() if not path.name.startswith(keep)))

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.replace(target)
            durable.sync_folder(target.parent)
        except OSError as error:
            raise durable.storage_error(error, target) from error

    def _remove(self, *paths: Path) -> None:
        gone = False
        for path in paths:
            try:
                path.unlink()
                gone = True
            except FileNotFoundError:
                continue
            except OSError as error:
                raise durable.storage_error(error, path, verb="remove") from error
        if gone:
            self._sync()

    def _sync(self) -> None:
        try:
            durable.sync_folder(self.home.rounds)
            durable.sync_folder(self.home.folder)
        except OSError as error:
            raise StorageError(f"cannot make removals durable: {error.strerror}") from error
