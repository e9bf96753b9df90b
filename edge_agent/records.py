"""The owner's text file, read as what it says it is: JSON Lines, in one of two normal forms.

    {"prompt": "…", "completion": "…", "conversation": "optional"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "conversation": …}

Every `assistant` turn is one example; its prompt is the last run of `user` turns before it, joined by newlines.
Roles go by declaration, never by position. Turns that no example uses (system turns, a last question without an
answer) are counted, not lost from sight. Nothing is guessed and nothing is replaced: what cannot be read is refused
with file, line, and field or byte. A refusal never repeats the owner's words.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, NoReturn

import msgspec

from fedge.errors import DataError, NoInputError, StorageError
from fedge.limits import DATA_LINE_BYTES_MAX

_UTF16_BYTES_MAX: Final = 64 * 1024**2  # such a file is decoded as a whole
_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}
_FORMS: Final = 'A line is {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'


@dataclass(frozen=True, slots=True)
class TextExample:
    """What is answered to, and the answer that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the file: the examples in it, and how many of its turns no example uses."""

    line: int
    conversation: str
    examples: tuple[TextExample, ...]
    turns_unused: int


class _Turn(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Line(msgspec.Struct, frozen=True):
    prompt: str | msgspec.UnsetType = msgspec.UNSET
    completion: str | msgspec.UnsetType = msgspec.UNSET
    messages: list[_Turn] | msgspec.UnsetType = msgspec.UNSET
    conversation: str = ""


_decoder: Final = msgspec.json.Decoder(_Line)


def read_records(path: Path) -> Iterator[Record]:
    """The records of `path` in order. Empty lines are passed over.

    UTF-8 with or without mark, UTF-16 with mark, lines ended by LF or CRLF. Raises NoInputError, StorageError,
    DataError.
    """
    try:
        with path.open("rb") as stream:
            for number, text in _lines(path, stream):
                if text.strip():
                    yield _record(path, number, text)
    except FileNotFoundError as error:
        raise NoInputError("data file does not exist", field="path", value=str(path)) from error
    except IsADirectoryError as error:
        raise NoInputError("data file is a folder", field="path", value=str(path)) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", field="path", value=str(path)) from error


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    start = stream.read(4)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path} is packed", field="encoding", value=name, hint="Unpack it first")
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        yield from enumerate(_utf16(path, start + stream.read(_UTF16_BYTES_MAX)).split("\n"), 1)
        return
    at = stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    number = 0
    while line := stream.readline(DATA_LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > DATA_LINE_BYTES_MAX:
            raise DataError(
                f"{path}, line {number} is too long", field="bytes", value=f">{DATA_LINE_BYTES_MAX}"
            )
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            _refuse_bytes(path, number, at + error.start, line[error.start : error.start + 1], error)
        yield number, text
        at += len(line)


def _utf16(path: Path, data: bytes) -> str:
    if len(data) > _UTF16_BYTES_MAX:
        raise DataError(
            f"{path}: a UTF-16 file may have {_UTF16_BYTES_MAX:,} bytes",
            field="encoding",
            hint="Save it as UTF-8",
        )
    try:
        return data.decode("utf-16")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode("utf-16", errors="replace").count("\n") + 1
        _refuse_bytes(path, line, error.start, data[error.start : error.start + 2], error)


def _refuse_bytes(path: Path, line: int, byte: int, found: bytes, cause: Exception) -> NoReturn:
    raise DataError(
        f"{path}, line {line}, byte {byte}: not valid UTF-8 or UTF-16",
        field="encoding",
        value=f"0x{found.hex()}",
        hint="Save the file as UTF-8",
    ) from cause


def _record(path: Path, number: int, text: str) -> Record:
    try:
        line = _decoder.decode(text)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$").lstrip(".") or "record"
        raise DataError(f"{path}, line {number}: {what}", field=field, hint=_FORMS) from error
    except msgspec.DecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error}", field="record", hint=_FORMS) from error
    if not isinstance(line.messages, msgspec.UnsetType):
        if line.prompt is not msgspec.UNSET or line.completion is not msgspec.UNSET:
            raise DataError(
                f"{path}, line {number}: both normal forms at once", field="messages", hint=_FORMS
            )
        examples, unused = _from_turns(line.messages)
        return Record(number, line.conversation, examples, unused)
    for field in ("prompt", "completion"):
        if getattr(line, field) is msgspec.UNSET:
            raise DataError(f"{path}, line {number}: field is missing", field=field, hint=_FORMS)
    return Record(number, line.conversation, (TextExample(str(line.prompt), str(line.completion)),), 0)


def _from_turns(turns: list[_Turn]) -> tuple[tuple[TextExample, ...], int]:
    """One example for each assistant turn, and the number of turns that none of them uses."""
    examples: list[TextExample] = []
    prompt: list[str] = []
    used = answered = 0
    for turn in turns:
        if turn.role == "user":
            prompt = [turn.content] if answered else [*prompt, turn.content]
            answered = 0
        elif turn.role == "assistant":
            examples.append(TextExample("\n".join(prompt), turn.content))
            used += 1 + (0 if answered else len(prompt))
            answered = 1
    return tuple(examples), len(turns) - used
