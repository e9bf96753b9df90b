"""Tables as people make them (F16): quotes, line breaks, semicolons, no header; the cause is named, not the symptom."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from letters import records, said, wrote

from edge_agent.dataset import Labelled, Passage, Reading, Tally, read_records
from edge_agent.dataset.lines import Line
from edge_agent.dataset.table import Cells, rows_of
from fedge.errors import DataError, UsageError
from fedge.limits import DATA_LINE_BYTES_MAX

HEAD = "prompt,completion\n"
TEN = [(f"question {i}", f"answer, {i}") for i in range(10)]


def table(rows: list[tuple[str, str]], **dialect: Any) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", **dialect).writerows([("prompt", "completion"), *rows])
    return out.getvalue()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_the_separator_is_found(tmp_path: Path, separator: str, quoting: Any) -> None:
    path = wrote(tmp_path, table(TEN, delimiter=separator, quoting=quoting))
    assert said(path) == [[("u", prompt), ("a", completion)] for prompt, completion in TEN]


def test_line_breaks_quotes_and_spaces_in_cells_are_kept(tmp_path: Path) -> None:
    rows = [('she said "hi"\nand left', ' "" '), ("a\n\n\nb", "x,y"), ('"', "\n")]
    path = wrote(tmp_path, table(rows))
    assert said(path) == [[("u", prompt), ("a", completion)] for prompt, completion in rows]
    assert [record.line for record in records(path)] == [2, 4, 8]


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16"])
def test_a_spreadsheet_of_a_windows_pc(tmp_path: Path, name: str) -> None:
    path = wrote(tmp_path, table([("Grüße", "schön")], delimiter=";").replace("\n", "\r\n").encode(name))
    assert said(path) == [[("u", "Grüße"), ("a", "schön")]]


# ---------------------------------------------------------------- quotes that do not close
SWALLOWED = [
    ("never closed, to the end of the file", 'q 1,a 1\n"q 2,a 2\nq 3,a 3\n', 3),
    ("closed by the next row's quote", 'q 1,a 1\n"q 2,a 2\nq 3,"a 3"\nq 4,a 4\n', 3),
    ("text behind the closing quote", 'q 1,a 1\nq 2,"a" 2\n', 3),
    ("opened in a later line of the row", 'q 1,a 1\n"q\n2","a 2\nq 3,a 3\n', 4),
    ("a giant cell", 'q 1,a 1\n"q 2,a 2\n' + "q 3,a 3\n" * (DATA_LINE_BYTES_MAX // 7), 3),
]


@pytest.mark.parametrize(("case", "rows", "line"), SWALLOWED, ids=[case for case, *_ in SWALLOWED])
def test_an_open_quote_is_told_where_it_opened(tmp_path: Path, case: str, rows: str, line: int) -> None:
    """csv from the standard library swallows the rest, or ends in "field larger than field limit"."""
    with pytest.raises(DataError, match=rf"line {line}: a quote opens here, in cell \d of the row"):
        records(wrote(tmp_path, HEAD + rows))


def test_what_an_open_quote_swallowed_is_read_again(tmp_path: Path) -> None:
    path = wrote(tmp_path, HEAD + 'q 1,a 1\n"q 2,a 2\nq 3,"a 3"\nq 4,a 4\n')
    tally = Tally()
    found = list(read_records(path, Reading(skip_lines=1), tally))
    assert [record.line for record in found] == [2, 4, 5]
    assert tally.bad == 1


@pytest.mark.parametrize(
    ("rows", "refusal"),
    [
        ("q 1,a 1\nq 2\n", "line 3: a row of 1 cells in a table of 2 columns"),
        ("q 1,a 1,and\n", "line 2: a row of 3 cells.*quotes"),
        ("q 1,a\0 1\n", r"line 2: a NUL byte \(byte=23"),
        ("q\xfc,b\n", "line 2, byte 19: not valid UTF-8"),
    ],
)
def test_a_bad_row_is_told_by_its_line(tmp_path: Path, rows: str, refusal: str) -> None:
    with pytest.raises(DataError, match=refusal):
        records(wrote(tmp_path, (HEAD + rows).encode("latin-1")))


# ---------------------------------------------------------------- which column is what
def test_columns_have_the_names_that_the_owner_says(tmp_path: Path) -> None:
    path = wrote(tmp_path, "id;Frage;Antwort\n1;q;a\n")
    assert said(path, columns={"prompt": "Frage", "completion": "antwort"}) == [[("u", "q"), ("a", "a")]]
    with pytest.raises(DataError, match=r"no column 'Fragen' \(columns=\['id', 'Frage', 'Antwort'\]"):
        records(path, columns={"prompt": "Fragen", "completion": "Antwort"}, separator=";")
    with pytest.raises(UsageError, match="no such field"):
        records(path, columns={"question": "Frage"})


def test_without_a_header_columns_have_numbers(tmp_path: Path) -> None:
    path = wrote(tmp_path, "1,q,a\n2,r,b\n")
    how = {"header": False, "columns": {"prompt": "2", "completion": "3"}}
    assert said(path, **how) == [[("u", "q"), ("a", "a")], [("u", "r"), ("a", "b")]]
    with pytest.raises(DataError, match=r"no column '4'.*1 to 3"):
        records(path, header=False, columns={"prompt": "4", "completion": "3"})


def test_a_header_without_a_known_name_asks(tmp_path: Path) -> None:
    text = "id,question,reply\n" + "".join(f"{i},a,b\n" for i in range(9))
    with pytest.raises(DataError, match=r"looks like a table of 3 columns.*--columns"):
        records(wrote(tmp_path, text))
    with pytest.raises(DataError, match=r"first row does not say.*'id', 'question', 'reply'"):
        records(wrote(tmp_path, text), form="table")
    (passage,) = records(wrote(tmp_path, text), form="text")
    assert isinstance(passage, Passage)


def test_a_first_row_that_is_somebodys_words_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        records(wrote(tmp_path, "a secret that is much longer than any name of a column,b\n"), form="table")
    assert "secret" not in str(refused.value)


def test_other_tables(tmp_path: Path) -> None:
    assert records(wrote(tmp_path, "text,label\nhi,greeting\n")) == [Labelled(2, "", "hi", "greeting")]
    assert records(wrote(tmp_path, "text\nhi\n"), form="table") == [Passage(2, "", "hi")]
    alpaca = "instruction,input,output\ndo,this,done\n"
    assert said(wrote(tmp_path, alpaca)) == [[("u", "do\n\nthis"), ("a", "done")]]
    only = wrote(tmp_path, "prompt,other\nq,a\n")
    with pytest.raises(DataError, match=r"line 2: field is missing .completion"):
        records(only)


CELLS = some.lists(some.text(some.sampled_from('ab",;\n \tü'), max_size=6), min_size=1, max_size=4)


@given(rows=some.lists(CELLS, min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read_as_it_was(rows: list[list[str]]) -> None:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    lines = [Line(number, 0, text) for number, text in enumerate(out.getvalue().split("\n"), 1)]
    found = list(rows_of(Path("x"), lines, ","))
    assert [row.cells for row in found if isinstance(row, Cells)] == rows
