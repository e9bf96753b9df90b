"""Durable files: whole or absent, private from the first byte, and honest about a full disk."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.errors import StorageError
from fedge.io import durable


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old and longer")
    durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.bin"]


def test_file_then_rename_then_folder_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(handle: int) -> None:
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync file")
        fsync(handle)

    def watched_replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    durable.write_bytes(tmp_path / "state.bin", b"x")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_failing_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), durable.replacing(path) as stream:
        stream.write(b"half" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_secret_is_never_readable_by_others_not_even_as_a_part(tmp_path: Path) -> None:
    path, before = tmp_path / "key.pem", os.umask(0)
    try:
        with durable.replacing(path, secret=True) as stream:
            stream.write(b"secret")
            (part,) = tmp_path.iterdir()
            assert stat.S_IMODE(part.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        folder = durable.make_folder(tmp_path / "keys", secret=True)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_full_disk_is_refused_before_the_first_byte_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "bytes_free", lambda folder: 2_000_000)
    with pytest.raises(StorageError) as caught:
        durable.write_bytes(tmp_path / "big", bytes(3_000_000))
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "2,000,000 bytes free, 3,000,000 bytes needed" in text
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_on_the_way_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device \([\d,]+ bytes free, 3 bytes needed\)"):
        durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_and_a_folder_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        durable.write_bytes(tmp_path / "no" / "file", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="in the way"):
        durable.write_bytes(tmp_path / "taken", b"x")


def test_a_killed_writer_leaves_the_old_file_and_a_part_that_sweep_removes(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from pathlib import Path; from fedge.io import durable\n"
        "with durable.replacing(Path(sys.argv[1])) as stream:\n"
        "    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    (removed,) = durable.sweep(tmp_path)
    assert removed.name.startswith(".state.bin.")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.bin"]


def test_sweep_keeps_parts_of_living_processes_and_foreign_files(tmp_path: Path) -> None:
    living = tmp_path / f".a.{os.getppid()}.0.part"
    foreign = [tmp_path / ".part", tmp_path / ".notes.part", tmp_path / "a.1.0.part"]
    ours, folder = tmp_path / f".a.{os.getpid()}.7.part", tmp_path / ".b.999999999.0.part"
    for path in (living, *foreign, ours):
        path.write_bytes(b"")
    (folder / "inside").mkdir(parents=True)
    assert durable.sweep(tmp_path) == sorted([ours, folder])
    assert sorted(tmp_path.iterdir()) == sorted([living, *foreign])


def test_remove_is_quiet_about_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    durable.remove(path)
    durable.remove(path)
    assert not path.exists()
