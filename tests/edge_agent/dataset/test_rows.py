"""Private text: what is read, what is refused, and what exactly is learnt."""

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from edge_agent.dataset import (
    IGNORE,
    TextExample,
    batches,
    check_template,
    evaluation_batches,
    load_dataset,
    make_batch,
    read_records,
    render,
)
from fedge.errors import ConfigError, DataError, FedgeError, NoInputError
from fedge.limits import DATA_LINE_BYTES_MAX
from fedge.messages import Template

EOS = 2
ROWS = [{"prompt": f"Grüß dich {i}", "completion": f"schön {i} \u2028 ja"} for i in range(10)]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def letters(text: str) -> list[int]:
    """A tokenizer that a reader can check by eye: one token for a letter."""
    return [ord(letter) for letter in text]


def wrote(folder: Path, data: bytes | str) -> Path:
    path = folder / "private.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def examples_of(path: Path) -> list[TextExample]:
    return [example for record in read_records(path) for example in record.examples]


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
    ],
    ids=["utf-8", "mark", "crlf", "utf-16", "utf-16-be", "no-final-newline", "empty-lines"],
)
def test_the_same_ten_examples_however_saved(tmp_path: Path, data: bytes) -> None:
    found = examples_of(wrote(tmp_path, data))
    assert found == [TextExample(row["prompt"], row["completion"]) for row in ROWS]


def test_another_encoding_is_refused_with_file_line_and_byte(tmp_path: Path) -> None:
    first = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"
    second = json.dumps({"prompt": "ü", "completion": "b"}, ensure_ascii=False).encode("cp1252")
    path = wrote(tmp_path, first + second)
    at = (first + second).index(b"\xfc")
    with pytest.raises(DataError, match=rf"private\.jsonl, line 2, byte {at}: .*0xfc.*UTF-8"):
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
    with pytest.raises(NoInputError, match="folder"):
        examples_of(tmp_path)
    with pytest.raises(DataError, match="no usable example"):
        load_dataset(wrote(tmp_path, ""), Template(), letters, eos_id=EOS, window=64)


# ---------------------------------------------------------------- conversations
def conversation(*turns: str) -> str:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[turn[0]], "content": turn} for turn in turns]
    return json.dumps({"messages": messages, "conversation": "c"})


@pytest.mark.parametrize(
    ("turns", "expected", "unused"),
    [
        (["u1", "a1", "u2", "a2"], [("u1", "a1"), ("u2", "a2")], 0),
        (["a1", "u1", "a2"], [("", "a1"), ("u1", "a2")], 0),
        (["u1", "u2", "a1"], [("u1\nu2", "a1")], 0),
        (["u1", "a1", "a2"], [("u1", "a1"), ("u1", "a2")], 0),
        (["s1", "u1", "s2", "a1"], [("u1", "a1")], 2),
        (["u1", "a1", "u2"], [("u1", "a1")], 1),
        (["u1"], [], 1),
    ],
)
def test_every_assistant_turn_is_learnt_and_every_turn_accounted_for(
    tmp_path: Path, turns: list[str], expected: list[tuple[str, str]], unused: int
) -> None:
    (record,) = read_records(wrote(tmp_path, conversation(*turns)))
    assert [(example.prompt, example.completion) for example in record.examples] == expected
    assert record.turns_unused == unused
    assert record.conversation == "c"


# ---------------------------------------------------------------- templates and rows
def test_the_default_template_is_chit_chat() -> None:
    long = "x" * 300 + "end"
    assert render(Template(), TextExample(long, "yes")) == ("Friend: " + long[-160:] + "\nMe:", " yes")
    assert render(Template(), TextExample("", "yes {prompt}")) == ("Friend: (start)\nMe:", " yes {prompt}")


@pytest.mark.parametrize(
    "text",
    ["{prompt} {prompt}", "none", "{prompt.__class__}", "{prompt!r}", "{prompt:>9}", "{0}", "{prompt", "{}"],
)
def test_a_template_may_hold_its_placeholder_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        check_template(Template(prompt=text))
    check_template(Template(prompt="{{literal}} {prompt}"))


def test_only_the_completion_and_the_end_of_text_are_learnt(tmp_path: Path) -> None:
    template = Template(prompt="{prompt}:", completion="{completion}")
    path = wrote(tmp_path, '{"prompt": "ab", "completion": "cd"}\n{"prompt": "a", "completion": "c"}')
    rows = load_dataset(path, template, letters, eos_id=EOS, window=64).rows
    batch = make_batch(rows, pad_id=EOS)
    a, b, c, d, colon = (ord(letter) for letter in "abcd:")
    assert batch.ids.tolist() == [[a, b, colon, c, d, EOS], [a, colon, c, EOS, EOS, EOS]]
    assert batch.mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    learnt = [[IGNORE, IGNORE, c, d, EOS, IGNORE], [IGNORE, c, EOS, IGNORE, IGNORE, IGNORE]]
    assert batch.labels.tolist() == learnt


def test_what_does_not_fit_or_is_empty_is_counted(tmp_path: Path) -> None:
    lines = [
        {"prompt": "", "completion": "x" * 10},
        {"prompt": "", "completion": "x" * 60},
        {"prompt": "p" * 600, "completion": "yes"},
        {"prompt": "p", "completion": "  "},
    ]
    path = wrote(tmp_path, "\n".join(map(json.dumps, lines)))
    counts = load_dataset(path, Template(), letters, eos_id=EOS, window=64).counts
    assert (counts.examples, counts.kept, counts.too_long, counts.empty) == (4, 2, 1, 1)
    with pytest.raises(DataError, match=r"no usable example.*'too_long': 3"):
        load_dataset(path, Template(), letters, eos_id=EOS, window=16)


def test_the_window_itself_does_not_fit(tmp_path: Path) -> None:
    """`len < window`, as the reference figures have it: exactly `window` tokens are one too many."""
    path = wrote(tmp_path, json.dumps({"prompt": "", "completion": "x" * 10}))
    template = Template(prompt="{prompt}", empty_prompt="s")
    length = len("s") + len(" " + "x" * 10) + 1
    assert load_dataset(path, template, letters, eos_id=EOS, window=length + 1).counts.kept == 1
    with pytest.raises(FedgeError):
        load_dataset(path, template, letters, eos_id=EOS, window=length)


# ---------------------------------------------------------------- batches
def test_batches_are_the_same_for_the_same_seed_and_go_on_from_start(tmp_path: Path) -> None:
    rows = load_dataset(wrote(tmp_path, TEXT), Template(), letters, eos_id=EOS, window=99).rows

    def ids(seed: int, start: int, count: int) -> list[list[list[int]]]:
        made = batches(rows, size=4, seed=seed, pad_id=0, start=start)
        return [batch.ids.tolist() for batch in islice(made, count)]

    assert ids(7, 0, 6) == ids(7, 0, 6)
    assert ids(7, 0, 6)[2:] == ids(7, 2, 4)
    assert ids(7, 0, 6) != ids(8, 0, 6)
    seen = np.concatenate([batch.ids for batch in islice(batches(rows, size=5, seed=1, pad_id=0), 2)])
    assert len(np.unique(seen, axis=0)) == len(rows)  # each row once before any row twice


def test_evaluation_takes_every_row_once(tmp_path: Path) -> None:
    rows = load_dataset(wrote(tmp_path, TEXT), Template(), letters, eos_id=EOS, window=99).rows
    chosen = [i for indices, _ in evaluation_batches(rows, size=4, pad_id=0) for i in indices]
    assert sorted(chosen) == list(range(len(rows)))
