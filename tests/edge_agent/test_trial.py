"""`fedge agent train-once`: the first thing that a stranger tries on a board."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent import jobs
from edge_agent import trial as trials
from edge_agent.alone import OwnAdapter, rule_and_rate
from edge_agent.dataset import Conversation, Turn, read_records
from edge_agent.planner import Plan
from edge_agent.trial import Trial, by_turns, open_bundle_manifest, split, train_once, write_records
from edge_agent.worker import evaluate
from fedge.cli import main
from fedge.errors import DataError, IntegrityError, NoInputError, StorageError, UnavailableError, UsageError
from fedge.io.adapter_file import adapter_of, layout_of, read_adapter, write_adapter
from fedge.lora import RULES
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, open_manifest
from fedge.rules import RATES


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


def test_a_step_is_planned_by_the_memory_that_is_free(
    tiny_bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[float, float]:
        trial = train_once(tiny_bundle, data, steps=3, training=Training(), threads=1)
        return trial.loss_before, trial.loss_after

    seen: list[int] = []
    found = run()
    for way in (Plan(), Plan(checkpoints="file")):  # the same bits by every exact way

        def chosen(*args: object, way: Plan = way, **_: object) -> Plan:
            seen.append(int(str(args[2])))
            return way

        monkeypatch.setattr(trials, "plan", chosen)
        assert run() == found
    assert all(room > 100e6 for room in seen)
    monkeypatch.undo()
    monkeypatch.setattr(trials, "free_memory_mb", lambda: 20)
    with pytest.raises(UnavailableError, match="20 MB are free here"):
        run()


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
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    records = [Conversation(line, f"talk {line // 3}", turns) for line in range(30)]
    train, held_out = split(records)
    assert {record.conversation for record in held_out} == {"talk 4", "talk 9"}
    assert not {record.conversation for record in train} & {record.conversation for record in held_out}
    unnamed = [Conversation(line, "", turns) for line in range(10)]
    assert [record.line for record in split(unnamed)[1]] == [4, 9]
    assert by_turns(unnamed) == unnamed


def test_the_few_that_measure_are_of_many_conversations() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    records = [Conversation(line, talk, turns) for line, talk in enumerate("aaabbc")]
    assert [record.line for record in by_turns(records)] == [0, 3, 5, 1, 4, 2]


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


def test_the_adapter_is_kept_and_can_be_gone_on_from(tiny_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Two steps, and two more from the file, see more than zero: what was saved is what was evaluated."""
    first, second = tmp_path / "first", tmp_path / "second"
    one = train_once(
        tiny_bundle, data, steps=2, training=Training(a_seed=bytes(range(16))), threads=1, adapter_out=first
    )
    kept = read_adapter(first)
    assert (kept.header.a_seed, kept.header.steps, one.adapter) == (bytes(range(16)), 2, str(first))
    again = train_once(
        tiny_bundle, data, steps=2, training=Training(), threads=1, start=first, adapter_out=second
    )
    assert again.loss_before == one.loss_after
    assert again.loss_after < one.loss_after
    assert (read_adapter(second).header.a_seed, read_adapter(second).header.steps) == (bytes(range(16)), 4)


