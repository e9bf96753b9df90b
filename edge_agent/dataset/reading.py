"""A file or folder of the owner's to records, by what is in it and never by its name.

Nothing is guessed and nothing is replaced: what cannot be read is refused with file, line, and field or byte. Bad
lines are passed over only as far as the owner said, and are counted. A refusal never repeats the owner's words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge_agent.dataset.choices import Reading
from edge_agent.dataset.columns import HINT, looks_like_a_table, separator_of, table_records
from edge_agent.dataset.json_forms import BadRecord, record_of_json
from edge_agent.dataset.json_stream import is_json, json_objects
from edge_agent.dataset.lines import HEAD_BYTES, Line, encoding_of, head_of, read_lines, read_pieces
from edge_agent.dataset.plain import passages
from edge_agent.dataset.record import Record, Recording, joined
from fedge.errors import DataError, NoInputError, StorageError

_UNPACK: Final = "Unpack it first"
_TABLE: Final = "Save it as CSV in UTF-8"
_RECORDING: Final = (
    "Give the folder of a folder for each class, or a list: CSV or JSON Lines with audio, label"
)
_PASSAGE: Final = "Save its text as UTF-8"
# First bytes -> what it is, what to do. Parquet is read elsewhere in this module.
_MAGIC: Final[dict[bytes, tuple[str, str]]] = {
    b"\x1f\x8b": ("packed: gzip", f"{_UNPACK}: gunzip FILE"),
    b"BZh": ("packed: bzip2", f"{_UNPACK}: bunzip2 FILE"),
    b"\xfd7zXZ": ("packed: xz", f"{_UNPACK}: unxz FILE"),
    b"(\xb5/\xfd": ("packed: zstd", f"{_UNPACK}: unzstd FILE"),
    b"7z\xbc\xaf": ("packed: 7z", _UNPACK),
    b"\xd0\xcf\x11\xe0": ("an old Office document", _TABLE),
    b"SQLite format 3": ("an SQLite database", "sqlite3 -csv -header FILE 'select … from …' > FILE.csv"),
    b"ARROW1": ("an Arrow file", "Save it as Parquet or JSON Lines"),
    b"\x89HDF": ("an HDF5 file", _TABLE),
    b"%PDF": ("a PDF", "pdftotext FILE makes text of it"),
    b"\x89PNG": ("a picture", "Only text can be learnt"),
    b"\xff\xd8\xff": ("a picture", "Only text can be learnt"),
    b"RIFF": ("a film", "Text can be learnt, and sound that is saved as WAV"),
    b"\x80\x04": ("a Python pickle", "It is never opened: save it as JSON Lines"),
    b"\x80\x03": ("a Python pickle", "It is never opened: save it as JSON Lines"),
    b"\x80\x05": ("a Python pickle", "It is never opened: save it as JSON Lines"),
}
_WAVE_HEAD_BYTES: Final = 12  # RIFF, the file's size, WAVE
_FILES_MAX: Final = 100_000  # in a folder

Found = Iterator[Record | DataError]


@dataclass(slots=True)
class Tally:
    """What came by while a file was read. `bad` lines were passed over; `first` says what was wrong with the first."""

    form: str = ""
    records: int = 0
    bad: int = 0
    first: str = ""
    forms: dict[str, int] = field(default_factory=dict)

    def found(self, record: Record) -> None:
        """One more record."""
        self.records += 1
        kind = type(record).__name__
        self.forms[kind] = self.forms.get(kind, 0) + 1

    def bad_line(self, error: DataError, how: Reading) -> None:
        """One more bad line. Raises `error` when the owner does not let it pass; a share is judged at the end."""
        self.bad += 1
        self.first = self.first or str(error)
        if self.bad > how.skip_lines and not how.skip_share:
            raise error

    def refused(self, error: DataError, how: Reading) -> None:
        """The record found last is of no use after all. Raises `error`, as `bad_line`."""
        self.records -= 1
        self.bad_line(error, how)

    def check(self, path: Path, how: Reading) -> None:
        """Raises DataError when more was passed over than the owner allows."""
        total = self.records + self.bad
        if self.bad > max(how.skip_lines, how.skip_share * total):
            raise DataError(
                f"{path}: {self.bad} of {total} records are bad, more than may be skipped",
                field="skip-bad",
                value=self.bad,
                hint=f"The first: {self.first}",
            )


def read_records(path: Path, how: Reading | None = None, tally: Tally | None = None) -> Iterator[Record]:
    """The records of the file or folder `path`, in order (of names in a folder).

    Raises NoInputError, StorageError, DataError, and UnsupportedError for Parquet without its extra. What the owner
    allowed to skip is counted in `tally`; a share is judged at the end of the file.
    """
    how, tally = how or Reading(), tally if tally is not None else Tally()
    try:
        for found in _folder(path, how, tally) if path.is_dir() else _file(path, how, tally):
            if isinstance(found, DataError):
                tally.bad_line(found, how)
                continue
            tally.found(found)
            yield joined(found) if how.join_runs else found
    except FileNotFoundError as error:
        raise NoInputError("data file does not exist", field="path", value=str(path)) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", field="path", value=str(path)) from error
    tally.check(path, how)


def _folder(path: Path, how: Reading, tally: Tally) -> Found:
    files = sorted(file for file in path.rglob("*") if not _hidden(file.relative_to(path)) and file.is_file())
    if not files:
        raise NoInputError("data folder has no file", field="path", value=str(path))
    if len(files) > _FILES_MAX:
        raise DataError(f"{path} has more than {_FILES_MAX:,} files", field="files", value=len(files))
    sounds = [file for file in files if _is_sound(file)]
    lists = sorted(set(files) - set(sounds)) if sounds else files
    for file in lists:
        for found in _file(file, how, tally):
            if sounds and isinstance(found, Recording):
                raise DataError(
                    f"{path} has recordings, and a list of recordings: {file.name}",
                    field="path",
                    value=len(sounds),
                    hint=f"Give the list itself: {file}",
                )
            yield found
    if sounds:
        tally.form = "recordings"
        yield from _sounds(path, sounds)


def _sounds(path: Path, files: list[Path]) -> Found:
    """Recordings whose label is the folder that they lie in.

    In the order of a hash of their names: in that of the names, class would follow class, and what is held out, every
    fifth or the first so many, would be of few of them.
    """
    names = [file.relative_to(path).as_posix() for file in files]
    for name in sorted(
        names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    ):
        label, inside, _ = name.partition("/")
        if inside:
            yield Recording(0, "", name, label)
        else:
            yield DataError(
                f"{path / name} has no label",
                field="label",
                hint="Put it into a folder named after its class, or give a list: CSV or JSON Lines with audio, label",
            )


def _is_sound(path: Path) -> bool:
    with path.open("rb") as stream:
        return _is_wave(stream.read(_WAVE_HEAD_BYTES))


def _is_wave(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:_WAVE_HEAD_BYTES] == b"WAVE"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file(path: Path, how: Reading, tally: Tally) -> Found:
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        if head.startswith(b"PAR1"):
            from edge_agent.dataset.parquet import parquet_records

            tally.form = "parquet"
            yield from parquet_records(path, how)
            return
        _refuse_binary(path, head)
        encoding = encoding_of(path, head)

        first = head_of(head, encoding)
        if len(head) == HEAD_BYTES and len(first) > 1:
            del first[-1]  # it is cut
        form, separator = _form_of(path, first, how)
        tally.form = form
        if form == "json":
            yield from _from_json(path, json_objects(path, read_pieces(path, stream, encoding)), how)
            return
        lines = read_lines(path, stream, encoding)
        if form == "json-lines":
            yield from _from_json(path, lines, how)
        elif form == "table":
            yield from table_records(path, lines, separator, how)
        else:
            yield from passages(lines)


def _refuse_binary(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        office = b"[Content_Types].xml" in head[:4096] or b"mimetypeapplication/vnd.oasis" in head[:4096]
        what, hint = ("an Office document", _TABLE) if office else ("packed: zip", f"{_UNPACK}: unzip FILE")
        raise DataError(f"{path} is {what}", field="format", value=f"0x{head[:4].hex()}", hint=hint)
    if _is_wave(head):
        raise DataError(
            f"{path} is one recording", field="format", value=f"0x{head[:4].hex()}", hint=_RECORDING
        )
    for magic, (what, hint) in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}", field="format", value=f"0x{head[:4].hex()}", hint=hint)


def _form_of(path: Path, head: list[Line], how: Reading) -> tuple[str, str]:
    """Which form the first lines have, and the separator of a table."""
    if how.form not in ("auto", "table"):
        return how.form, ""
    first = head[0].text.lstrip() if head else ""
    if how.form == "auto" and not how.separator:
        if not head:
            return "json-lines", ""
        if _is_meant_as_json(first):
            return ("json-lines" if first[0] == "{" and _ends_in_its_line(first) else "json"), ""
    separator = separator_of(path, head, how)
    if separator or how.form == "table":
        return "table", separator or ","
    columns = looks_like_a_table(path, head)
    if columns or path.suffix.lower() in (".csv", ".tsv"):
        raise DataError(
            f"{path} looks like a table of {columns or 'one'} columns, but its first row has no name that is known",
            field="columns",
            value=columns,
            hint=f"{HINT}, by number with --no-header; or --form text if it is no table",
        )
    return "text", ""


def _is_meant_as_json(first: str) -> bool:
    """Whether a file that begins so is meant as JSON."""
    if first[:1] not in ("{", "["):
        return False
    second = first[1:].lstrip()[:1]
    return second in ("", '"', "'", "}") if first[0] == "{" else second in ("", "{", "[", "]", '"', "'")


def _ends_in_its_line(first: str) -> bool:
    """Whether a first line that begins an object is meant to end it, even if it is broken."""
    return is_json(first) or not first.rstrip().endswith(("{", ",", "["))


def _from_json(path: Path, lines: Iterable[Line | DataError], how: Reading) -> Found:
    for line in lines:
        if isinstance(line, DataError):
            yield line
        elif line.text.strip():
            try:
                yield record_of_json(line.text, line.number, how.roles, how.columns)
            except BadRecord as error:
                yield error.at(f"{path}, line {line.number}")
