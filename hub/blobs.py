"""Content-addressed files: `blobs/<sha256>`, written durably before any row or message names them.

A name is 64 hexadecimal digits and nothing else, so no request can leave the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Final

from fedge.errors import IntegrityError, NoInputError
from fedge.io.durable import (
    ensure_space,
    make_folder,
    part_name,
    replacing,
    storage_error,
    sync_folder,
    write_bytes,
)
from fedge.messages import BlobRef

_NAME: Final = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES: Final = 1 << 20


class Blobs:
    """The folder of content-addressed files."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)

    def path(self, name: str) -> Path | None:
        """The file whose SHA-256 is `name` (lower-case hexadecimal), or None."""
        if _NAME.fullmatch(name) is None:
            return None
        path = self.folder / name
        return path if path.is_file() else None

    def put(self, data: bytes) -> BlobRef:
        """Keeps `data` durably; keeping it again costs nothing."""
        ref = BlobRef(hashlib.sha256(data).digest(), len(data))
        if self.path(ref.sha256.hex()) is None:
            write_bytes(self.folder / ref.sha256.hex(), data)
        return ref

    def adopt(self, source: Path, sha256: str) -> BlobRef:
        """Keeps a copy of a file, checked on the way: a hard link where the file system allows it.

        Raises IntegrityError when the file is not what its hash says, NoInputError when it is not there.
        """
        if not source.is_file():
            raise NoInputError(f"{source} is missing", hint="Make the bundle again: `fedge quantize`")
        with source.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise IntegrityError(f"{source} is not what the manifest says", field="sha256", value=found)
        ref = BlobRef(bytes.fromhex(sha256), source.stat().st_size)
        if self.path(sha256) is None:
            _link_or_copy(source, self.folder / sha256)
        return ref

    def read(self, ref: BlobRef) -> bytes:
        """The bytes of `ref`, checked."""
        path = self.path(ref.sha256.hex())
        if path is None:
            raise NoInputError(
                f"{self.folder / ref.sha256.hex()} is missing", hint="Restore it from a backup"
            )
        data = path.read_bytes()
        if hashlib.sha256(data).digest() != ref.sha256:
            raise IntegrityError(f"{path} is damaged", field="sha256", value=ref.sha256.hex())
        return data


def _link_or_copy(source: Path, target: Path) -> None:
    part = part_name(target)
    try:
        os.link(source, part)
        part.replace(target)
        sync_folder(target.parent)
    except OSError:  # another file system, or one without links
        size = source.stat().st_size
        ensure_space(target.parent, size)
        with source.open("rb") as reader, replacing(target, bytes_needed=size) as writer:
            shutil.copyfileobj(reader, writer, _COPY_BYTES)
    try:
        part.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, part) from error
