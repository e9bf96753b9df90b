"""`fedge agent generate` and `fedge agent chat` as a person types them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from edge_agent.bundle import open_bundle
from edge_agent.generator import Decoding
from edge_agent.generator_cli import _require_chat
from fedge.cli import main
from fedge.errors import UsageError
from fedge.io.adapter_file import adapter_of, write_adapter


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["agent", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_text_goes_to_standard_output_and_what_is_said_of_it_elsewhere(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, "generate", str(tiny_bundle), "the quick", "--max-tokens", "5", "--threads", "1"
    )
    found = json.loads(
        run(capsys, "generate", str(tiny_bundle), "the quick", "--max-tokens", "5", "--json")[1]
    )
    assert code == 0
    assert out == found["text"] + "\n"
    assert found["ending"] in err
    assert found["tokens"] <= 5


def test_an_adapter_file_changes_what_is_written(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    b = np.random.default_rng(3).normal(0, 3, manifest.layout.numbers).astype(np.float32)
    write_adapter(tmp_path / "a.safetensors", adapter_of(manifest, b, a_seed=bytes(16)))
    words = ["generate", str(tiny_bundle), "the quick", "--max-tokens", "12", "--json"]
    bare = json.loads(run(capsys, *words)[1])
    adapted = json.loads(run(capsys, *words, "--adapter", str(tmp_path / "a.safetensors"))[1])
    assert adapted["text"] != bare["text"]


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        _require_chat(None)


def test_a_prompt_may_come_from_standard_input(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick"))
    assert run(capsys, "generate", str(tiny_bundle), "-", "--max-tokens", "3")[0] == 0


def test_a_conversation_ends_with_its_input(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("how are you\nand the hen\n"))
    code, out, _ = run(capsys, "chat", str(tiny_bundle), "--max-tokens", "3")
    assert code == 0
    assert out.count("\n") >= 2


def test_what_no_longer_fits_a_conversation_is_forgotten_from_its_beginning(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F13: 128 positions and a conversation of more."""
    monkeypatch.setattr("sys.stdin", io.StringIO("how are you today my friend i am fine\n" * 12))
    code, _, err = run(capsys, "chat", str(tiny_bundle), "--max-tokens", "6")
    assert code == 0
    assert "forgotten" in err


@pytest.mark.parametrize("word", ["generate", "chat"])
def test_ctrl_c_ends_the_answer_without_a_traceback(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    whole, calls = Decoding.read, []

    def read(self: Decoding, ids: list[int]) -> np.ndarray:
        calls.append(ids)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(Decoding, "read", read)
    monkeypatch.setattr("sys.stdin", io.StringIO("how\n"))
    words = [word, str(tiny_bundle), *(["the quick"] if word == "generate" else []), "--temperature", "9"]
    code, out, err = run(capsys, *words)
    assert code == (130 if word == "generate" else 0)
    assert out.endswith("\n")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["the", "--temperature", "-1"], "temperature must be"),
        ([""], "no prompt"),
        (["the " * 300], "position table"),
        (["the", "--adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = run(capsys, "generate", str(tiny_bundle), *words)
    assert code not in (0, 70)
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
