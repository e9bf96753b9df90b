"""Whole conversations as rows: only answers are learnt; long ones are cut so that each is learnt once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from letters import BRACKETS, EOS, Letters, wrote

from edge_agent.dataset import Conversation, Dataset, Reading, Row, Turn, load_dataset, make_batch
from edge_agent.dataset.chat_rows import ChatRows
from edge_agent.dataset.preview import lines, parts, preview
from edge_agent.dataset.row import Seen
from fedge.chat import ChatFormat, Frame, write
from fedge.errors import ConfigError, DataError
from fedge.messages import Template

CHAT = Template(kind="chat")
letters = Letters()


def loaded(path: Path, window: int = 64, chat: ChatFormat | None = BRACKETS) -> Dataset:
    return load_dataset(path, CHAT, letters, eos_id=EOS, window=window, chat=chat)


def marked(row: Row) -> str:
    """A row with what is learnt in [[ ]]."""
    return "".join(f"[[{part.text}]]" if part.learnt else part.text for part in parts(row, letters))


def talk(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["uhi", "ayo"], ["U(hi)A([[yo)]]"]),
        (["sbe", "uhi", "ayo", "ube", "abye"], ["S(be)U(hi)A([[yo)]]\nU(be)A([[bye)]]"]),
        (["ahey", "uhi", "ayo"], ["A([[hey)]]\nU(hi)A([[yo)]]"]),
        (["uhi", "aone", "atwo"], ["U(hi)A([[one)]]\nA([[two)]]"]),
        (["uhi", "aa", "tt", "ab", "uno"], ["U(hi)A([[a)]]\nT(t)A([[b)]]"]),
        (["uhi", "a ", "uho", "ayo"], ["U(hi)A( )\nU(ho)A([[yo)]]"]),
    ],
)
def test_the_answers_are_learnt_with_what_ends_them_and_nothing_else(
    tmp_path: Path, turns: list[str], expected: list[str]
) -> None:
    """F15: labels cover exactly the turns that are to be learned, checked by decoding them."""
    assert [marked(row) for row in loaded(wrote(tmp_path, [talk(*turns)])).rows] == expected


def test_an_answer_of_weight_zero_is_read_and_not_learnt(tmp_path: Path) -> None:
    line = talk("uhi", "ano", "uho", "ayes")
    line["messages"][1]["weight"] = 0
    assert [marked(row) for row in loaded(wrote(tmp_path, [line])).rows] == ["U(hi)A(no)\nU(ho)A([[yes)]]"]


def test_a_batch_has_labels_where_it_says(tmp_path: Path) -> None:
    rows = loaded(wrote(tmp_path, [talk("uhi", "ayo", "uho", "abe"), talk("ux", "az")])).rows
    batch = make_batch(rows, pad_id=ord(")"))  # the padding token is the one that ends answers
    learnt = ["".join(chr(i) for i in row if i >= 0) for row in batch.labels]
    assert learnt == ["yo)be)", "z)"]


def test_without_an_end_of_its_own_the_last_answer_ends_with_the_end_of_text(tmp_path: Path) -> None:
    chat = msgspec.structs.replace(
        BRACKETS, end="", frames={**BRACKETS.frames, "assistant": Frame("A(", "\n")}
    )
    (row,) = loaded(wrote(tmp_path, [talk("uhi", "ayo")]), chat=chat).rows
    assert marked(row) == "U(hi)A([[yo\x02]]"


# ---------------------------------------------------------------- long conversations (F12, F13)
def test_a_long_conversation_is_cut_and_every_answer_learnt_once(tmp_path: Path) -> None:
    turns = [turn for i in range(10) for turn in (f"uquestion {i}", f"aanswer {i}")]
    data = loaded(wrote(tmp_path, [talk("sBe.", *turns)]), window=80)
    assert all(len(row.ids) < 80 for row in data.rows)
    shown = [marked(row) for row in data.rows]
    assert all(text.startswith("S(Be.)U(question") for text in shown)
    learnt = [part.text for row in data.rows for part in parts(row, letters) if part.learnt]
    assert learnt == [f"answer {i})" for i in range(10)]
    assert (data.counts.examples, data.counts.kept, data.counts.too_long) == (10, 10, 0)
    assert data.counts.shortened == 8  # the first two had all that came before
    assert shown[1] == "S(Be.)U(question 1)A(answer 1)\nU(question 2)A([[answer 2)]]"


def test_a_long_question_loses_its_beginning(tmp_path: Path) -> None:
    data = loaded(wrote(tmp_path, [talk("u" + "q" * 600 + "!", "ayes")]), window=32)
    assert [marked(row) for row in data.rows] == ["U(" + "q" * 21 + "!)A([[yes)]]"]
    assert (data.counts.kept, data.counts.shortened) == (1, 1)


def test_a_long_system_turn_leaves_half_of_the_window(tmp_path: Path) -> None:
    data = loaded(wrote(tmp_path, [talk("s" + "s" * 600, "u" + "q" * 600, "ayes")]), window=41)
    assert [marked(row) for row in data.rows] == ["S(" + "s" * 20 + ")U(" + "q" * 8 + ")A([[yes)]]"]


def test_an_answer_that_does_not_fit_leaves_the_others(tmp_path: Path) -> None:
    data = loaded(wrote(tmp_path, [talk("ua", "ab", "uc", "a" + "x" * 99, "ud", "ae")]), window=32)
    assert (data.counts.examples, data.counts.kept, data.counts.too_long) == (3, 2, 1)
    assert [marked(row) for row in data.rows] == ["U(a)A([[b)]]", "U(d)A([[e)]]"]


@settings(max_examples=200, deadline=None)
@given(
    said=some.lists(
        some.tuples(some.sampled_from("ssuuaat"), some.text("xy z", max_size=30)), min_size=1, max_size=12
    ),
    window=some.integers(12, 90),
)
def test_whatever_the_conversation_every_answer_is_learnt_once_or_counted(
    said: list[tuple[str, str]], window: int
) -> None:
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = tuple(Turn(roles[role], text) for role, text in said)
    maker, seen = ChatRows(BRACKETS, letters, eos_id=EOS, most=window - 1), Seen()
    rows = list(maker.rows(Conversation(1, "", turns), seen))
    answers = [turn.text for turn in turns if turn.role == "assistant" and turn.text.strip()]
    learnt = [part.text for row in rows for part in parts(row, letters) if part.learnt]
    assert seen.kept == len(learnt)
    assert seen.kept + seen.too_long == len(answers)
    assert seen.examples == seen.kept + seen.too_long + seen.empty
    rest = iter(answers)
    assert all(any(text == f"{answer})" for answer in rest) for text in learnt)  # in order, each once
    assert all(len(row.ids) < window for row in rows)
    if seen.too_long == seen.shortened == 0 and rows:
        (row,) = rows
        whole = write(BRACKETS, [(turn.role, turn.text) for turn in turns]).text
        assert whole.startswith(letters.decode(row.ids.tolist()))


# ---------------------------------------------------------------- what the model's template does not take
def test_a_shape_that_the_template_refuses_is_refused_with_its_line(tmp_path: Path) -> None:
    chat = msgspec.structs.replace(BRACKETS, cannot={"users-in-a-row": "the model's template says: by turns"})
    path = wrote(tmp_path, [talk("ua", "ab"), talk("ua", "ub", "ac")])
    with pytest.raises(DataError, match=r"line 2: .*two user turns in a row.*says: by turns") as refused:
        loaded(path, chat=chat)
    assert refused.value.hint.startswith("the model's template says: by turns. --join-runs makes one turn")
    assert "--skip-bad N" in refused.value.hint
    data = load_dataset(path, CHAT, letters, eos_id=EOS, window=64, chat=chat, reading=Reading(skip_lines=1))
    assert (data.counts.records, data.counts.bad, data.counts.kept) == (1, 1, 1)
    joined = load_dataset(
        path, CHAT, letters, eos_id=EOS, window=64, chat=chat, reading=Reading(join_runs=True)
    )
    assert marked(joined.rows[1]) == "U(a\nb)A([[c)]]"


def test_outer_space_that_a_template_cannot_keep_is_taken_off(tmp_path: Path) -> None:
    chat = msgspec.structs.replace(BRACKETS, cannot={"outer-space": "it strips"})
    path = wrote(tmp_path, [talk("u hi\n", "a yo "), talk("uhi", "ayo\n")])
    data = loaded(path, chat=chat)
    assert [marked(row) for row in data.rows] == ["U(hi)A([[yo)]]"] * 2
    assert data.counts.trimmed == 3
    found = preview(path, CHAT, letters, eos_id=EOS, window=64, reading=Reading(), chat=chat)
    assert "  3 turns lose white space at an end" in "\n".join(lines(found, colour=False))
    assert loaded(path).counts.trimmed == 0, "BRACKETS keeps it"
    bare = msgspec.structs.replace(BRACKETS.frames["user"], strip="left")
    one_end = msgspec.structs.replace(BRACKETS, frames={**BRACKETS.frames, "user": bare})
    assert loaded(path, chat=one_end).counts.trimmed == 1


@pytest.mark.parametrize(
    ("shape", "turns", "join"),
    [
        ("assistants-in-a-row", ("ua", "ab", "ac"), True),
        ("tools-in-a-row", ("ua", "tb", "tc", "ad"), True),
        ("system-later", ("ua", "sb", "uc", "ad"), False),
        ("thought", ("ua", "ab</think>c"), False),
    ],
)
def test_a_refusal_names_the_flag_that_helps(
    tmp_path: Path, shape: str, turns: tuple[str, ...], join: bool
) -> None:
    chat = msgspec.structs.replace(BRACKETS, cannot={shape: "not here"})
    with pytest.raises(DataError) as refused:
        loaded(wrote(tmp_path, [talk(*turns)]), chat=chat)
    assert ("--join-runs" in refused.value.hint) == join
    assert "--skip-bad N" in refused.value.hint


def test_a_bundle_without_a_chat_template_says_so(tmp_path: Path) -> None:
    path = wrote(tmp_path, [talk("ua", "ab")])
    with pytest.raises(ConfigError, match="the model has no chat template"):
        loaded(path, chat=None)
    with pytest.raises(ConfigError, match="no table"):
        loaded(path, chat=ChatFormat(frames={}, cannot={"conversation": "no table can say it"}))


def test_a_passage_is_learnt_as_it_stands_beside_conversations(tmp_path: Path) -> None:
    rows = loaded(wrote(tmp_path, [talk("ua", "ab"), {"text": "plain"}])).rows
    assert [marked(row) for row in rows] == ["U(a)A([[b)]]", "p[[lain\x02]]"]
