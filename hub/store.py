"""The hub's database: what one event changes is one transaction, committed before anything about it is said.

SQLite in WAL mode with synchronous=FULL: a commit is on the disk when it returns, and readers in other processes
(`Store.open(..., read_only=True)`) never block the hub. Whatever goes wrong with the disk is a StorageError, after
which the process must stop: its memory is ahead of its rows, and a restart reads the rows.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError

from fedge.errors import NoInputError, StorageError, UnsupportedError
from fedge.io.durable import storage_error
from hub import schema
from hub.effects import BlocRow, CampaignRow, DeviceRow, LedgerEntry, RoundRow, Row

FILE: Final = "hub.sqlite"
_BUSY_MS: Final = 30_000  # the command line writes beside the running hub; its transactions take milliseconds


class Store:
    """One open database. Threads may share it; every method is its own transaction."""

    def __init__(self, engine: sa.Engine, path: Path) -> None:
        self._engine, self._path = engine, path

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Store:
        """The database at `path`, created unless `read_only`.

        Raises StorageError, NoInputError (read-only and missing), UnsupportedError (another schema version).
        """
        if read_only and not path.exists():
            raise NoInputError(f"{path} does not exist", hint="`fedge hub init` creates a hub there")
        store = cls(_engine(path, read_only), path)
        if not read_only:
            with store.writing() as connection:
                schema.METADATA.create_all(connection)
                connection.execute(
                    insert(schema.META)
                    .values(name="schema_version", value=str(schema.VERSION))
                    .on_conflict_do_nothing()
                )
        store._check_version()
        return store

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    # ------------------------------------------------------------ the machine's rows
    def transaction(self, rows: Iterable[Row], *, taken: int | None = None) -> None:
        """Saves all rows of one event, or none; with it the inbox entry `taken` that caused the event."""
        with self.writing() as connection:
            for row in rows:
                connection.execute(_upsert(row))
            if taken is not None:
                table = schema.ASKED
                connection.execute(sa.update(table).where(table.c.id == taken).values(taken=True))

    def load(self) -> list[Row]:
        """What a restarted machine needs: campaigns, blocs, rounds, devices. The ledger stays on the disk."""
        rows: list[Row] = []
        with self.reading() as connection:
            for table, kind in _BODIES.items():
                found = connection.execute(sa.select(table.c.body).order_by(*table.primary_key.columns))
                rows += [msgspec.msgpack.decode(body, type=kind) for (body,) in found]
        return rows

    # ------------------------------------------------------------ the operator's inbox
    def ask(self, campaign: CampaignRow) -> int:
        """Leaves a campaign for the hub to start, now if it runs, else when it next does."""
        with self.writing() as connection:
            statement = sa.insert(schema.ASKED).values(body=msgspec.msgpack.encode(campaign))
            number: int = connection.execute(statement.returning(schema.ASKED.c.id)).scalar_one()
            return number

    def asked(self) -> list[tuple[int, CampaignRow]]:
        """The inbox, oldest first."""
        table = schema.ASKED
        with self.reading() as connection:
            found = connection.execute(
                sa.select(table.c.id, table.c.body).where(~table.c.taken).order_by(table.c.id)
            )
            return [(number, msgspec.msgpack.decode(body, type=CampaignRow)) for number, body in found]

    # ------------------------------------------------------------ what people read
    def campaigns(self) -> list[CampaignRow]:
        """All campaigns as last saved."""
        with self.reading() as connection:
            found = connection.execute(sa.select(schema.CAMPAIGNS.c.body).order_by(schema.CAMPAIGNS.c.id))
            return [msgspec.msgpack.decode(body, type=CampaignRow) for (body,) in found]

    def entries(self, after_id: int = 0, *, limit: int = 1_000) -> list[tuple[int, LedgerEntry]]:
        """Ledger lines with an id above `after_id`, oldest first, at most `limit`: a reader's tail."""
        table = schema.LEDGER
        query = sa.select(table).where(table.c.id > after_id).order_by(table.c.id).limit(limit)
        with self.reading() as connection:
            return [(line.id, _entry(line)) for line in connection.execute(query)]

    # ------------------------------------------------------------ small facts
    def next_epoch(self) -> int:
        """A number that no earlier start of this hub had."""
        epoch = int(self.fact("epoch") or "0") + 1
        self.set_fact("epoch", str(epoch))
        return epoch

    def fact(self, name: str) -> str | None:
        """A remembered word, such as the port once chosen."""
        with self.reading() as connection:
            found = connection.execute(sa.select(schema.META.c.value).where(schema.META.c.name == name))
            return found.scalar_one_or_none()

    def set_fact(self, name: str, value: str) -> None:
        """Remembers a word."""
        statement = insert(schema.META).values(name=name, value=value)
        with self.writing() as connection:
            connection.execute(statement.on_conflict_do_update(set_={"value": value}))

    # ------------------------------------------------------------ transactions
    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A write transaction: committed durably when the block ends well, else undone. Raises StorageError."""
        with self._connection("BEGIN IMMEDIATE", "write") as connection:  # a late upgrade could only fail
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A consistent view. Raises StorageError."""
        with self._connection("BEGIN", "read") as connection:
            yield connection

    @contextmanager
    def _connection(self, begin: str, verb: str) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql(begin)
                try:
                    yield connection
                except BaseException:
                    with suppress(DBAPIError):  # a full disk has made SQLite roll back by itself
                        connection.exec_driver_sql("ROLLBACK")
                    raise
                connection.exec_driver_sql("COMMIT")
        except DBAPIError as error:
            raise _explain(error, self._path, verb) from error

    def _check_version(self) -> None:
        found = self.fact("schema_version")
        if found != str(schema.VERSION):
            raise UnsupportedError(
                "the hub's database has another layout than this version of fedge writes",
                field="schema_version",
                value=found,
                hint=f"Run the fedge version that wrote {self._path}, or start a new hub with another --home",
            )


