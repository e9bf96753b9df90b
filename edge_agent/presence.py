"""When this device was on, as its own agent saw it: one bit for every ten minutes of the last seven days.

The file has 256 digits and is written twice an hour, durably; what a power cut takes with it is at most half an hour
of presence. From it follow the share of a week that the device was on, and since when it has been on without a gap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedge.errors import StorageError
from fedge.io import durable

SLOT_SECONDS: Final = 600
SLOTS: Final = 7 * 86_400 // SLOT_SECONDS
_ALL: Final = (1 << SLOTS) - 1
_SLOTS_PER_WRITE: Final = 3
_YOUNG_SLOTS: Final = 86_400 // SLOT_SECONDS  # a record of less than a day says little


class History:
    """The bits in one integer: bit 0 is the newest slot. Times are Unix seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slot, self._bits, self._first = _load(path)
        self._written = self._slot

    def note(self, now: float) -> None:
        """The agent is up now. A clock that went back changes nothing; a full disk only delays the record."""
        slot = int(now) // SLOT_SECONDS
        if slot < self._slot:
            return
        self._first = self._first or slot
        self._bits = (self._bits << min(slot - self._slot, SLOTS) | 1) & _ALL
        self._slot = slot
        if slot - self._written >= _SLOTS_PER_WRITE:
            self._write()

    @property
    def share_on(self) -> float:
        """Of the last 7 days, 0 to 1; time before the first record counts as off."""
        return self._bits.bit_count() / SLOTS

    @property
    def is_young(self) -> bool:
        """Whether the record began less than a day ago."""
        return self._slot - self._first < _YOUNG_SLOTS

    @property
    def up_seconds(self) -> float:
        """For how long the device has been on without a gap; a restart within ten minutes is none."""
        off = ~self._bits & _ALL
        newest_off = (off & -off).bit_length() - 1 if off else SLOTS
        return float(max(0, newest_off - 1) * SLOT_SECONDS)

    def _write(self) -> None:
        try:
            durable.write_bytes(self._path, f"{self._first} {self._slot} {self._bits:x}\n".encode())
        except StorageError:
            return
        self._written = self._slot


def _load(path: Path) -> tuple[int, int, int]:
    """Newest slot, bits, first slot; nothing when there is no record or it cannot be read."""
    try:
        first, slot, bits = path.read_text("ascii").split()
        found = int(slot), int(bits, 16), int(first)
    except (OSError, ValueError):
        return 0, 0, 0
    return found if 0 <= found[2] <= found[0] and 0 <= found[1] <= _ALL else (0, 0, 0)
