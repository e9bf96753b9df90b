"""People out of the chit-chat data set: a small made-up one, and the real one, whose numbers are pinned."""

import json
import stat
from pathlib import Path

import pytest

from edge_agent.dataset import read_records
from fedge.errors import DataError, NoInputError
from firmware_sim.processes.people import (
    HELDOUT_ROWS,
    VALIDATION_ROWS,
    PersonSplit,
    Turn,
    read_people,
    split_people,
    write_person,
)


def encode(text: str) -> list[int]:
    """A stand-in for a tokenizer: one token a word."""
    return [len(word) for word in text.split()]


def message(sender: str, text: str, minute: int = 0) -> dict[str, str]:
    return {"text": text, "timestamp": f"2018-05-02T19:{minute:02d}:00Z", "sender": sender}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ann, Bob and Cid talk pairwise, 80 conversations each pair; Dan says one thing and no more."""
    conversations = {}
    for number in range(240):
        one, other = (("ann", "bob"), ("bob", "cid"), ("cid", "ann"))[number % 3]
        runs = []
        for turn in range(8):
            speaker = one if turn % 2 == 0 else other
            text = (
                f"{speaker} says {turn} things in talk {number}"
                + " again" * (turn % 3)
                + "!" * (speaker == "bob")
            )
            runs.append([message(speaker, text, turn), message(speaker, "haha", turn)])
        conversations[f"{number:08d}-rest-of-the-id"] = {"messages": runs, "start": "x"}
    conversations["99999999-x"] = {"messages": [[message("dan", "hi")], []], "start": "x"}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(conversations))
    return path


def test_people_are_named_by_what_they_wrote_most_first(dataset: Path) -> None:
    people = read_people(dataset)
    assert list(people) == ["user0000", "user0001", "user0002", "user0003"]
    assert people["user0000"][0].completion.startswith("bob")
    assert people["user0003"] == [Turn("99999999", "2018-05-02T19:00:00Z", "", "hi")]


def test_the_prompt_is_the_end_of_the_partners_last_run(tmp_path: Path) -> None:
    runs = [
        [message("ann", "x" * 400), message("ann", "how are you")],
        [message("bob", "fine")],
        [message("bob", "and you")],
        [],
        [message("ann", "well")],
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"0123456789": {"messages": runs}}))
    ann, bob = read_people(path).values()
    assert [turn.prompt for turn in ann] == ["", "", "and you"]
    assert [turn.prompt for turn in bob] == [("x" * 400 + " how are you")[-300:]] * 2


def test_a_conversation_held_out_for_one_is_held_out_for_all(dataset: Path) -> None:
    people = read_people(dataset)
    taking, unseen = split_people(people, 2, 1, encode=encode)
    held = set()
    for person in ("user0000", "user0001", "user0002"):
        held |= set(sorted({turn.conversation for turn in people[person]})[::5])
    for split in [*taking, *unseen]:
        assert len(split.heldout) == len(set(split.heldout)) == HELDOUT_ROWS
        assert len(split.validation) == len(set(split.validation)) == VALIDATION_ROWS
        assert {turn.conversation for turn in split.heldout + split.validation} <= held
        assert not set(split.heldout) & set(split.validation)
        assert not {turn.conversation for turn in split.train} & held
        assert all(turn.completion != "haha" for turn in split.train)


def test_the_same_call_gives_the_same_split(dataset: Path) -> None:
    people = read_people(dataset)
    assert split_people(people, 3, 0, encode=encode) == split_people(people, 3, 0, encode=encode)


def test_lines_that_do_not_fit_the_window_are_left_out(dataset: Path) -> None:
    people = read_people(dataset)
    longest = {}
    for window in (20, 64):
        ((split, *_), _) = split_people(people, 2, 0, encode=encode, window=window)
        longest[window] = max(len(encode(f"Friend: {t.prompt} Me: {t.completion}")) + 1 for t in split.train)
    assert longest == {20: 19, 64: 21}  # with the end token; fewer than the window


def test_too_few_people_say_how_many_there_are(dataset: Path) -> None:
    with pytest.raises(DataError, match="at most 3"):
        split_people(read_people(dataset), 3, 1, encode=encode)


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoInputError):
        read_people(tmp_path / "none.json")
    for text in ("{", "[]", '{"a": {"messages": [[{"text": 1}]]}}'):
        path = tmp_path / "dataset.json"
        path.write_text(text)
        with pytest.raises(DataError, match="fedge data pull chitchat"):
            read_people(path)


def test_written_files_are_private_and_what_the_agent_reads(tmp_path: Path) -> None:
    turns = tuple(Turn("c1", "t", 'said "so"\n', f"line {i} ünï") for i in range(3))
    write_person(tmp_path / "person", PersonSplit("user0000", turns, turns[:1], turns[1:]))
    for name, count in (("train", 3), ("validation", 1), ("heldout", 2)):
        path = tmp_path / "person" / f"{name}.jsonl"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(list(read_records(path))) == count
    record = next(read_records(tmp_path / "person" / "train.jsonl"))
    assert (record.conversation, record.examples[0].prompt) == ("c1", 'said "so"\n')
    assert record.examples[0].completion == "line 0 ünï"


@pytest.mark.real
def test_the_real_data_set_has_its_1315_people() -> None:
    from fedge.io.assets import pull

    people = read_people(pull("data", "chitchat"))
    assert len(people) == 1_315
    assert sum(map(len, people.values())) == 258_145
    first = people["user0000"]
    assert (len(first), first[0].conversation, first[0].timestamp) == (
        23_661,
        "a07edb12",
        "2018-05-02T19:38:29Z",
    )
    taking, unseen = split_people(people, 2, 1, encode=encode)
    assert [split.person for split in [*taking, *unseen]] == ["user0000", "user0001", "user0002"]
