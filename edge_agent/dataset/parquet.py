"""Parquet with the extra `parquet` (pyarrow), a batch of rows at a time. Without it: one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from edge_agent.dataset.choices import FIELDS, Reading
from edge_agent.dataset.columns import HINT, shown
from edge_agent.dataset.json_forms import BadRecord, record_of_row
from edge_agent.dataset.pair_names import pair_of
from edge_agent.dataset.record import Record
from fedge.errors import DataError, UnsupportedError

_ROWS: Final = 256  # in memory at a time
_FIELDS: Final = (*FIELDS, "messages", "conversations")
_FORMS: Final = {"prompt", "text", "audio", "instruction", "messages", "conversations"}
_CONVERT: Final = (
    "elsewhere: python -c \"import pandas; pandas.read_parquet('FILE').to_json('FILE.jsonl', "
    "orient='records', lines=True, force_ascii=False)\""
)


def parquet_records(path: Path, how: Reading) -> Iterator[Record | DataError]:
    """A record for each row. Raises UnsupportedError without pyarrow, DataError for a file that it cannot read."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UnsupportedError(
            f"{path} is Parquet",
            field="format",
            value="parquet",
            hint=f"Install it here: pip install 'fedge[parquet]'. Or convert it {_CONVERT}",
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            wanted = _columns(path, file.schema_arrow.names, how)
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=sorted(set(wanted.values()))):
                for row in batch.to_pylist():
                    number += 1
                    yield _record(path, row, wanted, number, how)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: Parquet that cannot be read: {reason}", field="format") from error


def _columns(path: Path, names: list[str], how: Reading) -> dict[str, str]:
    for field, name in how.columns.items():
        if name not in names:
            raise DataError(
                f"{path} has no column {name!r}", field="columns", value=shown(names), hint=f"For {field}"
            )
    found = dict(how.columns) or {field: field for field in _FIELDS if field in names}
    if not found.keys() & _FORMS:
        found = pair_of(names) or found
    if not found:
        raise DataError(
            f"{path}: no column has a name that is known",
            field="columns",
            value=shown(names),
            hint=HINT,
        )
    return found


def _record(
    path: Path, row: dict[str, Any], wanted: dict[str, str], number: int, how: Reading
) -> Record | DataError:
    named = {field: row[name] for field, name in wanted.items() if row[name] is not None}
    try:
        return record_of_row(named, number, how.roles)
    except BadRecord as error:
        return error.at(f"{path}, row {number}")
