"""`fedge quantize --dry-run`: exact about sizes, quick, and it writes nothing; and the adapter's flags."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from transformers import GPT2Config

from fedge.boards import BOARDS
from fedge.cli import main
from fedge.errors import ConfigError, FedgeError, UnsupportedError, UsageError
from fedge.lora import LoraConfig
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, open_manifest
from quantize.dry_run import forecast
from quantize.lora_flags import add_lora_flags, lora_of
from quantize.source import load


def dry(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["quantize", *map(str, words), "--dry-run", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_weight_file_is_foretold_to_the_byte(
    tiny_model: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dry(capsys, tiny_model, "--format", "int4d")
    manifest = json.loads((tiny_bundle / MANIFEST).read_bytes())
    assert found["weights_bytes"] == (tiny_bundle / WEIGHTS).stat().st_size
    assert found["adapter"]["numbers"] == 2 * 8 * (64 + 32)
    assert found["architecture"] == manifest["architecture"]
    assert [row["board"] for row in found["boards"]] == [board.label for board in BOARDS.values()]
    assert all(row["fits"] and row["seconds_per_step"] >= 0 for row in found["boards"])


def test_boards_are_told_what_the_finished_bundle_would_tell(
    tiny_model: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = dry(capsys, tiny_model, "--format", "int4d")["boards"]
    assert main(["bundle", "plan", str(tiny_bundle), "--json"]) == 0
    assert told == json.loads(capsys.readouterr().out)["boards"]
    assert main(["bundle", "plan", str(tiny_bundle), "--board", "zero2w", "--memory", "50"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["bundle", "plan", str(tiny_bundle), "--rows", "0"]) == 64


@pytest.mark.parametrize("task", ["classify", "embed"])
def test_a_gguf_is_refused_for_another_task_with_what_to_give_instead(tmp_path: Path, task: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    said = f"no bundle to {task} can be made of it, only one to generate.*Leave out --task; to {task}, give"
    with pytest.raises(UsageError, match=said):
        forecast(str(path), LoraConfig(), None, (), task)
    with pytest.raises(UsageError, match=said):
        load(str(path), task=task)


def test_weights_are_not_read_and_nothing_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight file here is rubbish, and no key of a publisher is made."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    before = sorted(tmp_path.rglob("*"))
    assert dry(capsys, folder)["weights_format"] == "int8g"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("kind", "name"), [("Q4_0", "int4d"), ("Q8_0", "int8g"), ("F16", "int8g")])
def test_a_ggufs_header_says_which_format_it_will_be(
    kind: str, name: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    path = write_gguf(tmp_path / "m.gguf", "llama", model, lambda name: gguf.GGMLQuantizationType[kind])
    found = dry(capsys, path)
    assert (found["weights_format"], found["exact"]) == (name, kind != "F16")
    assert ("as it is" in found["reason"]) == (kind != "F16")
    assert kind in found["reason"] or kind != "F16"


def test_a_family_with_turned_matrices_and_fused_queries(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=304, n_positions=64, eos_token_id=0)
    tiny.write_model(tmp_path, config)
    found = forecast(str(tmp_path), LoraConfig(r=4, targets=("c_attn",)), None)
    assert found.adapter["numbers"] == 2 * 4 * 192
    with pytest.raises(ConfigError, match="c_attn"):
        forecast(str(tmp_path), LoraConfig(), None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "never run"),
        ({"architectures": ["UnheardOfForCausalLM"]}, "Supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_quantising_would_refuse_is_refused(
    change: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    """`trust_remote_code` is not there to be given: a model that needs code of its own is refused by its config."""
    config = json.loads((tiny_model / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedError, match=said):
        forecast(str(tmp_path), LoraConfig(), None)


def test_code_that_comes_with_a_model_is_never_run(tiny_model: Path, tmp_path: Path) -> None:
    """Also when the weights are there and quantising is asked for in earnest."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_bytes())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert main(["quantize", str(folder), "--out", str(tmp_path / "out"), "--quiet"]) == 67
    assert not (tmp_path / "ran").exists()
    assert main(["quantize", str(folder), "--out", str(tmp_path / "out"), "--trust-remote-code"]) == 64


def test_pickled_weights_are_not_opened(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["quantize", str(folder), "--out", str(tmp_path / "out"), "--quiet"]) == 67
    save_file(
        load_file(tiny_model / "model.safetensors"), tmp_path / "still-good"
    )  # the copy was a whole one


def test_a_dry_run_of_a_name_on_the_hub_says_what_to_do() -> None:
    assert main(["quantize", "nobody/nothing-here", "--dry-run"]) == 67


def test_an_output_is_needed_unless_it_is_dry(tiny_model: Path) -> None:
    assert main(["quantize", str(tiny_model)]) == 64
    assert main(["quantize", str(tiny_model), "--out", str(tiny_model)]) == 64


# ---------------------------------------------------------------- flags
def flags(*words: str) -> LoraConfig:
    parser = argparse.ArgumentParser()
    add_lora_flags(parser)
    return lora_of(parser.parse_args(words))


def test_flags_mean_what_peft_means() -> None:
    assert flags() == LoraConfig()
    assert flags("--lora-targets", "all-linear", "--rslora").targets == "all-linear"
    assert flags("--lora-targets", r".*\.(q|v)_proj").targets == r".*\.(q|v)_proj"
    assert flags("--lora-targets", " q_proj , mlp.down_proj").targets == ("q_proj", "mlp.down_proj")
    assert flags("--lora-layers", "0,4-6").layers == (0, 4, 5, 6)
    made = flags(
        "--rank-pattern", "q_proj=4", "--rank-pattern", "layers.0.mlp.up_proj=2", "--alpha-pattern", "k=1.5"
    )
    assert made.rank_pattern == {"q_proj": 4, "layers.0.mlp.up_proj": 2}
    assert made.alpha_pattern == {"k": 1.5}


@pytest.mark.parametrize(
    "words",
    [
        ("--lora-rank", "0"),
        ("--lora-layers", "5-2"),
        ("--lora-layers", "a"),
        ("--lora-layers", "0-99999"),
        ("--rank-pattern", "q_proj"),
        ("--rank-pattern", "q_proj=many"),
        ("--rank-pattern", "=4"),
        ("--lora-targets", "(a+)+b"),
        ("--lora-targets", "q_proj)"),
        ("--lora-targets", ".*", "--lora-layers", "1"),
    ],
)
def test_flags_that_cannot_be_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(FedgeError):
        flags(*words)


def test_a_wrong_memory_is_refused(tiny_model: Path) -> None:
    assert main(["quantize", str(tiny_model), "--dry-run", "--memory", "0"]) == UsageError.exit_code


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "bare"])
def test_a_classifier_is_foretold_with_its_head(
    classifier_folder: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = classifier_folder(name)
    bundle = folder / "bundle"
    made = open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())
    names = ("--classes", ",".join(made.classes)) if name == "bare" else ()
    found = dry(capsys, folder / "model", "--format", made.weights_format, "--lora-rank", made.lora.r, *names)
    assert found["weights_bytes"] == (folder / "bundle" / WEIGHTS).stat().st_size
    assert found["adapter"]["numbers"] == made.layout.numbers


def test_a_bare_encoder_needs_names_and_a_causal_model_takes_none(
    classifier_folder: Callable[[str], Path], tiny_model: Path
) -> None:
    with pytest.raises(UsageError, match="name the classes"):
        forecast(str(classifier_folder("bare") / "model"), LoraConfig(), None)
    with pytest.raises(UsageError, match="tells no classes apart"):
        forecast(str(tiny_model), LoraConfig(), None, ("yes", "no"))
