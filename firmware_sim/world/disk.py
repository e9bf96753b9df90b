"""A device's disk: what is durable, and what is written but would be lost with the power.

`write` puts a file into the pending layer, `sync` makes it durable, `lose` is a power failure. The state file is
replaced as a whole and has a check-sum (edge_agent.journal): a write that tears leaves the state before it. The files
of a round and the carry go the ways that edge_agent.round_files gives them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.effects import AgentState
from fedge.errors import StorageError
from fedge.frames import ChunkHeader, chunk_span, encode_frame

Vector = NDArray[np.float32]
FRESH: Final = AgentState()


class RoundFiles:
    """What lies under one transcript."""

    __slots__ = ("delta", "report", "sent", "transcript")

    def __init__(self, transcript: bytes) -> None:
        self.transcript = transcript
        self.delta: Vector | None = None
        self.sent: Vector | None = None
        self.report = b""


class Disk:
    """State, round files, carry, bundle and newest adapter of one device."""

    __slots__ = ("_pending", "adapter", "blob", "bundle", "bundle_bytes", "carry", "full", "round", "state")

    def __init__(self) -> None:
        self.state = FRESH
        self.round: RoundFiles | None = None
        self.carry: Vector | None = None
        self.bundle = self.blob = b""  # hashes of what is here, whole and verified
        self.adapter = b""  # the newest, shared by all who have it; the hub may have dropped it long ago
        self.adapter = b""  # the bytes under `blob`
        self.bundle_bytes = 0  # of a bundle that is on its way
        self.full = False
        self._pending: RoundFiles | None = None

    def save(self, state: AgentState) -> None:
        """The state, durable when this returns. StorageError while the disk is full; the old state then stands."""
        self._require_room()
        self.state = state

    # ------------------------------------------------------------ a round's files
    def write_delta(self, transcript: bytes, delta: Vector) -> None:
        """Pending until `sync`."""
        self._require_room()
        self._pending = RoundFiles(transcript)
        self._pending.delta = delta

    def write_report(self, transcript: bytes, sent: Vector, report: bytes) -> None:
        """What the report carries, and the report; pending until `sync`."""
        self._require_room()
        self._pending = RoundFiles(transcript)
        self._pending.delta = self.delta(transcript)
        self._pending.sent, self._pending.report = sent, report

    def sync(self) -> None:
        """What was written is durable."""
        if self._pending is not None:
            self.round, self._pending = self._pending, None

    def lose(self) -> None:
        """The power fails: what was not synced is gone."""
        self._pending = None

    def delta(self, transcript: bytes) -> Vector | None:
        """The delta of this round, when it is here."""
        files = self.round
        return files.delta if files is not None and files.transcript == transcript else None

    def frame(self, transcript: bytes, digest: bytes, index: int) -> bytes:
        """Chunk `index` of the report as a frame. StorageError when there is no such report."""
        files = self.round
        if files is None or files.transcript != transcript or not files.report:
            raise StorageError("a round's report is gone", field="transcript", value=transcript.hex())
        start, length = chunk_span(len(files.report), index)
        return encode_frame(ChunkHeader(transcript, digest, index), files.report[start : start + length])

    def keep_carry(self, transcript: bytes) -> None:
        """The update was not opened: what was to be sent becomes the carry; a delta only where there is none."""
        files = self.round
        if files is None or files.transcript != transcript:
            return
        if files.sent is not None:
            self.carry = files.sent
        elif files.delta is not None and self.carry is None:
            self.carry = files.delta
        self.round = None

    def drop_carry(self, transcript: bytes) -> None:
        """The update was opened: nothing of it is kept."""
        self.carry = None
        if self.round is not None and self.round.transcript == transcript:
            self.round = None

    def sweep(self, transcript: bytes) -> None:
        """At a start: only the running round's files stay."""
        if self.round is not None and self.round.transcript != transcript:
            self.round = None

    def _require_room(self) -> None:
        if self.full:
            raise StorageError("no space left on the device", field="disk")
