"""Which column of a table is what: by the header's own names, or as the owner says. Nothing is guessed.

A separator is believed when the header then names a known field, or when the owner's columns are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Final

from edge_agent.dataset.choices import FIELDS, Reading
from edge_agent.dataset.json_forms import BadRecord, record_of_row
from edge_agent.dataset.lines import Line
from edge_agent.dataset.pair_names import NEGATIVE, PAIR, pair_of
from edge_agent.dataset.record import Record
from edge_agent.dataset.table import Cells, rows_of
from fedge.errors import DataError

SEPARATORS: Final = ",;\t|"
_ALIKE_ROWS: Final = 5  # so many rows of as many cells look like a table, even where no name is known
_ROWS_LOOKED_AT: Final = 50
_NAME_CHARS_MAX: Final = 40  # a longer first cell is no name, and is not shown
_NAMES_SHOWN: Final = 20
HINT: Final = (
    "Say which is which: --columns prompt=NAME,completion=NAME (or text=, label=; anchor=, positive=)"
)


def separator_of(path: Path, head: Sequence[Line], how: Reading) -> str:
    """The separator that makes a table of these first lines; "" when they are none."""
    if how.separator:
        return how.separator
    wanted = {name.strip().lower() for name in how.columns.values()} or set(FIELDS) - {*PAIR, NEGATIVE}
    best, looks_like = (0, ""), ""
    for separator in SEPARATORS:
        rows = [
            row.cells
            for row in islice(rows_of(path, head, separator), _ROWS_LOOKED_AT)
            if not isinstance(row, DataError)
        ]
        if not rows:
            continue
        named = sum(name.strip().lower() in wanted for name in rows[0]) if how.header else 0
        named = max(named, len(pair_of(rows[0])) if how.header and not how.columns else 0)
        if named and (len(rows[0]) > 1 or named == len(wanted)) and named > best[0]:
            best = named, separator
        widths = {len(cells) for cells in rows}
        if not looks_like and len(rows) >= _ALIKE_ROWS and widths != {1} and len(widths) == 1:
            looks_like = separator
    if best[0] or how.form == "table" or how.columns:
        return best[1] or looks_like or ","
    return ""


def looks_like_a_table(path: Path, head: Sequence[Line]) -> int:
    """How many columns all the first rows have alike; 0 when they are just lines."""
    for separator in SEPARATORS:
        rows = list(islice(rows_of(path, head, separator), _ROWS_LOOKED_AT))
        widths = {len(row.cells) for row in rows if isinstance(row, Cells)}
        if len(rows) >= _ALIKE_ROWS and len(widths) == 1 and widths != {1}:
            return widths.pop()
    return 0


def table_records(
    path: Path, lines: Iterable[Line | DataError], separator: str, how: Reading
) -> Iterator[Record | DataError]:
    """A record for each row. Raises DataError when the header does not say which column is what."""
    rows = rows_of(path, lines, separator)
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first, DataError):
        raise first
    columns = _columns(path, first.cells, how)
    width = len(first.cells)
    for row in rows if how.header else chain([first], rows):
        if isinstance(row, DataError):
            yield row
        elif len(row.cells) != width:
            yield DataError(
                f"{path}, line {row.line}: a row of {len(row.cells)} cells in a table of {width} columns",
                field="cells",
                value=len(row.cells),
                hint="Put cells that hold the separator into quotes",
            )
        else:
            try:
                named = {field: row.cells[column] for field, column in columns.items()}
                yield record_of_row(named, row.line, how.roles)
            except BadRecord as error:
                yield error.at(f"{path}, line {row.line}")


def _columns(path: Path, first: Sequence[str], how: Reading) -> dict[str, int]:
    """Field -> index of its column."""
    names = [name.strip() for name in first] if how.header else []
    if how.columns:
        return {field: _index(path, names, len(first), name) for field, name in how.columns.items()}
    lower = [name.lower() for name in names]
    found: dict[str, int] = {field: lower.index(field) for field in FIELDS if field in lower}
    if not found.keys() & {"prompt", "text", "audio", "instruction"}:
        pair = pair_of(names)
        if pair:
            return {field: names.index(name) for field, name in pair.items()}
        raise DataError(
            f"{path}: the first row does not say which column is what",
            field="columns",
            value=shown(names) or len(first),
            hint=f"{HINT}; with --no-header by number: --columns prompt=1,completion=2",
        )
    return found


def _index(path: Path, names: Sequence[str], width: int, wanted: str) -> int:
    if wanted in names:
        return names.index(wanted)
    lower = [name.lower() for name in names]
    if wanted.lower() in lower:
        return lower.index(wanted.lower())
    if wanted.isdecimal() and 1 <= int(wanted) <= width:
        return int(wanted) - 1
    raise DataError(
        f"{path} has no column {wanted!r}",
        field="columns",
        value=shown(names) or f"1 to {width}",
        hint="These are its columns" if names else "Without a header, columns have numbers",
    )


def shown(names: Sequence[str]) -> list[str]:
    """Names of columns as far as they can be names: a long first cell is somebody's words."""
    return [
        name if len(name) <= _NAME_CHARS_MAX else f"(column {number})"
        for number, name in enumerate(names[:_NAMES_SHOWN], 1)
    ]
