"""Conversations of every shape (F15): each gives the expected list of (role, text), or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from letters import records, said, wrote

from edge_agent.dataset import Conversation, Labelled, Passage, normal_form
from fedge.errors import DataError, UsageError


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


U, A = message("user", "u1"), message("assistant", "a1")
PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    ("line", "turns"),
    [
        ({"messages": [U, A]}, [("u", "u1"), ("a", "a1")]),
        ({"messages": [A, U, A]}, [("a", "a1"), ("u", "u1"), ("a", "a1")]),
        ({"messages": [U, U, A]}, [("u", "u1"), ("u", "u1"), ("a", "a1")]),
        ({"messages": [U, message("system", "s"), A]}, [("u", "u1"), ("s", "s"), ("a", "a1")]),
        ({"messages": [message("Human", "h"), message("gpt", "g")]}, [("u", "h"), ("a", "g")]),
        (
            {"messages": [message("developer", "d"), U, message("model", "m")]},
            [("s", "d"), ("u", "u1"), ("a", "m")],
        ),
        (
            {"messages": [U, message("bot", "b"), message("function", "f"), message("bot", "c")]},
            [("u", "u1"), ("a", "b"), ("t", "f"), ("a", "c")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}],
                "system": "s",
            },
            [("s", "s"), ("u", "h"), ("a", "g")],
        ),
        ({"conversations": [{"from": "human", "content": "h"}]}, [("u", "h")]),
        ({"messages": [message("user", PARTS), A]}, [("u", "one two"), ("a", "a1")]),
        ({"messages": [message("user", ""), A, U]}, [("u", ""), ("a", "a1"), ("u", "u1")]),
        ({"messages": []}, []),
        ({"instruction": "do", "input": "this", "output": "done"}, [("u", "do\n\nthis"), ("a", "done")]),
        (
            {"instruction": "do", "input": "", "output": "done", "system": "s"},
            [("s", "s"), ("u", "do"), ("a", "done")],
        ),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]]},
            [("u", "a"), ("a", "b"), ("u", "c"), ("a", "d")],
        ),
        ({"prompt": "p", "completion": "c"}, [("u", "p"), ("a", "c")]),
        ({"prompt": [U, A, U], "completion": [A]}, [("u", "u1"), ("a", "a1"), ("u", "u1"), ("a", "a1")]),
    ],
)
def test_each_shape_gives_its_turns(
    tmp_path: Path, line: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    assert said(wrote(tmp_path, [line])) == [turns]


def test_a_bare_text_and_a_labelled_one(tmp_path: Path) -> None:
    path = wrote(
        tmp_path, [{"text": "t"}, {"text": "t", "label": "x"}, {"text": "t", "label": 3, "conversation": 7}]
    )
    assert records(path) == [Passage(1, "", "t"), Labelled(2, "", "t", "x"), Labelled(3, "7", "t", 3)]


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        (
            {"messages": [message("stranger", "x")]},
            r"who is this \(messages\[0\].role='stranger'\).*stranger=user",
        ),
        ({"messages": [U, {"content": "x"}]}, r"messages\[1\].role"),
        ({"messages": [U, {"role": "assistant"}]}, r"messages\[1\].content"),
        ({"messages": [U, message("assistant", None)]}, r"messages\[1\].content"),
        (
            {"messages": [message("assistant", None, tool_calls=[{}])]},
            r"call of a tool.*messages\[0\].tool_calls",
        ),
        (
            {"messages": [message("user", [{"type": "image_url"}])]},
            r"only text.*messages\[0\].content\[0\].type",
        ),
        ({"messages": [U, 3]}, r"messages\[1\]"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value"),
        ({"messages": [U], "prompt": "p"}, "both normal forms"),
        ({"text": "t", "instruction": "i"}, "both normal forms"),
        ({"prompt": "p"}, "missing .completion"),
        ({"instruction": "p"}, "missing .output"),
        ({"completion": "p"}, "missing .prompt"),
        ({"chosen": "p", "rejected": "q"}, "missing .messages"),
        ({"instruction": "p", "output": "o", "history": [["only one"]]}, r"history\[0\]"),
        ({"text": "t", "label": [1]}, "label"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_line_and_field(
    tmp_path: Path, line: dict[str, Any], refusal: str
) -> None:
    path = wrote(tmp_path, [{"messages": [U, A]}, line])
    with pytest.raises(DataError, match=f"line 2: .*{refusal}"):
        records(path)


def test_an_unusual_role_is_who_the_owner_says(tmp_path: Path) -> None:
    path = wrote(tmp_path, [{"messages": [message("Alice", "hi"), message("user", "yo")]}])
    assert said(path, roles={"Alice": "user", "user": "assistant"}) == [[("u", "hi"), ("a", "yo")]]
    with pytest.raises(UsageError, match="no such role"):
        said(path, roles={"Alice": "friend"})


def test_keys_have_the_names_that_the_owner_says(tmp_path: Path) -> None:
    path = wrote(tmp_path, [{"question": "q", "answer": "a", "prompt": "not this"}, {"question": "q"}])
    how = {"columns": {"prompt": "question", "completion": "answer"}}
    assert said(path, skip_lines=1, **how) == [[("u", "q"), ("a", "a")]]
    with pytest.raises(DataError, match=r"line 2: field is missing .answer"):
        said(path, **how)


def test_runs_of_one_speaker_become_one_turn_when_the_owner_says_so(tmp_path: Path) -> None:
    path = wrote(
        tmp_path, [{"messages": [U, U, A, message("assistant", "a2"), message("assistant", "a3", weight=0)]}]
    )
    assert said(path, join_runs=True) == [[("u", "u1\nu1"), ("a", "a1\na2"), ("a", "a3")]]


def test_an_answer_of_weight_zero_is_context(tmp_path: Path) -> None:
    line = {"messages": [U, message("assistant", "bad", weight=0), U, message("assistant", "good", weight=1)]}
    (record,) = records(wrote(tmp_path, [line]))
    assert isinstance(record, Conversation)
    assert [example.completion for example in record.examples] == ["good"]
    assert record.samples == 1
    prompt = {"prompt": [U, A, U], "completion": [A]}
    (record,) = records(wrote(tmp_path, [prompt]))
    assert record.samples == 1


def test_the_normal_form_reads_back_as_it_was(tmp_path: Path) -> None:
    lines = [
        {
            "messages": [message("system", "s"), U, message("assistant", "ü\u2028", weight=0), A],
            "conversation": "c",
        },
        {"text": "t"},
        {"text": "t", "label": 3},
        {"text": "t", "label": "3", "conversation": "c"},
    ]
    found = records(wrote(tmp_path, lines))
    again = records(wrote(tmp_path, "\n".join(json.dumps(normal_form(record)) for record in found)))
    assert again == found


def test_a_refusal_shows_no_more_than_a_word_of_the_owners(tmp_path: Path) -> None:
    for line in (
        {"messages": [message("a very long secret that is not a role at all", "x")]},
        {"messages": [message("user", [{"type": "secret, and long enough to be cut"}])]},
        {"prompt": "secret"},
        {"text": "t", "label": {"secret": 1}},
    ):
        with pytest.raises(DataError) as refused:
            records(wrote(tmp_path, [line]))
        assert "secret that is" not in str(refused.value)
        assert "enough to be cut" not in str(refused.value)


# ---------------------------------------------------------------- pairs, for templates that take one answer at a time
@pytest.mark.parametrize(
    ("roles", "expected", "unused"),
    [
        ("uaua", [("u0", "a1"), ("u2", "a3")], 0),
        ("aua", [("", "a0"), ("u1", "a2")], 0),
        ("uua", [("u0\nu1", "a2")], 0),
        ("uaa", [("u0", "a1"), ("u0", "a2")], 0),
        ("susa", [("u1", "a3")], 2),
        ("uau", [("u0", "a1")], 1),
        ("u", [], 1),
        ("uata", [("u0", "a1"), ("u0", "a3")], 1),
    ],
)
def test_every_answer_is_paired_with_its_question_and_every_turn_accounted_for(
    tmp_path: Path, roles: str, expected: list[tuple[str, str]], unused: int
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [message(names[role], f"{role}{number}") for number, role in enumerate(roles)]
    (record,) = records(wrote(tmp_path, [{"messages": messages, "conversation": "c"}]))
    assert isinstance(record, Conversation)
    assert [(example.prompt, example.completion) for example in record.examples] == expected
    assert record.turns_unused == unused
    assert record.conversation == "c"
