"""Bytes of an owner's file to lines of text: marks, encodings, line ends, and a limit on every line.

UTF-8 with or without mark, UTF-16 with mark; lines ended by LF, CRLF, or CR alone. What cannot be decoded is refused
with line and byte, never replaced. Memory is bounded by one line, whatever the file holds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from fedge.errors import DataError
from fedge.limits import DATA_LINE_BYTES_MAX

HEAD_BYTES: Final = 65_536  # what is looked at to tell what a file is
_UTF16: Final = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UTF32: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_SAVE: Final = "Save the file as UTF-8"


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end. `number` counts from 1, `byte` from 0: where it begins in the file.

    `ends` is False for a piece of a line that goes on in the next piece.
    """

    number: int
    byte: int
    text: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the bytes of a file become text. `skip` = bytes of the mark."""

    name: str
    skip: int
    newline: bytes


def encoding_of(path: Path, head: bytes) -> Encoding:
    """What the first bytes say. Raises DataError for an encoding that is not read."""
    if head.startswith(_UTF32):
        raise DataError(f"{path} is UTF-32", field="encoding", value="utf-32", hint=_SAVE)
    name, skip = _UTF16.get(head[:2], "utf-8"), 2
    if name == "utf-8":
        skip = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        if head.count(0) > len(head) // 4:
            raise DataError(
                f"{path}: every other byte is zero: UTF-16 without its mark, or no text",
                field="encoding",
                value=f"0x{head[:4].hex()}",
                hint=_SAVE,
            )
    newline, other = "\n".encode(name), "\r".encode(name)
    return Encoding(name, skip, other if newline not in head and other in head else newline)


def read_lines(path: Path, stream: BinaryIO, encoding: Encoding) -> Iterator[Line | DataError]:
    """The lines from the start of `stream`; in the place of one that cannot be read, the error that says so."""
    stream.seek(encoding.skip)
    for number, (byte, raw) in enumerate(_split(stream, encoding), 1):
        if raw is None:
            yield DataError(
                f"{path}, line {number} is too long",
                field="bytes",
                value=f">{DATA_LINE_BYTES_MAX}",
                hint="A line is one example: is this one line a whole file?",
            )
            continue
        try:
            text = raw.decode(encoding.name)
        except UnicodeDecodeError as error:
            yield _not_valid(path, number, byte + error.start, error, encoding)
            continue
        yield Line(number, byte, text.removesuffix("\r"))


def read_pieces(path: Path, stream: BinaryIO, encoding: Encoding) -> Iterator[Line | DataError]:
    """The same text, where a line may be longer than memory: it comes in pieces. The first error is the last item."""
    stream.seek(encoding.skip)
    decoder = codecs.getincrementaldecoder(encoding.name)()
    newline = encoding.newline.decode(encoding.name)
    number, at = 1, encoding.skip
    while True:
        raw = stream.read(HEAD_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            *whole, rest = decoder.decode(raw, final=not raw).split(newline)
        except UnicodeDecodeError as error:
            line = number + raw[: max(0, error.start - pending)].count(encoding.newline)
            yield _not_valid(path, line, at - pending + error.start, error, encoding)
            return
        for text in whole:
            yield Line(number, at, text.removesuffix("\r"))
            number += 1
        if rest:
            yield Line(number, at, rest, ends=False)
        if not raw:
            return
        at += len(raw)


def head_of(head: bytes, encoding: Encoding) -> list[Line]:
    """What the first bytes of a file hold in lines, to tell what it is; the last line may be cut."""
    text = head[encoding.skip :].decode(encoding.name, errors="ignore")
    pieces = text.split(encoding.newline.decode(encoding.name))
    return [
        Line(number, 0, piece.removesuffix("\r")) for number, piece in enumerate(pieces, 1) if piece.strip()
    ]


def _not_valid(path: Path, line: int, byte: int, error: UnicodeDecodeError, encoding: Encoding) -> DataError:
    found = error.object[error.start : error.start + len(encoding.newline)]
    return DataError(
        f"{path}, line {line}, byte {byte}: not valid {encoding.name[:6].upper()}",
        field="encoding",
        value=f"0x{found.hex()}",
        hint=_SAVE,
    )


def _split(stream: BinaryIO, encoding: Encoding) -> Iterator[tuple[int, bytes | None]]:
    """Where each line begins, and its bytes; None for one above the limit, whose rest is passed over."""
    newline, at, rest = encoding.newline, encoding.skip, b""
    giant = False
    while piece := stream.read(HEAD_BYTES):
        *whole, rest = _cut(rest + piece, newline, at)
        for raw in whole:
            yield at, None if giant or len(raw) > DATA_LINE_BYTES_MAX else raw
            at += len(raw) + len(newline)
            giant = False
        if len(rest) > DATA_LINE_BYTES_MAX:
            giant = True
            keep = len(rest) % len(newline)  # code units stay whole
            at, rest = at + len(rest) - keep, rest[len(rest) - keep :]
    if giant or rest:
        yield at, None if giant else rest


def _cut(data: bytes, newline: bytes, at: int) -> list[bytes]:
    """`data` at each newline; in UTF-16 only where a code unit begins."""
    if len(newline) == 1:
        return data.split(newline)
    parts: list[bytes] = []
    start = found = 0
    while (found := data.find(newline, found)) >= 0:
        if (found - start) % 2:
            found += 1
            continue
        parts.append(data[start:found])
        start = found = found + 2
    return [*parts, data[start:]]
