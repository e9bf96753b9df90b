"""Rows and batches: what exactly is learnt, what is shortened, what is left out and counted (F12, F13)."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from letters import EOS, Letters, wrote

from edge_agent.dataset import (
    IGNORE,
    TextExample,
    batches,
    check_template,
    evaluation_batches,
    load_dataset,
    make_batch,
    render,
)
from fedge.errors import ConfigError, DataError, FedgeError
from fedge.messages import Template

TEXT = "\n".join(json.dumps({"prompt": f"p {i}", "completion": f"c {i}"}) for i in range(10)) + "\n"
letters = Letters()


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


# ---------------------------------------------------------------- long examples (F12)
WINDOW = 256


def test_a_prompt_that_fills_the_window_is_shortened_from_the_left(tmp_path: Path) -> None:
    """F12: the answer is kept whole; what of the prompt remains is its end."""
    lines = [{"prompt": f"{'p' * 600}{i}", "completion": f"yes {i}"} for i in range(4)]
    template = Template(prompt="[{prompt}]", completion="{completion}", prompt_chars_max=10_000)
    data = load_dataset(wrote(tmp_path, lines), template, letters, eos_id=EOS, window=WINDOW)
    assert (data.counts.examples, data.counts.kept, data.counts.shortened, data.counts.too_long) == (
        4,
        4,
        4,
        0,
    )
    for number, row in enumerate(data.rows):
        assert len(row.ids) == WINDOW - 1
        assert letters.decode(row.ids[: row.prompt_tokens].tolist()) == "[" + "p" * 246 + f"{number}]"
        assert row.ids[row.prompt_tokens :].tolist() == [*letters(f"yes {number}"), EOS]


def test_an_answer_that_does_not_fit_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "completion": "yes"}] * 9 + [{"prompt": "p", "completion": "y" * WINDOW}]
    counts = load_dataset(wrote(tmp_path, lines), Template(), letters, eos_id=EOS, window=WINDOW).counts
    assert (counts.kept, counts.too_long, counts.shortened) == (9, 1, 0)
    with pytest.raises(DataError, match=r"no usable example.*'too_long': 1"):
        load_dataset(wrote(tmp_path, lines[9:]), Template(), letters, eos_id=EOS, window=WINDOW)


def test_no_row_is_without_a_label(tmp_path: Path) -> None:
    """F12: a batch of zero labels would give a mean over nothing."""
    lines = [{"prompt": "p" * n, "completion": "y" * m} for n in (0, 1, 300) for m in (1, 200, 253, 254, 300)]
    data = load_dataset(wrote(tmp_path, lines), Template(), letters, eos_id=EOS, window=WINDOW)
    assert data.counts.kept + data.counts.too_long == len(lines)
    for row in data.rows:
        assert len(row.ids) < WINDOW
        assert (make_batch([row], 0).labels >= 0).sum() >= 2  # the answer and its end


# ---------------------------------------------------------------- plain text (F13)
def test_a_text_longer_than_the_window_is_cut_into_windows_and_learnt_once(tmp_path: Path) -> None:
    """F13: 1,500 tokens for a model of 512 positions: split, every token but the first learnt exactly once."""
    text = "".join(chr(ord("a") + i % 26) for i in range(1_500))
    data = load_dataset(wrote(tmp_path, [{"text": text}]), Template(), letters, eos_id=EOS, window=512)
    assert max(len(row.ids) for row in data.rows) < 512
    learnt = [int(token) for row in data.rows for token in row.ids[row.prompt_tokens :]]
    assert learnt == [*letters(text)[1:], EOS]
    assert data.counts.kept == len(data.rows) == 3


def test_what_the_tokenizer_puts_before_a_text_is_before_every_row(tmp_path: Path) -> None:
    class Framed(Letters):
        before, after = (7,), (8,)

    lines = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    rows = load_dataset(wrote(tmp_path, lines), Template(), Framed(), eos_id=EOS, window=64).rows
    assert [row.ids[0] for row in rows] == [7, 7]
    assert [row.ids[-1] for row in rows] == [EOS, EOS]


# ---------------------------------------------------------------- texts with a label
CLASSES = ("greeting", "order", "other")


def test_labels_become_classes_by_name_or_number(tmp_path: Path) -> None:
    class Framed(Letters):
        before, after = (7,), (8,)

    lines = [
        {"text": "hello", "label": "greeting"},
        {"text": "x" * 99, "label": 2},
        {"text": " ", "label": "order"},
    ]
    data = load_dataset(wrote(tmp_path, lines), Template(), Framed(), eos_id=EOS, window=16, classes=CLASSES)
    assert [row.label for row in data.rows] == [0, 2]
    assert data.rows[1].ids.tolist() == [7, *letters("x" * 13), 8]
    assert (data.counts.kept, data.counts.shortened, data.counts.empty) == (2, 1, 1)
    batch = make_batch(data.rows, 0)
    assert batch.classes is not None
    assert batch.classes.tolist() == [0, 2]
    assert (batch.labels == IGNORE).all()


@pytest.mark.parametrize(
    ("line", "classes", "refusal"),
    [
        (
            {"text": "a", "label": "greetings"},
            CLASSES,
            "line 1: no such class.*'greetings'.*greeting, order, other",
        ),
        ({"text": "a", "label": 3}, CLASSES, "line 1: no such class"),
        ({"text": "a", "label": -1}, CLASSES, "line 1: no such class"),
        (
            {"text": "a", "label": "order"},
            (),
            "line 1: a text with a label, for a bundle that tells no classes",
        ),
        ({"text": "a"}, CLASSES, "line 1: this bundle tells classes"),
        ({"prompt": "a", "completion": "b"}, CLASSES, "line 1: this bundle tells classes"),
    ],
)
def test_data_of_another_task_is_refused(
    tmp_path: Path, line: dict[str, object], classes: tuple[str, ...], refusal: str
) -> None:
    with pytest.raises(DataError, match=refusal):
        load_dataset(wrote(tmp_path, [line]), Template(), letters, eos_id=EOS, window=64, classes=classes)