_BODIES: Final[dict[sa.Table, type[Row]]] = {
    schema.CAMPAIGNS: CampaignRow,
    schema.BLOCS: BlocRow,
    schema.ROUNDS: RoundRow,
    schema.DEVICES: DeviceRow,
}


def _upsert(row: Row) -> sa.Executable:
    if isinstance(row, LedgerEntry):
        detail = msgspec.json.encode(row.detail).decode()
        columns = {name: getattr(row, name) for name in ("at", "kind", "campaign", "bloc", "device", "round")}
        return sa.insert(schema.LEDGER).values(**columns, detail=detail)
    table = next(table for table, kind in _BODIES.items() if isinstance(row, kind))
    columns = {column.name: getattr(row, column.name) for column in table.columns if column.name != "body"}
    statement = insert(table).values(**columns, body=msgspec.msgpack.encode(row))
    keys = {column.name for column in table.primary_key.columns}
    changes = {name: statement.excluded[name] for name in [*columns, "body"] if name not in keys}
    return statement.on_conflict_do_update(index_elements=sorted(keys), set_=changes)


def _entry(line: sa.Row[tuple[object, ...]]) -> LedgerEntry:
    return LedgerEntry(
        at=line.at,
        kind=line.kind,
        campaign=line.campaign,
        bloc=line.bloc,
        device=line.device,
        round=line.round,
        detail=msgspec.json.decode(line.detail, type=dict[str, float | int | str]),
    )


def _engine(path: Path, read_only: bool) -> sa.Engine:
    mode = "ro" if read_only else "rwc"
    engine = sa.create_engine(f"sqlite:///file:{path}?mode={mode}&uri=true")

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
        if not read_only:
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    return engine


def _explain(error: DBAPIError, path: Path, verb: str) -> StorageError:
    """SQLite's refusal in the operator's words."""
    code = getattr(error.orig, "sqlite_errorname", "")
    if code.startswith("SQLITE_FULL"):
        return storage_error(OSError(errno.ENOSPC, "No space left on device"), path, verb=verb)
    if code.startswith("SQLITE_READONLY"):
        return storage_error(OSError(errno.EROFS, "Read-only"), path, verb=verb)
    if code.startswith(("SQLITE_CANTOPEN", "SQLITE_PERM")):
        return storage_error(OSError(errno.EACCES, "Cannot be opened"), path, verb=verb)
    return StorageError(
        f"cannot {verb} {path}: {error.orig}",
        hint="If this stays, stop the hub and copy its folder before anything else",
    )
