"""Pairs of texts as people keep them: the names they are found by, what is no pair, and a batch of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from letters import Letters, records, wrote

from edge_agent.dataset import Dataset, Pair, Passage, Reading, load_dataset, make_batch, normal_form
from edge_agent.dataset.batching import batches
from edge_agent.dataset.pair_names import PAIR_NAMES
from edge_agent.dataset.preview import lines, look, preview
from edge_agent.dataset.record import Conversation
from fedge.errors import DataError
from fedge.messages import Template

PAIRS = [("what is it", "a lamp"), ("where is it", "by the door")]


def as_lines(*rows: dict[str, object]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def named(first: str, second: str) -> str:
    return as_lines(*({first: a, second: b} for a, b in PAIRS))


def read(path: Path, *, pairs: bool = True, window: int = 40) -> Dataset:
    return load_dataset(path, Template(), Letters(), eos_id=2, window=window, pairs=pairs)


# ---------------------------------------------------------------- where they are found
@pytest.mark.parametrize(("first", "second"), PAIR_NAMES)
def test_a_pair_has_many_names(tmp_path: Path, first: str, second: str) -> None:
    expected = [Pair(n, "", a, b) for n, (a, b) in enumerate(PAIRS, 1)]
    assert records(wrote(tmp_path, named(first, second))) == expected
    assert records(wrote(tmp_path, named(first.title(), second.upper()))) == expected
    table = f"id,{first},{second}\n" + "".join(f"{n},{a},{b}\n" for n, (a, b) in enumerate(PAIRS))
    assert records(wrote(tmp_path, table)) == [Pair(r.line + 1, "", r.anchor, r.positive) for r in expected]


def test_parquet_has_them_as_well(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    file = pytest.importorskip("pyarrow.parquet")
    file.write_table(
        arrow.Table.from_pylist([{"n": 1, "Query": a, "answer": b} for a, b in PAIRS]), tmp_path / "private"
    )
    assert records(tmp_path / "private") == [Pair(n, "", a, b) for n, (a, b) in enumerate(PAIRS, 1)]


def test_the_owner_may_say_which_is_which(tmp_path: Path) -> None:
    path = wrote(tmp_path, as_lines({"body": "a", "title": "b"}))
    assert records(path, columns={"anchor": "title", "positive": "body"}) == [Pair(1, "", "b", "a")]
    table = wrote(tmp_path, "a,b\nc,d\n")
    found = records(table, columns={"anchor": "2", "positive": "1"}, header=False)
    assert found == [Pair(1, "", "b", "a"), Pair(2, "", "d", "c")]
    learnt = records(
        wrote(tmp_path, named("question", "answer")), columns={"prompt": "question", "completion": "answer"}
    )
    assert all(isinstance(record, Conversation) for record in learnt)


def test_a_pair_is_written_as_it_is_read(tmp_path: Path) -> None:
    pair = Pair(1, "mine", "a", "b")
    assert records(wrote(tmp_path, as_lines(normal_form(pair)))) == [pair]


def test_other_forms_stay_what_they_were(tmp_path: Path) -> None:
    """A form that was known before the names of pairs were is not changed by them, nor are words of a text."""
    path = wrote(tmp_path, as_lines({"text": "t", "query": "q", "answer": 3, "anchor": [1]}))
    assert records(path) == [Passage(1, "", "t")]
    path = wrote(tmp_path, as_lines({"prompt": "p", "completion": "c", "question": "q", "answer": "a"}))
    assert isinstance(records(path)[0], Conversation)
    text = "positive, she said\nand left the question, as it was\n"
    assert records(wrote(tmp_path, text)) == [Passage(1, "", text.rstrip("\n"))]


# ---------------------------------------------------------------- what is none
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"anchor": "a"}, r"line 1: field is missing \(positive=None\)"),
        ({"anchor": "a", "positive": None}, r"line 1: field is missing \(positive=None\)"),
        ({"anchor": ["a"], "positive": "b"}, r"line 1: a text is meant \(anchor=None\)"),
        ({"query": "a", "answer": 3}, r"line 1: a text is meant \(positive=None\)"),
        ({"sentence1": "a", "sentence2": "b", "score": 0.2}, r"line 1: a pair with a grade.*\(score=None\)"),
        ({"sentence1": "a", "sentence2": "b", "label": 0}, r"line 1: a pair with a grade.*\(label=None\)"),
        ({"anchor": "a", "positive": "b", "negative": ["c"]}, r"line 1: a text is meant \(negative=None\)"),
    ],
)
def test_what_is_no_pair_is_refused_by_line_and_field(
    tmp_path: Path, row: dict[str, object], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        records(wrote(tmp_path, as_lines(row)))


def test_a_grade_in_a_table_is_seen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: a pair with a grade.*score"):
        records(wrote(tmp_path, "sentence1,sentence2,score\na,b,4.5\n"))


def test_pairs_are_for_vectors_and_vectors_for_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: a pair of texts, for a bundle that makes no vectors"):
        read(wrote(tmp_path, named("question", "answer")), pairs=False)
    with pytest.raises(DataError, match=r"line 1: this bundle learns from pairs of texts.*anchor"):
        read(wrote(tmp_path, as_lines({"text": "t", "label": "x"})))
    with pytest.raises(DataError, match="by itself"):
        read(wrote(tmp_path, as_lines({"query": "a", "answer": "b"}, {"query": "c", "answer": "b"})))


# ---------------------------------------------------------------- rows and batches
def test_a_batch_is_the_anchors_and_then_what_belongs_to_each(tmp_path: Path) -> None:
    rows = read(wrote(tmp_path, named("query", "document"))).rows
    batch = make_batch(rows, pad_id=0)
    assert batch.classes is not None
    assert batch.classes.tolist() == [0, 1, -1, -1]
    texts = ["".join(map(chr, ids[mask > 0])) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    assert texts == ["what is it", "where is it", "a lamp", "by the door"]
    assert (batch.labels == -100).all()  # no token is learnt
    assert not batch.ids[batch.mask == 0].any()


def test_what_does_not_belong_stands_at_the_end_of_the_batch(tmp_path: Path) -> None:
    text = "query,positive,negative\na,b,c\nd,e,\nf,g,h\n"
    found = records(wrote(tmp_path, text))
    assert found == [Pair(2, "", "a", "b", "c"), Pair(3, "", "d", "e"), Pair(4, "", "f", "g", "h")]
    assert records(wrote(tmp_path, as_lines(normal_form(found[0]))))[0] == Pair(1, "", "a", "b", "c")
    batch = make_batch(read(wrote(tmp_path, text)).rows, pad_id=0)
    assert batch.classes is not None
    assert "".join(map(chr, batch.ids[:, 0])) == "adfbegch"
    assert batch.classes.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


def test_what_is_too_long_loses_its_end_and_what_is_empty_is_left_out(tmp_path: Path) -> None:
    path = wrote(
        tmp_path,
        as_lines(
            {"anchor": "a" * 9, "positive": "b"},
            {"anchor": "a", "positive": "c" * 9},
            {"anchor": " ", "positive": "b"},
            {"anchor": "a", "positive": ""},
        ),
    )
    found = read(path, window=6)
    assert [row.tokens for row in found.rows] == [5, 5]
    counts = found.counts
    assert (counts.examples, counts.kept, counts.shortened, counts.empty) == (4, 2, 2, 2)


def test_batches_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    rows = read(
        wrote(tmp_path, as_lines(*({"anchor": "a" * (n % 7 + 1), "positive": f"b{n}"} for n in range(20))))
    ).rows

    def first(seed: int) -> list[np.ndarray]:
        endless = batches(rows, size=4, seed=seed, pad_id=0)
        return [next(endless).ids for _ in range(6)]

    assert all(np.array_equal(a, b) for a, b in zip(first(1), first(1), strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first(1), first(2), strict=True))


# ---------------------------------------------------------------- what the owner is shown
def test_the_preview_tells_pairs(tmp_path: Path) -> None:
    path = wrote(tmp_path, named("question", "answer"))
    assert "2 pairs of texts" in next(iter(lines(look(path, Reading()), colour=False)))
    found = preview(path, Template(), Letters(), eos_id=2, window=40, reading=Reading(), pairs=True)
    told = "\n".join(lines(found, colour=False))
    assert "what is it\n[[a lamp]]" in told
    assert found.lengths == [10, 11]
    assert f"tokens: {10 + 6 + 11 + 11}\n" in told
