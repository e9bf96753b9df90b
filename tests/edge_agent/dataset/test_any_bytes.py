"""Whatever bytes a data file has, it is read or refused by an error of ours; and a giant line costs bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from letters import BRACKETS, EOS, Letters, records, wrote

from edge_agent.dataset import Reading, load_dataset, read_records
from edge_agent.dataset.choices import FORMS
from fedge.errors import FedgeError
from fedge.limits import DATA_LINE_BYTES_MAX
from fedge.messages import Template

PIECES = some.sampled_from([
    b'{"prompt": "a", "completion": "b"}\n', b'{"messages": [{"role": "user", "content": "x"}]}\n', b"[", b"]", b"{",
    b"}", b'"', b",", b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\xc3", b"PAR1", b"\\",
    b"prompt,completion\n", b"a;b\n", b'"open', b"text\tlabel\n", b'{"text": "\\ud800"}\n', b"1e999", b"\xe2\x80\xa8",
    b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "y"}]}]}', b"PK\x03\x04", b"null",
])  # fmt: skip
FILES = some.binary(max_size=200) | some.lists(PIECES, max_size=12).map(b"".join)
HOW = some.builds(
    Reading,
    form=some.sampled_from(FORMS),
    separator=some.sampled_from(["", ",", ";"]),
    header=some.booleans(),
    columns=some.sampled_from([{}, {"text": "1"}, {"prompt": "prompt", "completion": "2"}]),
    join_runs=some.booleans(),
    skip_lines=some.sampled_from([0, 0, 2, 100]),
)


KEYS = some.sampled_from(
    ["messages", "role", "content", "prompt", "completion", "text", "label", "from", "value"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=FILES, how=HOW, kind=some.sampled_from(["text", "chat"]))
def test_any_bytes_are_read_or_refused(folder: Path, data: bytes, how: Reading, kind: Any) -> None:
    path = wrote(folder, data)
    try:
        found = list(read_records(path, how))
    except FedgeError:
        return
    assert all(record.line > 0 for record in found)
    try:
        rows = load_dataset(
            path, Template(kind=kind), Letters(), eos_id=EOS, window=32, chat=BRACKETS, reading=how
        ).rows
    except FedgeError:
        return
    assert all(2 <= len(row.ids) < 32 for row in rows)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=some.recursive(
        some.none() | some.booleans() | some.integers() | some.text(max_size=5),
        lambda inner: (
            some.lists(inner, max_size=3)
            | some.dictionaries(
                KEYS,
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    )
)
def test_any_json_is_read_or_refused(folder: Path, value: Any) -> None:
    path = wrote(folder, json.dumps({"conversation": "c", **value} if isinstance(value, dict) else value))
    refusal = refused(path)
    assert not refusal or f"{path}, line 1: " in refusal


def refused(path: Path) -> str:
    try:
        records(path, form="json-lines")
    except FedgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "begin", [b"", b"{", b'{"prompt": "', b'[{"a": "', b'prompt,completion\n"', b"\xff\xfe"]
)
def test_memory_stays_bounded_on_a_giant_line(tmp_path: Path, begin: bytes) -> None:
    path = wrote(tmp_path, begin + b"x" * (24 * DATA_LINE_BYTES_MAX))
    tracemalloc.start()
    with pytest.raises(FedgeError, match=r"too long|not closed"):
        records(path)
    assert tracemalloc.get_traced_memory()[1] < 12 * DATA_LINE_BYTES_MAX
    tracemalloc.stop()
