"""The rows of the simulated hub's database, as they are after its last transaction.

A small world keeps them all, with the ledger, for those who look. A large one keeps no ledger, and the OPENs of rounds
that have ended in a file, where a real hub has them, too: they would be a seventh of its memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, Final

import msgspec

from hub.effects import BlocRow, CampaignRow, DeviceRow, LedgerEntry, RoundRow, Row, Save

SMALL_DEVICES_MAX: Final = 2_000
# What an envelope takes in the file is a multiple of this, so that the next one fits.
_SLOT_BYTES: Final = 1_024

Key = tuple[str, str]  # campaign, bloc


class Store:
    """What a hub that starts reads. `ledger` is None in a large world."""

    def __init__(self, *, small: bool) -> None:
        self.campaigns: dict[str, CampaignRow] = {}
        self.blocs: dict[Key, BlocRow] = {}
        self.rounds: dict[Key, RoundRow] = {}  # of each bloc the newest, which is all that a hub reads
        self.devices: dict[str, DeviceRow] = {}
        self.ledger: list[LedgerEntry] | None = [] if small else None
        self._envelopes = None if small else _Envelopes()
        self._keep: dict[type, Callable[[Any], None]] = {
            CampaignRow: lambda row: self.campaigns.__setitem__(row.id, row),
            BlocRow: lambda row: self.blocs.__setitem__((row.campaign, row.id), row),
            RoundRow: self._keep_round,
            DeviceRow: lambda row: self.devices.__setitem__(row.id, row),
            LedgerEntry: lambda row: None if self.ledger is None else self.ledger.append(row),
        }

    def commit(self, saves: list[Save]) -> None:
        """One transaction."""
        for save in saves:
            self._keep[type(save.row)](save.row)

    def _keep_round(self, row: RoundRow) -> None:
        key = row.campaign, row.bloc
        if self._envelopes is not None and row.state != "open" and row.envelope:
            self._envelopes.write(key, row.envelope)
            row = msgspec.structs.replace(row, envelope=b"")
        self.rounds[key] = row

    def rows(self) -> list[Row]:
        """All that a hub reads when it starts."""
        rounds = [
            msgspec.structs.replace(row, envelope=self._envelopes.read(key))
            if self._envelopes is not None and not row.envelope
            else row
            for key, row in self.rounds.items()
        ]
        return [*self.campaigns.values(), *self.blocs.values(), *rounds, *self.devices.values()]


class _Envelopes:
    """One signed OPEN for each bloc, in a file that goes with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the world
        self._places: dict[Key, tuple[int, int, int]] = {}  # where it begins, its bytes, its room
        self._end = 0

    def write(self, key: Key, envelope: bytes) -> None:
        start, _, room = self._places.get(key, (0, 0, 0))
        if len(envelope) > room:
            start, room = self._end, -(-len(envelope) // _SLOT_BYTES) * _SLOT_BYTES
            self._end += room
        self._places[key] = start, len(envelope), room
        self._file.seek(start)
        self._file.write(envelope)

    def read(self, key: Key) -> bytes:
        start, size, _ = self._places[key]
        self._file.seek(start)
        return self._file.read(size)
