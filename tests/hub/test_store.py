"""The database: rows come back as saved, an event is whole or absent after any kill, a full disk is said plainly."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedge.errors import IntegrityError, NoInputError, StorageError, UnsupportedError
from fedge.lora import LoraConfig
from fedge.messages import BlobRef, Training
from hub.blobs import Blobs
from hub.effects import BlocRow, CampaignRow, DeviceRow, LedgerEntry, RoundRow
from hub.store import Store


def campaign(name: str = "c", version: int = 0) -> CampaignRow:
    return CampaignRow(
        id=name,
        manifest=BlobRef(b"m" * 32, 10),
        manifest_signature=b"s" * 64,
        publisher=b"p" * 32,
        url="https://localhost:1",
        lora=LoraConfig(),
        training=Training(),
        numbers=100,
        rounds=3,
        steps=5,
        bloc_devices=5,
        form_at_devices=5,
        window_seconds=60,
        seed=0,
        adapter=BlobRef(b"a" * 32, 400),
        adapter_version=version,
    )


def opened(number: int, transcript: bytes = b"t" * 32, body: bytes = b"sum") -> RoundRow:
    return RoundRow(
        transcript=transcript,
        campaign="c",
        bloc="bloc-0",
        round=number,
        envelope=b"e",
        base_version=0,
        state="open",
        sum=body,
        opened_at=1.5,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hub.sqlite"


def test_rows_come_back_as_saved(path: Path) -> None:
    bloc = BlocRow(campaign="c", id="bloc-0", members=("d-1", "d-2"), card=b"card")
    device = DeviceRow(id="d-1", counter=7)
    store = Store.open(path)
    store.transaction([campaign(), bloc, opened(1), device, LedgerEntry(at=1.0, kind="ready", device="d-1")])
    store.close()
    assert Store.open(path).load() == [campaign(), bloc, opened(1), device]


def test_a_row_replaces_its_older_self(path: Path) -> None:
    store = Store.open(path)
    store.transaction([campaign(version=1), opened(1)])
    store.transaction([campaign(version=2), opened(1, body=b"grown")])
    assert store.load() == [campaign(version=2), opened(1, body=b"grown")]


def test_an_event_is_whole_or_absent(path: Path) -> None:
    """Two OPENs of one round are refused by the table itself, and nothing else of that event stays."""
    store = Store.open(path)
    store.transaction([opened(1)])
    with pytest.raises(StorageError):
        store.transaction([campaign(), opened(1, transcript=b"u" * 32)])
    assert store.load() == [opened(1)]


def test_the_ledger_is_read_while_the_hub_writes(path: Path) -> None:
    writer = Store.open(path)
    reader = Store.open(path, read_only=True)
    first = LedgerEntry(
        at=1.0, kind="open", campaign="c", bloc="bloc-0", round=1, detail={"norm": 0.5, "n": 8}
    )
    writer.transaction([first])
    assert reader.entries() == [(1, first)]
    second = LedgerEntry(at=2.0, kind="opened")
    with writer.writing():
        assert reader.entries(1) == []  # no waiting for the writer
    writer.transaction([second])
    assert reader.entries(1) == [(2, second)]


def test_a_reader_cannot_write(path: Path) -> None:
    Store.open(path).close()
    with pytest.raises(StorageError, match="read-only"):
        Store.open(path, read_only=True).set_fact("a", "b")


def test_the_inbox_is_emptied_with_the_event_it_caused(path: Path) -> None:
    store = Store.open(path)
    number = store.ask(campaign("wanted"))
    assert store.asked() == [(number, campaign("wanted"))]
    store.transaction([campaign("wanted")], taken=number)
    assert store.asked() == []


def test_epochs_grow(path: Path) -> None:
    assert [Store.open(path).next_epoch() for _ in range(3)] == [1, 2, 3]


def test_a_full_disk_is_said_plainly(path: Path) -> None:
    store = Store.open(path)
    with store.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="No space left"):
        store.transaction([opened(1, body=bytes(1_000_000))])
    assert store.load() == []


def test_another_layout_is_refused(path: Path) -> None:
    store = Store.open(path)
    store.set_fact("schema_version", "99")
    store.close()
    with pytest.raises(UnsupportedError, match="layout") as told:
        Store.open(path)
    assert told.value.value == "99"


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"this is not SQLite" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Store.open(path)


def test_a_missing_database_is_not_made_by_reading(path: Path) -> None:
    with pytest.raises(NoInputError):
        Store.open(path, read_only=True)
    assert not path.exists()


def test_commits_wait_for_the_disk(path: Path) -> None:
    store = Store.open(path)
    with store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"


_CHILD = """
import sys
from pathlib import Path
from hub.store import Store
from hub.effects import DeviceRow, LedgerEntry
store = Store.open(Path(sys.argv[1]))
for number in range(1, 100_000):
    rows = [DeviceRow(id=f"d-{one}", counter=number) for one in range(8)]
    store.transaction([*rows, LedgerEntry(at=float(number), kind="tick", round=number)])
    print(number, flush=True)
"""


def test_kills_in_the_middle_of_transactions(path: Path) -> None:
    """After kill -9: what was acknowledged is there, and the rows of one event are all of one event."""
    for attempt in range(4):
        child = subprocess.Popen([sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(5 + 7 * attempt):
            acknowledged = int(child.stdout.readline())
        time.sleep(0.003 * attempt)
        child.send_signal(signal.SIGKILL)
        told = child.stdout.read().split()
        child.wait()
        acknowledged = max([acknowledged, *map(int, told[:-1])])
        store = Store.open(path)
        counters = {row.counter for row in store.load() if isinstance(row, DeviceRow)}
        newest = store.entries(0, limit=100_000)[-1][1].round
        store.close()
        assert counters == {newest}
        assert newest >= acknowledged
        assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


# ---------------------------------------------------------------- blobs
def test_a_blob_is_named_by_its_hash(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    ref = blobs.put(b"adapter")
    assert ref == BlobRef(hashlib.sha256(b"adapter").digest(), 7)
    assert blobs.read(ref) == b"adapter"
    assert blobs.put(b"adapter") == ref


def test_adopting_checks_the_hash(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    name = hashlib.sha256(b"weights").hexdigest()
    assert blobs.adopt(source, name).size == 7
    assert blobs.path(name) is not None
    with pytest.raises(IntegrityError):
        blobs.adopt(source, "0" * 64)
    with pytest.raises(NoInputError):
        blobs.adopt(tmp_path / "missing", name)
    assert [one.name for one in blobs.folder.iterdir()] == [name]


def test_adopting_across_file_systems_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    source = tmp_path / "weights.bin"
    source.write_bytes(b"weights")
    blobs = Blobs(tmp_path / "blobs")
    ref = blobs.adopt(source, hashlib.sha256(b"weights").hexdigest())
    assert blobs.read(ref) == b"weights"


def test_a_damaged_blob_is_noticed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    ref = blobs.put(b"adapter")
    (blobs.folder / ref.sha256.hex()).write_bytes(b"adaptes")
    with pytest.raises(IntegrityError):
        blobs.read(ref)


@pytest.mark.parametrize(
    "name", ["", "..", "../hub.sqlite", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n", "/etc"]
)
def test_a_blob_name_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "hub.sqlite").write_bytes(b"secret")
    assert Blobs(tmp_path / "blobs").path(name) is None
