"""Power cuts inside a write, on real files: every state of the disk that a cut may leave is laid out and loaded.

The disk's promise is POSIX and no more: data is safe after fsync of the file, a rename after fsync of its folder.
Before that a file may be empty, in part or garbage, and a rename may have happened or not. So each cut point of
write -> fsync -> rename -> fsync(folder) has several pictures, and the reader must do with every one of them.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from edge_agent.effects import AgentState
from edge_agent.home import Home
from edge_agent.journal import Journal
from edge_agent.round_files import Rounds
from fedge.io import durable
from hub.effects import DeviceRow, LedgerEntry
from hub.store import Store


class PowerCut(BaseException):
    """Not an Exception: nothing may tidy up after it as if it were an error."""


@dataclass
class Disk:
    """What a disk has been told about one file that is being replaced."""

    path: Path
    steps: list[str]
    part: bytes = b""  # written so far
    synced: bool = False  # the part's data is safe
    renamed: bool = False
    rename_synced: bool = False

    def pictures(self, old: bytes) -> Iterator[bytes]:
        """All contents that `path` may have after a cut now."""
        if not self.rename_synced:
            yield old
        if self.renamed:
            whole = self.part
            yield whole
            if not self.synced:
                yield from (b"", whole[: len(whole) // 2], bytes(len(whole)), whole[:-1] + b"\0")


def recorded(path: Path, patch: pytest.MonkeyPatch, cut_at: int) -> Disk:
    """A disk that notes each step and loses its power before step number `cut_at`."""
    disk, numbers = Disk(path, []), count()
    fsync, replace = os.fsync, Path.replace

    def step(name: str) -> None:
        if next(numbers) == cut_at:
            raise PowerCut
        disk.steps.append(name)

    def watched_fsync(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        if not folder:
            disk.part = Path(f"/proc/self/fd/{handle}").read_bytes()
        step("fsync folder" if folder else "fsync file")
        fsync(handle)
        disk.synced |= not folder
        disk.rename_synced |= folder and disk.renamed

    def watched_replace(self: Path, target: Path) -> Path:
        disk.part = self.read_bytes()
        step("rename")
        disk.renamed = True
        return replace(self, target)

    patch.setattr(os, "fsync", watched_fsync)
    patch.setattr(Path, "replace", watched_replace)
    return disk


def loads(folder: Path, content: bytes) -> AgentState:
    """What a device that starts with this file on its disk believes; a leftover part lies beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "state.bin").write_bytes(content)
    durable.part_name(folder / "state.bin").write_bytes(content[:-5])
    durable.sweep(folder)
    return Journal(folder / "state.bin").load()


OLD = AgentState(boot=1, counter=4, prekey=b"o" * 32)
NEW = AgentState(boot=1, counter=5, prekey=b"n" * 32, announcement=bytes(9_000))


def test_a_state_is_the_old_or_the_new_one_after_a_cut_at_any_step(tmp_path: Path) -> None:
    path, seen = tmp_path / "state.bin", []
    for cut_at in range(4):
        Journal(path).save(OLD)
        old = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            disk = recorded(path, patch, cut_at)
            told = False
            try:
                Journal(path).save(NEW)
                told = True
            except PowerCut:
                pass
        found = [loads(tmp_path / "picture", content) for content in disk.pictures(old)]
        assert all(state in (OLD, NEW) for state in found)
        assert not told or found == [NEW], "what was told as saved is there"
        seen.append((told, len(found)))
    assert seen == [(False, 1), (False, 1), (False, 2), (True, 1)], (
        "fsync, rename, fsync of the folder; then told"
    )
    assert disk.steps == ["fsync file", "rename", "fsync folder"]


def test_the_pictures_see_a_rename_before_its_data() -> None:
    """The model can fail: without the first fsync a file is there that nobody can read."""
    disk = Disk(Path("x"), [], part=b"whole state", synced=False, renamed=True)
    assert {b"old", b"", b"whole"} <= set(disk.pictures(b"old"))
    disk.synced = True
    assert set(disk.pictures(b"old")) == {b"old", b"whole state"}


# ---------------------------------------------------------------- the files of a round
def cut_then_repeated(rounds: Rounds, action: Callable[[], None], cut_at: int) -> bool:
    """Runs `action`, cut before its file operation number `cut_at`, then again; False when it has fewer."""
    numbers = count()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync")):
            real = getattr(owner, name)

            def watched(*words: object, real: Callable[..., object] = real, **named: object) -> object:
                if next(numbers) == cut_at:
                    raise PowerCut
                return real(*words, **named)

            patch.setattr(owner, name, watched)
        try:
            action()
            return False
        except PowerCut:
            pass
    action()
    return True


@pytest.mark.parametrize("outcome", ["keep", "drop"])
def test_what_becomes_of_the_work_is_the_same_when_its_step_is_cut_and_repeated(
    tmp_path: Path, outcome: str
) -> None:
    transcript = b"t" * 32
    for cut_at in count():
        home = Home(tmp_path / f"{outcome}-{cut_at}")
        for folder in (home.folder, home.rounds):
            folder.mkdir(parents=True)
        rounds = Rounds(home)
        home.carry.write_bytes(b"older work")
        for path in (home.delta, home.sent, home.report):
            path(transcript).write_bytes(path.__name__.encode())
        action = rounds.keep_carry if outcome == "keep" else rounds.drop_carry
        more = cut_then_repeated(rounds, lambda action=action: action(transcript), cut_at)
        assert list(home.rounds.iterdir()) == []
        assert (home.carry.read_bytes() if home.carry.exists() else b"") == (
            b"sent" if outcome == "keep" else b""
        )
        if not more:
            break
    assert cut_at >= 4, "there were steps to cut"


# ---------------------------------------------------------------- the hub's database
def test_a_transaction_is_whole_or_absent_when_its_log_ends_anywhere(tmp_path: Path) -> None:
    """SQLite's log is cut (and filled with garbage) at many places of the last transaction."""
    path = tmp_path / "hub.sqlite"
    store = Store.open(path)
    first = [DeviceRow(id=f"d-{number}", counter=1) for number in range(20)]
    second = [DeviceRow(id=f"d-{number}", counter=2) for number in range(20)]
    store.transaction([*first, LedgerEntry(at=1.0, kind="ready")])
    log = path.with_name("hub.sqlite-wal")
    start = log.stat().st_size
    store.transaction([*second, LedgerEntry(at=2.0, kind="open")])
    end = log.stat().st_size
    assert end > start, "the log was not folded into the database meanwhile"
    base, whole, pictures = path.read_bytes(), log.read_bytes(), 0
    for at in sorted({*range(start, end, (end - start) // 24), end - 1, end}):
        for tail in {b"", bytes(end - at)}:
            folder = tmp_path / f"{at}-{len(tail)}"
            folder.mkdir()
            (folder / "hub.sqlite").write_bytes(base)
            (folder / "hub.sqlite-wal").write_bytes(whole[:at] + tail)
            copy = Store.open(folder / "hub.sqlite")
            rows = sorted(copy.load(), key=lambda row: row.id)
            entries = len(copy.entries())
            copy.close()
            assert (rows, entries) in (
                (sorted(first, key=lambda row: row.id), 1),
                (sorted(second, key=lambda row: row.id), 2),
            )
            assert at < end or entries == 2, "what was committed is there"
            pictures += 1
    store.close()
    assert pictures > 40
