"""Files that survive a power cut: written whole, or not there at all.

The rule (law 4): whatever a later step relies on goes write -> fsync -> rename -> fsync(folder). A reader sees
the old bytes or the new ones, never a part (POSIX rename; Pillai et al., OSDI 2014, on why the folder must be
synced too). Secrets are created with mode 0600, so there is no moment in which another user may read them. A
process that dies in the middle leaves one `.name.<pid>.<n>.part`, which `sweep` removes at the next start.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from fedge.errors import StorageError

_PART_NAME: Final = re.compile(r"\..+\.([1-9]\d{0,9})\.\d+\.part")
_RESERVE_BYTES: Final = 1 << 20  # room for the folder's own blocks and for whoever writes beside us
_counter = itertools.count()

_HINTS: Final = {
    errno.ENOSPC: "The disk is full: free some room or choose another folder, then run it again",
    errno.EDQUOT: "The disk quota is used up: free some room or choose another folder",
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.EACCES: "No permission: choose a folder of your own, or correct its owner and mode",
    errno.EPERM: "No permission: choose a folder of your own, or correct its owner and mode",
    errno.ENOENT: "The folder does not exist: create it first",
    errno.ENOTDIR: "A part of this path is a file where a folder is needed",
    errno.EISDIR: "A folder of this name is in the way",
}


def write_bytes(path: Path, data: bytes | bytearray | memoryview, *, secret: bool = False) -> None:
    """Replace `path` by `data`, durably. `secret`: mode 0600 from the first byte. Raises StorageError."""
    ensure_space(path.parent, len(data))
    with replacing(path, secret=secret, bytes_needed=len(data)) as stream:
        stream.write(data)


@contextmanager
def replacing(path: Path, *, secret: bool = False, bytes_needed: int = 0) -> Iterator[BinaryIO]:
    """A stream whose content becomes `path` when the block ends well, and leaves no trace when it does not.

    Use it for files too large for one `bytes`; only write inside the block, because every OSError in it is told
    as a StorageError of `path`. `bytes_needed` only improves that message.
    """
    part = part_name(path)
    try:
        with _create(part, secret) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, bytes_needed=bytes_needed) from error
    finally:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """The hidden name under which the block makes a file or a folder that becomes `path` when it ends well.

    For what other libraries write by name. All files are flushed to disk before the rename, a file takes the place of
    an old one, a folder needs a free name; nothing is left when the block fails. Raises StorageError.
    """
    part = part_name(path)
    try:
        yield part
        inside = sorted(part.rglob("*")) if part.is_dir() else []
        for made in [*inside, part]:
            _flush(made)
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove `path` durably; a path that is not there is fine. Raises StorageError."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


def make_folder(path: Path, *, secret: bool = False) -> Path:
    """Create `path` and its parents, return it; `secret`: mode 0700 for the last one. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700 if secret else 0o777, exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    return path


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def ensure_space(folder: Path, bytes_needed: int) -> None:
    """Refuse before the first byte what cannot fit. Raises StorageError with bytes free and bytes needed."""
    try:
        free = bytes_free(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    if free < bytes_needed + _RESERVE_BYTES:
        raise storage_error(OSError(errno.ENOSPC, "No space left"), folder, bytes_needed=bytes_needed)


def bytes_free(folder: Path) -> int:
    """Bytes that this user may still write in `folder`. Raises OSError."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def part_name(path: Path) -> Path:
    """The name under which `path` is written before it is whole; it says which process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{next(_counter)}.part")


def sweep(folder: Path) -> list[Path]:
    """Remove what a killed process left behind in `folder`, files and folders; call it before the first write.

    Parts of other processes that are still alive are kept. Our own number counts as dead: in a container the
    agent has the same number after every start. Returns what was removed. Raises StorageError.
    """
    removed = []
    try:
        for part in sorted(folder.glob(".*.part")):
            name = _PART_NAME.fullmatch(part.name)
            if name is None or _lives(int(name[1])):
                continue
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
            removed.append(part)
    except OSError as error:
        raise storage_error(error, folder) from error
    return removed


def storage_error(error: OSError, path: Path, *, bytes_needed: int = 0, verb: str = "write") -> StorageError:
    """`error` in the operator's words: the path, what the system said, bytes free and needed when it is full."""
    what = f"cannot {verb} {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what += f" ({_free_text(path)} free" + (f", {bytes_needed:,} bytes needed)" if bytes_needed else ")")
    return StorageError(
        what, hint=_HINTS.get(error.errno or 0, "Look at the disk and its mount, then try again")
    )


def _create(part: Path, secret: bool) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(part, flags, 0o600 if secret else 0o666), "wb")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lives(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _free_text(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    try:
        return f"{bytes_free(folder):,} bytes"
    except OSError:
        return "unknown"
