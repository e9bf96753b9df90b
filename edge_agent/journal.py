"""What an agent must still know after the power was cut: one file, replaced as a whole.

The rule: apply, save, then speak. `save` returns only when the new state is on the disk, and a reader sees the old
state or the new one. A state that cannot be read is never replaced by a fresh one: counters that go back would let
a round be masked twice.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.effects import AgentState
from fedge.errors import IntegrityError, NoInputError
from fedge.io import durable

_MAGIC: Final = b"fedge state 1\n"
_REJOIN: Final = (
    "Restore it from a backup that is not older, or join the fleet again with a new token and home"
)


class Journal:
    """The saved state in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = b""

    def load(self) -> AgentState:
        """The state saved last. NoInputError when there never was one, IntegrityError when it is damaged."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError as error:
            raise NoInputError(f"no saved state in {self._path}", hint=_REJOIN) from error
        except OSError as error:
            raise durable.storage_error(error, self._path, verb="read") from error
        magic, digest, body = data[: len(_MAGIC)], data[len(_MAGIC) :][:32], data[len(_MAGIC) + 32 :]
        if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
            raise IntegrityError(
                "the saved state is damaged", field="path", value=str(self._path), hint=_REJOIN
            )
        try:
            state = msgspec.msgpack.decode(body, type=AgentState)
        except msgspec.MsgspecError as error:
            raise IntegrityError(
                f"the saved state is of another version: {error}",
                field="path",
                value=str(self._path),
                hint="Install the version of fedge that wrote it, or a newer one",
            ) from error
        self._saved = data
        return state

    def save(self, state: AgentState) -> None:
        """Make `state` durable. StorageError when the disk refuses; the old state then still stands."""
        body = msgspec.msgpack.encode(state)
        data = _MAGIC + hashlib.sha256(body).digest() + body
        if data != self._saved:
            durable.write_bytes(self._path, data, secret=True)
            self._saved = data
