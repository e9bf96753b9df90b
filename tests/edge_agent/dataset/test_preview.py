"""`fedge agent data`: the owner sees what would be learnt before anything is (F15)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from letters import BRACKETS, EOS, Letters, wrote

from edge_agent.data_cli import reading_of, words_of
from edge_agent.dataset import Reading
from edge_agent.dataset.preview import Part, lines, look, preview, shown
from fedge.cli import main
from fedge.errors import UsageError
from fedge.messages import Template

LINES = [{"prompt": "p" * (1 + i % 30), "completion": "yes \x1b[2J"} for i in range(50)]


def text(path: Path, *, colour: bool = False, **how: object) -> str:
    found = preview(
        path,
        Template(prompt="<{prompt}>", completion="{completion}"),
        Letters(),
        eos_id=EOS,
        window=32,
        reading=Reading(**how),
        chat=BRACKETS,
    )
    return "\n".join(lines(found, colour=colour))


def test_counts_lengths_and_examples_are_shown(tmp_path: Path) -> None:
    path = wrote(
        tmp_path, [*LINES, {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": "y" * 99}]
    )
    said = text(path)
    assert f"{path}: json-lines, 52 conversations" in said
    assert "examples: 52, of which 50 are learnt in 50 rows" in said
    assert "1 left out: the answer alone does not fit the window" in said
    assert "1 left out: the answer has no text" in said
    assert said.count("\nexample ") == 3
    assert "<p>[[yes \\x1b[2J\\x02]]" in said  # an escape sequence does not reach the terminal
    bars = [line for line in said.splitlines() if "#" in line]
    assert sum(int(line.split()[-1]) for line in bars) == 50
    assert "\033[32myes" in text(path, colour=True)


def test_the_learnt_share_is_that_of_the_rows(tmp_path: Path) -> None:
    found = preview(
        wrote(tmp_path, [{"prompt": "abc", "completion": "de"}]),
        Template(prompt="{prompt}", completion="{completion}"),
        Letters(),
        eos_id=EOS,
        window=32,
        reading=Reading(),
    )
    assert (found.tokens, found.learnt, found.lengths) == (6, 3, [6])
    assert found.examples == [[Part("abc", False), Part("de\x02", True)]]


def test_bad_lines_and_labels_are_shown(tmp_path: Path) -> None:
    said = text(wrote(tmp_path, '{"prompt": "a", "completion": "b"}\n{\n'), skip_lines=1)
    assert "passed over: 1 bad records; the first: " in said
    found = preview(
        wrote(tmp_path, [{"text": "a", "label": "x"}] * 3),
        Template(),
        Letters(),
        eos_id=EOS,
        window=32,
        reading=Reading(),
        classes=("y", "x"),
    )
    assert found.labels == {"x": 3}
    assert "  label x: 3" in list(lines(found, colour=False))


def test_without_a_bundle_the_file_alone_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = wrote(tmp_path, "Frage;Antwort\n" + "q;a\n" * 6)
    words = ["agent", "data", str(path), "--columns", "prompt=Frage,completion=Antwort"]
    assert main(words) == 0
    assert "table, 6 conversations" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["records"] == 6
    assert main(["agent", "data", str(path)]) == 65
    assert "looks like a table of 2 columns" in capsys.readouterr().err
    assert look(path, Reading(form="text")).kinds == {"Passage": 1}


def test_with_a_bundle_the_rows_are_those_of_training(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wrote(tmp_path, [{"prompt": "how are you", "completion": "i am fine"}] * 3)
    assert main(["agent", "data", str(path), "--bundle", str(tiny_bundle)]) == 0
    assert "Friend: how are you\nMe:[[ i am fine<end>]]" in capsys.readouterr().out
    assert main(["agent", "data", str(path), "--bundle", str(tiny_bundle), "--window", "4096"]) == 64
    assert "it knows no more positions" in capsys.readouterr().err  # F13
    assert main(["agent", "data", str(path), "--bundle", str(tiny_bundle), "--chat"]) == 0
    assert "user: how are you<end>assistant: [[i am fine<end>]]" in capsys.readouterr().out


def test_whole_conversations_are_trained_on_as_the_bundle_writes_them(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": role, "content": "how are you and the fox"} for role in ("user", "assistant") * 2]
    path = wrote(tmp_path, [{"messages": turns, "conversation": f"c {i}"} for i in range(15)])
    words = [
        str(tiny_bundle),
        str(path),
        "--chat",
        "--window",
        "100",
        "--steps",
        "6",
        "--threads",
        "1",
        "--json",
    ]
    assert main(["agent", "train-once", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["training_rows"], found["held_out_rows"]) == (12, 3)
    assert found["loss_after"] < found["loss_before"]


# ---------------------------------------------------------------- the flags
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--form", "table", "--columns", "prompt=a b,completion=2", "--separator", "tab", "--no-header"],
        ["--roles", "Alice=user,Bob=assistant", "--join-runs", "--skip-bad", "5"],
        ["--skip-bad", "2.5%"],
    ],
)
def test_the_flags_are_what_they_were_when_written_for_a_service(words: list[str]) -> None:
    import argparse

    from edge_agent.data_cli import add_reading

    parser = argparse.ArgumentParser()
    add_reading(parser)
    reading = reading_of(parser.parse_args(words))
    assert words_of(reading) == words


@pytest.mark.parametrize("skip", ["-1", "x", "101%", "%"])
def test_nonsense_in_a_flag_is_refused(skip: str, tmp_path: Path) -> None:
    from edge_agent.dataset.choices import pairs_from, skip_from

    with pytest.raises(UsageError, match="bad lines"):
        skip_from(skip)
    with pytest.raises(UsageError, match="NAME=VALUE"):
        pairs_from("a=b,c", "columns")


def test_what_is_shown_cannot_steer_a_terminal() -> None:
    assert shown("a\x1b[31m\r\n\tb\u202eü") == "a\\x1b[31m\\r\n\tb\\u202eü"
