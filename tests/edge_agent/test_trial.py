"""`fedge agent train-once`: the first thing that a stranger tries on a board."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edge_agent.records import Record, TextExample
from edge_agent.trial import Trial, split, train_once
from fedge.cli import main
from fedge.errors import DataError, IntegrityError, NoInputError
from fedge.messages import Training


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "how are you", "completion": "i am fine and you"}] * 25
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_training_lowers_the_loss_on_what_was_held_out(tiny_bundle: Path, data: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    trial = train_once(
        tiny_bundle, data, steps=4, training=Training(), threads=1, progress=lambda *step: seen.append(step)
    )
    assert trial.loss_after < trial.loss_before
    assert (trial.held_out_rows, trial.training_rows, trial.steps, trial.threads) == (5, 20, 4, 1)
    assert seen[-1][1] == seen[-1][2]
    assert [what for what, *_ in seen].count("training") == 4


def test_the_command_prints_one_object(
    tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "agent",
        "train-once",
        "--bundle",
        str(tiny_bundle),
        "--data",
        str(data),
        "--steps",
        "1",
        "--json",
    ]
    assert main(words) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Trial).steps == 1


def test_whole_conversations_are_held_out() -> None:
    example = (TextExample("a", "b"),)
    records = [Record(line, f"talk {line // 3}", example, 0) for line in range(30)]
    train, held_out = split(records)
    assert {record.conversation for record in held_out} == {"talk 4", "talk 9"}
    assert not {record.conversation for record in train} & {record.conversation for record in held_out}
    unnamed = [Record(line, "", example, 0) for line in range(10)]
    assert [record.line for record in split(unnamed)[1]] == [4, 9]


def test_too_little_data_no_bundle_and_a_spoilt_one(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="fedge quantize"):
        train_once(tmp_path, data, steps=1, training=Training())
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="too little data"):
        train_once(tiny_bundle, few, steps=1, training=Training())
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in tiny_bundle.iterdir():
        content = path.read_bytes()
        (spoilt / path.name).write_bytes(content[:-1] + b"\1" if path.name == "weights.bin" else content)
    with pytest.raises(IntegrityError, match="not what the manifest says"):
        train_once(spoilt, data, steps=1, training=Training())
