"""Files as people save them: marks, encodings, line ends, packing, absence (F14). What is read, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from letters import EOS, Letters, records, said, wrote

from edge_agent.dataset import Reading, Tally, TextExample, load_dataset, read_records
from edge_agent.resources import samples_bucket
from fedge.errors import DataError, NoInputError
from fedge.limits import DATA_LINE_BYTES_MAX
from fedge.messages import Template

ROWS = [{"prompt": f"Grüß dich {i}", "completion": f"schön {i} \u2028 ja"} for i in range(10)]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def examples_of(path: Path, **how: Any) -> list[TextExample]:
    return [example for record in records(path, **how) for example in record.examples]


# ---------------------------------------------------------------- files as people save them
@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.rstrip("\n").encode(),
        TEXT.replace("\n", "\n\n  \n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("\n", "\r").encode("utf-16"),
        json.dumps(ROWS, ensure_ascii=False).encode(),
        json.dumps(ROWS, ensure_ascii=False, indent=2).encode("utf-16"),
        "\n".join(json.dumps(row, indent=1) for row in ROWS).encode("utf-8-sig"),
    ],
    ids=[
        "utf-8",
        "mark",
        "crlf",
        "utf-16",
        "utf-16-be",
        "no-final-newline",
        "empty-lines",
        "cr",
        "cr-utf-16",
        "list",
        "list-utf-16",
        "laid-out",
    ],
)
def test_the_same_ten_examples_however_saved(tmp_path: Path, data: bytes) -> None:
    found = examples_of(wrote(tmp_path, data))
    assert found == [TextExample(row["prompt"], row["completion"]) for row in ROWS]


def test_another_encoding_is_refused_with_file_line_and_byte(tmp_path: Path) -> None:
    first = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"
    second = json.dumps({"prompt": "ü", "completion": "b"}, ensure_ascii=False).encode("cp1252")
    path = wrote(tmp_path, first + second)
    at = (first + second).index(b"\xfc")
    with pytest.raises(DataError, match=rf"private\.data, line 2, byte {at}: .*0xfc.*UTF-8"):
        examples_of(path)
    marked = wrote(tmp_path, b"\xef\xbb\xbf" + first + second)
    with pytest.raises(DataError, match=rf"line 2, byte {at + 3}:"):
        examples_of(marked)


def test_a_letter_cut_in_the_middle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1, byte 12"):
        examples_of(wrote(tmp_path, b'{"prompt": "\xc3'))
    with pytest.raises(DataError, match="line 3, byte"):
        examples_of(wrote(tmp_path, "\n\n{}".encode("utf-16") + b"\x00"))


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (gzip.compress(TEXT.encode()), "packed.*gzip"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2: field is missing .completion="),
        ('{"prompt": 3, "completion": "b"}', "line 1: .*prompt"),
        ('{"prompt": "a", "completion": "b"', "line 1: not JSON"),
        ('["a", "b"]', "line 1"),
        ('{"messages": [{"role": "stranger", "content": "x"}]}', r"line 1: .*messages\[0\]\.role"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', r"line 1: .*messages\[0\]\.content"),
        ('{"messages": [{"content": "x"}]}', r"line 1: .*role"),
        ('{"messages": [], "prompt": "a"}', "line 1: both normal forms"),
        (b"x" * (DATA_LINE_BYTES_MAX + 1), "line 1 is too long"),
    ],
)
def test_a_record_that_is_not_what_it_says_is_refused(
    tmp_path: Path, data: bytes | str, refusal: str
) -> None:
    with pytest.raises(DataError, match=refusal):
        examples_of(wrote(tmp_path, data))


def test_a_refusal_does_not_repeat_private_words(tmp_path: Path) -> None:
    for bad in ('{"prompt": "secret", "completion": 3}', '{"prompt": "secret"', '{"completion": "secret"}'):
        with pytest.raises(DataError) as refused:
            examples_of(wrote(tmp_path, bad))
        assert "secret" not in str(refused.value)


def test_no_file_and_no_records(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="does not exist"):
        examples_of(tmp_path / "none")
    with pytest.raises(NoInputError, match="folder has no file"):
        examples_of(tmp_path)
    with pytest.raises(DataError, match="no usable example"):
        load_dataset(wrote(tmp_path, ""), Template(), Letters(), eos_id=EOS, window=64)


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"PK\x03\x04\x14\0[Content_Types].xml", "Office document.*Save it as CSV"),
        (b"PK\x03\x04\x14\0 other", "packed: zip.*unzip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document.*CSV"),
        (b"SQLite format 3\0", "SQLite database"),
        (b"%PDF-1.7", "PDF.*pdftotext"),
        (b"\x80\x04\x95 pickle", "pickle.*never opened"),
        (b"\xff\xfe\0\0a\0\0\0", "UTF-32"),
        ("Grüße, ohne Marke".encode("utf-16-le"), "UTF-16 without its mark"),
        (b"BZh91AY", "bzip2.*bunzip2"),
    ],
)
def test_what_is_no_text_is_known_by_its_first_bytes(tmp_path: Path, data: bytes, refusal: str) -> None:
    """F16: formats that are not read here are answered with what to do."""
    with pytest.raises(DataError, match=refusal):
        records(wrote(tmp_path, data, "private.jsonl"))


def test_a_list_is_read_an_object_at_a_time(tmp_path: Path) -> None:
    spaced = '[\n\n  {"prompt": "a [\\"}", "completion":\n "b"},\n{"prompt": "c", "completion": "]"}\n]\n'
    assert said(wrote(tmp_path, spaced)) == [[("u", 'a ["}'), ("a", "b")], [("u", "c"), ("a", "]")]]
    assert [record.line for record in records(wrote(tmp_path, spaced))] == [3, 5]
    assert records(wrote(tmp_path, "[]")) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_list_in_one_line_longer_than_any_line_may_be(tmp_path: Path, encoding: str) -> None:
    r"""As `json.dump` writes it; pieces end anywhere, inside a letter, an escape or a number."""
    rows = [
        {"prompt": "ü\\\\" * (i % 40) + "\\", "completion": f'"[{i}]{{"', "n": 10**i} for i in range(300)
    ] * 40
    data = json.dumps(rows, ensure_ascii=False)
    assert len(data) > 2 * DATA_LINE_BYTES_MAX
    found = said(wrote(tmp_path, data.encode(encoding)))
    assert found == [[("u", row["prompt"]), ("a", row["completion"])] for row in rows]


def test_a_letter_cut_in_a_list_is_told_with_its_line_and_byte(tmp_path: Path) -> None:
    data = b'[\n{"prompt": "' + b"x" * 70_000 + b'",\n"completion": "\xfc"}]'
    with pytest.raises(DataError, match=rf"line 3, byte {data.index(0xFC)}: not valid UTF-8"):
        records(wrote(tmp_path, data))


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ('[{"prompt": "a", "completion": "b"}, 3]', "line 1: Expected `object`"),
        (
            '[\n{"prompt": "a",\n "completion": "b"',
            "line 2: not JSON: the object that begins here has no end",
        ),
        ('[\n{"prompt": "a",\n "completion": }]', "line 2: not JSON"),
        ('{\n"data": [{"prompt": "a"}]}', "line 1: field is missing .messages"),
        ("{\n" + '"data": "' + "x" * (DATA_LINE_BYTES_MAX + 9) + '"}', "line 1: an object is too long.*jq"),
        ('[{"prompt": "' + "x" * (DATA_LINE_BYTES_MAX + 9) + '"}]', "line 1: an object is too long.*jq"),
        (
            "{\n" + '"data": "xxxxxxxx",\n' * (DATA_LINE_BYTES_MAX // 16) + "}",
            "line 1: an object is too long.*jq",
        ),
    ],
    ids=["not-an-object", "no-end", "not-json", "wrapped", "long-line", "long-in-list", "long-object"],
)
def test_a_list_that_is_none_is_refused_where_it_begins(tmp_path: Path, text: str, refusal: str) -> None:
    with pytest.raises(DataError, match=refusal):
        records(wrote(tmp_path, text))


# ---------------------------------------------------------------- bad lines
def spoilt(folder: Path) -> Path:
    lines: list[bytes] = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    lines[2], lines[5] = b'{"prompt": "\xfc"}', b"{"
    lines[7] = b'{"prompt": "' + b"x" * DATA_LINE_BYTES_MAX + b'"}'
    return wrote(folder, b"\n".join(lines))


def test_bad_lines_stop_it_unless_the_owner_says_so(tmp_path: Path) -> None:
    path = spoilt(tmp_path)
    with pytest.raises(DataError, match="line 3, byte"):
        records(path)
    with pytest.raises(DataError, match="line 8 is too long"):
        records(path, skip_lines=2)
    tally = Tally()
    assert len(list(read_records(path, Reading(skip_lines=3), tally))) == 7
    assert (tally.records, tally.bad) == (7, 3)
    assert "line 3, byte" in tally.first


def test_a_share_of_bad_lines_is_judged_at_the_end(tmp_path: Path) -> None:
    path = spoilt(tmp_path)
    assert len(records(path, skip_share=0.3)) == 7
    with pytest.raises(DataError, match=r"3 of 10 records are bad.*line 3, byte"):
        records(path, skip_share=0.29)


def test_what_was_passed_over_is_counted(tmp_path: Path) -> None:
    how = Reading(skip_lines=3)
    counts = load_dataset(spoilt(tmp_path), Template(), Letters(), eos_id=EOS, window=64, reading=how).counts
    assert (counts.records, counts.kept, counts.bad) == (7, 7, 3)


# ---------------------------------------------------------------- folders and plain text
def test_a_folder_is_all_its_files_each_as_what_it_is(tmp_path: Path) -> None:
    wrote(tmp_path, "once upon a time\nthere was", "b.txt")
    wrote(tmp_path, [{"prompt": "a", "completion": "b"}], "c")
    (tmp_path / "a").mkdir()
    wrote(tmp_path / "a", "first", "x.md")
    wrote(tmp_path, "hidden", ".secret")
    (tmp_path / ".git").mkdir()
    wrote(tmp_path / ".git", "hidden", "config")
    tally = Tally()
    found = list(read_records(tmp_path, tally=tally))
    assert [getattr(record, "text", "talk") for record in found] == [
        "first",
        "once upon a time\nthere was",
        "talk",
    ]
    assert tally.forms == {"Passage": 2, "Conversation": 1}
    wrote(tmp_path, gzip.compress(b"x"), "d")
    with pytest.raises(DataError, match=r"/d is packed"):
        records(tmp_path)


def test_a_long_text_comes_in_passages_that_are_the_whole(tmp_path: Path) -> None:
    paragraph = "word " * 200
    text = "\n\n".join(f"{number} {paragraph}" for number in range(60))
    found = records(wrote(tmp_path, text))
    assert "".join(record.text for record in found) == text.rstrip("\n")
    assert len(found) > 10
    assert [record.ends for record in found] == [False] * (len(found) - 1) + [True]
    assert all(record.text[0].isdigit() or record.text.startswith("\n") for record in found)


@pytest.mark.parametrize(
    "text", ["[Chapter 1] It was late.", "{not json at all}", "Yes, and no.\nNo, but: yes.\n" * 2]
)
def test_prose_is_text_whatever_it_begins_with(tmp_path: Path, text: str) -> None:
    (passage,) = records(wrote(tmp_path, text))
    assert passage.text == text.rstrip("\n")


def test_samples_are_counted_without_a_tokenizer(tmp_path: Path) -> None:
    assert samples_bucket(wrote(tmp_path, ROWS)) == 4
    assert samples_bucket(wrote(tmp_path, "x" * 4000)) == 4
    assert samples_bucket(wrote(tmp_path, [{"text": "a", "label": "b"}] * 3)) == 2