@pytest.mark.parametrize("rule", ["alternating", "core", "sketch"])
def test_every_rule_trains_alone_and_what_is_kept_is_what_was_evaluated(
    rule: str, tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    """The file is evaluated anew as A and B of `fedit`, which know nothing of the rule that made them."""
    seen: list[tuple[str, int, int]] = []
    made = train_once(
        tiny_bundle,
        data,
        steps=8,
        training=Training(rule=rule, rate=RATES[rule]),
        threads=1,
        progress=lambda *step: seen.append(step),
        adapter_out=tmp_path / "made",
    )
    assert made.loss_after < made.loss_before
    assert made.steps == 8
    assert [step for step in seen if step[0] == "training"] == [("training", n, 8) for n in range(1, 9)]
    kept = read_adapter(tmp_path / "made")
    assert (kept.header.rule, kept.header.a_seed, kept.header.steps) == (rule, b"", 8)
    plain = Training(rule="fedit")
    own = OwnAdapter.of(open_bundle_manifest(tiny_bundle), plain, tmp_path / "made", tiny_bundle / WEIGHTS)
    (tmp_path / "numbers").write_bytes(own.state.tobytes())
    write_records(tmp_path / "held_out.jsonl", split(read_records(data))[1])
    job = jobs.Evaluate(
        bundle=str(tiny_bundle),
        adapter=str(tmp_path / "numbers"),
        data=str(tmp_path / "held_out.jsonl"),
        training=plain,
    )
    again = evaluate(job, lambda answer: None)
    assert again.loss_sum / again.labels == pytest.approx(made.loss_after, abs=1e-5)


def test_rounds_have_all_steps_and_a_basis_costs_at_most_one_of_a_fleet(tiny_bundle: Path) -> None:
    manifest = open_bundle_manifest(tiny_bundle)

    def rounds(rule: str, *steps: int) -> list[list[int]]:
        own = OwnAdapter.of(manifest, Training(rule=rule), None, tiny_bundle / WEIGHTS)
        return [own.rounds(count) for count in steps]

    assert rounds("ffa", 1, 40) == rounds("fedit", 1, 40) == rounds("sketch", 1, 40) == [[1], [40]]
    assert rounds("alternating", 1, 2, 7, 12) == [[1], [1, 1], [4, 3], [4, 4, 4]]
    assert rounds("core", 2, 5, 8, 40) == [[1, 1], [1, 4], [2, 6], [5, 35]]
    with pytest.raises(UsageError, match="two steps"):
        rounds("core", 1)


def test_the_command_goes_on_under_the_rule_of_the_file(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["agent", "train-once", str(tiny_bundle), str(data), "--json", "--threads", "1"]
    assert main([*words, "--rule", "core", "--steps", "4", "--adapter-out", str(first)]) == 0
    one = msgspec.json.decode(capsys.readouterr().out, type=Trial)
    assert main([*words, "--steps", "1", "--from", str(first), "--adapter-out", str(second)]) == 0
    two = msgspec.json.decode(capsys.readouterr().out, type=Trial)
    assert two.loss_before == pytest.approx(one.loss_after, abs=1e-5)
    header = read_adapter(second).header
    assert (header.rule, header.steps, header.a_seed) == ("core", 5, b"")
    assert rule_and_rate(None, None, first) == ("core", RATES["core"])
    assert rule_and_rate("ffa", None, first) == ("ffa", RATES["ffa"])


def test_the_rate_follows_the_rule_unless_it_is_told() -> None:
    assert [rule_and_rate(rule, None, None) for rule in RULES] == [(rule, RATES[rule]) for rule in RULES]
    assert rule_and_rate(None, None, None) == ("ffa", Training().rate)
    assert rule_and_rate("fedit", 0.5, None) == ("fedit", 0.5)


def test_a_target_that_is_something_else_and_a_stranger_to_start_from_are_refused_before_work(
    tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("dear all")
    with pytest.raises(UsageError, match="something else"):
        train_once(tiny_bundle, data, steps=1, training=Training(), adapter_out=letter)
    with pytest.raises(NoInputError):
        train_once(tiny_bundle, data, steps=1, training=Training(), start=tmp_path / "nowhere")
    with pytest.raises(StorageError):
        train_once(tiny_bundle, data, steps=1, training=Training(), adapter_out=tmp_path / "no" / "folder")
    manifest = open_manifest((tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes())
    other = msgspec.structs.replace(manifest, model="another")
    write_adapter(
        tmp_path / "a", adapter_of(other, np.zeros(layout_of(other).numbers, np.float32), a_seed=bytes(16))
    )
    with pytest.raises(IntegrityError, match="another bundle"):
        train_once(tiny_bundle, data, steps=1, training=Training(), start=tmp_path / "a")
    assert letter.read_text() == "dear all"


@pytest.mark.parametrize("words", [["b"], ["b", "d", "--data", "e"], ["--bundle", "b", "b", "d"]])
def test_bundle_and_data_are_given_once_each(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "train-once", *words]) == 64
    assert capsys.readouterr().err.count("\n") == 1
