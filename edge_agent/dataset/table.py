"""Rows of a table with a separator (CSV, TSV) as people make them: quotes, doubled quotes, line breaks in cells.

A cell that begins with a quote ends at the next lone quote, which a separator or the end of the row must follow
(RFC 4180). So a quote that never closes is told at the line where it *opened*, and the lines that it swallowed are
read again as rows. Memory is bounded by one row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.dataset.lines import Line
from fedge.errors import DataError
from fedge.limits import DATA_LINE_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Cells:
    """One row of a table, which begins in `line` (from 1)."""

    line: int
    cells: list[str]


class Malformed(Exception):
    """Text follows a quote that should have closed its cell."""


@dataclass(slots=True)
class _Row:
    """A row as far as it is read. `open` holds the pieces of a quoted cell that goes on in the next line."""

    separator: str
    lines: list[Line] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    open: list[str] | None = None
    opened: int = 0  # which of `lines` has the last opening quote
    size: int = 0

    def feed(self, line: Line) -> bool:
        """Take the next line; True when the row ends with it. Raises Malformed."""
        self.lines.append(line)
        self.size += len(line.text)
        text, at = line.text, 0
        while True:
            if self.open is None and not text.startswith('"', at):
                end = text.find(self.separator, at)
                end = len(text) if end < 0 else end
                self.cells.append(text[at:end])
                at = end
            else:
                if self.open is None:
                    at, self.open, self.opened = at + 1, [], len(self.lines) - 1
                piece, at, closed = _quoted(text, at)
                self.open.append(piece)
                if not closed:
                    self.open.append("\n")
                    return False
                self.cells.append("".join(self.open))
                self.open = None
            if at == len(text):
                return True
            if not text.startswith(self.separator, at):
                raise Malformed
            at += 1

    def never_closed(self, path: Path) -> DataError:
        cell = len(self.cells) + (self.open is not None)
        return DataError(
            f"{path}, line {self.lines[self.opened].number}: a quote opens here, in cell {cell} of the row, "
            "and is not closed as it should",
            field="quote",
            hint='A quote inside a quoted cell is written twice: "she said ""hi"""',
        )


def rows_of(path: Path, lines: Iterable[Line | DataError], separator: str) -> Iterator[Cells | DataError]:
    """The rows of a table; empty lines between them are passed over."""
    source, again = iter(lines), deque[Line | DataError]()
    row: _Row | None = None
    while True:
        line = again.popleft() if again else next(source, None)
        if row is not None and (
            line is None or isinstance(line, DataError) or row.size > DATA_LINE_BYTES_MAX
        ):
            yield row.never_closed(path)
            again.extendleft(reversed([*row.lines[row.opened + 1 :], *([line] if line is not None else [])]))
            row = None
            continue
        if line is None:
            return
        if isinstance(line, DataError):
            yield line
            continue
        if "\0" in line.text:
            yield _nul(path, line)
            continue
        if row is None and not line.text.strip():
            continue
        row = row or _Row(separator)
        try:
            ended = row.feed(line)
        except Malformed:
            yield row.never_closed(path)
            again.extendleft(reversed(row.lines[row.opened + 1 :]))
            row = None
            continue
        if ended:
            yield Cells(row.lines[0].number, row.cells)
            row = None


def _quoted(text: str, at: int) -> tuple[str, int, bool]:
    """From inside a quoted cell: its text in this line, where that ends, and whether the cell is closed."""
    found = at
    while (found := text.find('"', found)) >= 0:
        if not text.startswith('""', found):
            return text[at:found].replace('""', '"'), found + 1, True
        found += 2
    return text[at:].replace('""', '"'), len(text), False


def _nul(path: Path, line: Line) -> DataError:
    return DataError(
        f"{path}, line {line.number}: a NUL byte",
        field="byte",
        value=line.byte + len(line.text[: line.text.index("\0")].encode()),
        hint="Is this text? Save the table as CSV in UTF-8",
    )
