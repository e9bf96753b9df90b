"""`fedge sim` as people type it: real small worlds, what they leave behind, exit codes, help that teaches."""

import json
import re
import signal
from pathlib import Path

import pytest

from fedge.cli import main
from firmware_sim import simulate as simulating
from firmware_sim.rules import hub_rules
from firmware_sim.scenario import ready, ready_text
from firmware_sim.world.outcome import read_world

QUICK = ["--devices", "16", "--days", "0.03", "--crypto", "hashed"]


@pytest.mark.parametrize("name", ["lab", "vineyard", "city", "phones"])
def test_every_ready_scenario_runs_under_the_rules_and_leaves_a_page(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "at-once.toml"
    path.write_text(re.sub("start_hour = .*", "start_hour = 0", ready_text(name)))
    words = ["sim", "world", str(path), "--devices", "24", "--days", "0.08", "--crypto", "hashed", "--check"]
    assert main([*words, "--out", str(tmp_path / "w")]) == 0
    result = read_world(tmp_path / "w")
    assert (result.devices, result.scenario, result.crypto, result.violations) == (24, name, "hashed", [])
    assert result.judged > 0
    assert result.blocs > 0
    assert "No violation" in (tmp_path / "w" / "report.html").read_text()
    assert "Look at" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crcs = []
    for seed, check in (("1", []), ("1", ["--check"]), ("2", [])):
        assert (
            main(["sim", "world", "lab", *QUICK, "--seed", seed, "--json", "--out", str(tmp_path), *check])
            == 0
        )
        crcs.append(json.loads(capsys.readouterr().out)["crc"])
    assert crcs[0] == crcs[1] != crcs[2]


def test_a_copied_scenario_runs_and_faults_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", "scenarios", "vineyard"]) == 0
    copy = tmp_path / "my.toml"
    copy.write_text(capsys.readouterr().out)
    assert copy.read_text() == ready_text("vineyard")
    assert main(["sim", "world", str(copy), *QUICK, "--faults", "off", "--out", str(tmp_path / "w")]) == 0
    assert read_world(tmp_path / "w").faults == {}


def test_ctrl_c_keeps_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, before = simulating._Bar._text, signal.getsignal(signal.SIGINT)

    def press(bar: simulating._Bar, share: float) -> str:
        if share == 0.5:
            signal.raise_signal(signal.SIGINT)
        return text(bar, share)

    monkeypatch.setattr(simulating._Bar, "_text", press)
    assert main(["sim", "world", "lab", *QUICK, "--out", str(tmp_path)]) == 130
    result = read_world(tmp_path)
    assert 0.014 < result.days < 0.016
    assert "ended early" in result.notes[0]
    assert "The run ended early" in (tmp_path / "report.html").read_text()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_broken_rule_is_shown_kept_and_has_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_rules, "LEASE_SECONDS", -1e9)  # no round may last at all
    assert main(["sim", "world", "lab", *QUICK, "--check", "--out", str(tmp_path)]) == 80
    assert (
        "Replay it: fedge sim world lab --devices 16 --days 0.03 --seed 0 --check" in capsys.readouterr().err
    )
    (found,) = read_world(tmp_path).violations
    assert found.invariant == "lease"
    assert "1 violation" in (tmp_path / "report.html").read_text()


def test_compare_takes_folders_and_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "world", "lab", *QUICK, "--out", str(tmp_path / "before")]) == 0
    words = ["sim", "compare", str(tmp_path / "before"), "lab", *QUICK, "--seeds", "2"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [side["name"] for side in found["sides"]] == ["before", "lab"]
    opened = next(row for row in found["rows"]["lab"] if row["figure"] == "sums opened")
    assert (opened["ratio"], opened["seeds"]) == (1.0, 1)  # seed 0 on both sides is the same run
    assert read_world(tmp_path / "out" / "2-lab" / "seed-1").seed == 1
    assert "before" in (tmp_path / "out" / "compare.html").read_text()


def test_plan_answers_what_to_buy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "sim",
        "plan",
        "lab",
        "--buy",
        "pi5=8",
        "--instead",
        "orin=8",
        "--days",
        "0.03",
        "--crypto",
        "hashed",
        "--seeds",
        "2",
    ]
    assert main([*words, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "8 × Pi 5 cost less" in out
    assert "over 2 seeds" in out
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["rows"]["8 × Jetson Orin Nano"][0]["figure"] == "price, boards alone"
    assert read_world(tmp_path / "instead" / "seed-1").classes.keys() == {"orin-nano"}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["world", "lba"], 66, 'no such scenario, did you mean "lab"?'),
        (["world", "not-here.toml"], 66, "cannot read not-here.toml"),
        (["world", "lab", "--devices", "0"], 64, "--devices cannot be that"),
        (["world", "lab", "--days", "nan"], 64, "--days cannot be that"),
        (["world", "lab", "--days", "-1"], 64, "--days cannot be that"),
        (["world", "lab", "--devices", "10000000"], 78, "GiB"),
        (["world", "lab", "--real-training", "b"], 64, "belong together"),
        (["world", "lab", "--devices", "65", "--real-training", "b", "--data", "d"], 78, "at most 64 devices"),
        (["world", "lab", "--crypto", "none"], 64, "invalid choice"),
        (["world", "lab", "--traces", "not-here"], 66, "not-here"),
        (["world"], 64, "SCENARIO"),
        (["scenarios", "zzz"], 66, "ready: city, lab"),
        (["compare", "lab"], 64, "two to 4"),
        (["compare", "lab", "lab", "--seeds", "0"], 64, "--seeds cannot be that"),
        (["plan", "lab", "--buy", "pi5=8"], 64, "--instead"),
        (["plan", "lab", "--buy", "pi5=8", "--instead", "pi9=8"], 64, "no such board"),
        (["plan", "lab", "--buy", "pi5=8", "--instead", "pi4=4"], 78, "a bloc of 8 devices"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_an_exit_code(
    words: list[str], code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sim", *words]) == code
    error = capsys.readouterr().err
    assert told in error
    assert len([line for line in error.splitlines() if line.startswith("fedge:")]) == 1


def test_a_scenario_that_replays_traces_needs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.toml"
    path.write_text('name = "x"\n[[groups]]\nname = "a"\npresence = { kind = "trace" }\n')
    assert main(["sim", "world", str(path), "--out", str(tmp_path)]) == 78
    assert "traces" in capsys.readouterr().err


def test_the_lists_show_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "scenarios"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ready()
    assert main(["sim", "scenarios", "--boards"]) == 0
    assert "orin-nano" in capsys.readouterr().out
    assert main(["sim", "scenarios", "--faults"]) == 0
    assert "power-cut-at-save" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["world", "scenarios", "compare", "plan", "fits", "sweep"])
def test_help_teaches_with_examples(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sim", word, "--help"])
    assert ended.value.code == 0
    assert f"fedge sim {word}" in capsys.readouterr().out.partition("examples:")[2]
