"""Parquet with its extra, and one line that says what to do without it (F16)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from letters import records, said, wrote

from edge_agent.dataset import Labelled, Passage
from fedge.errors import DataError, UnsupportedError


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    file = pytest.importorskip("pyarrow.parquet")
    path = folder / "private.data"
    file.write_table(arrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


def test_rows_are_examples_in_every_form(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "b"}]
    assert said(parquet(tmp_path, [{"messages": turns, "id": 1}])) == [[("u", "ü"), ("a", "b")]]
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert said(parquet(tmp_path, [{"conversations": sharegpt}])) == [[("u", "a"), ("a", "b")]]
    many = parquet(tmp_path, [{"prompt": f"p {i}", "completion": "c"} for i in range(700)])
    assert said(many)[699] == [("u", "p 699"), ("a", "c")]
    assert records(parquet(tmp_path, [{"text": "t", "label": 2}])) == [Labelled(1, "", "t", 2)]
    assert records(parquet(tmp_path, [{"body": "t"}]), columns={"text": "body"}) == [Passage(1, "", "t")]


def test_bad_rows_and_columns_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(DataError, match=r"row 2: field is missing .completion"):
        records(path)
    assert len(records(path, skip_lines=1)) == 1
    with pytest.raises(DataError, match=r"no column 'x' \(columns=\['prompt', 'completion'\]"):
        records(path, columns={"text": "x"})
    with pytest.raises(DataError, match=r"no column has a name that is known .columns=\['body'\]"):
        records(parquet(tmp_path, [{"body": "t"}]))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    whole = parquet(tmp_path, [{"text": "t"}]).read_bytes()
    with pytest.raises(DataError, match="Parquet that cannot be read"):
        records(wrote(tmp_path, whole[:-9]))


def test_without_the_extra_it_is_known_by_its_first_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"is Parquet.*fedge\[parquet\].*to_json"):
        records(wrote(tmp_path, b"PAR1 whatever PAR1", "private.csv"))
