"""The command line: light to start, one line for each failure, the exit code that the docs promise."""

import argparse
import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge import cli, errors

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "numpy",
    "onnxruntime",
    "paho",
    "cryptography",
    "msgspec",
    "torch",
    "sqlalchemy",
    "importlib.metadata",
)

Run = Callable[[argparse.Namespace], int | None]


@pytest.fixture
def word(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Makes `fedge work` run the given function."""

    def install(run: Run) -> None:
        def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
            parser = subparsers.add_parser("work")
            parser.add_argument("--times", type=int)
            parser.set_defaults(run=run)

        monkeypatch.setattr(cli, "COMMANDS", (cli.Command("work", "nowhere:register", "works", (), "hub"),))
        monkeypatch.setattr(cli, "_load", lambda target: register)

    return install


def raising(error: BaseException) -> Run:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


def test_nothing_heavy_is_loaded_before_a_command_runs() -> None:
    program = "import sys; from fedge.cli import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert re.fullmatch(r"fedge \d+\.\d+\.\d+", version)
    assert not set(HEAVY) & set(modules.split())


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_word_and_a_first_step(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command.word} +{re.escape(command.about)}$", text, re.MULTILINE)
    assert "fedge sim demo" in text


def test_our_words_are_also_the_entry_points_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][cli.GROUP] == {command.word: command.target for command in cli.COMMANDS}
    for command in cli.COMMANDS:
        assert not command.extra or command.extra in project["optional-dependencies"]


def test_a_wrong_word_is_told_the_nearest_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quantise"]) == 64
    assert "fedge quantize" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 64
    assert "fedge --help" in capsys.readouterr().err


def test_a_wrong_flag_is_one_line_that_points_at_the_help(
    word: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    word(lambda arguments: None)
    assert cli.main(["work", "--times", "many"]) == 64
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "fedge work --help" in text


def test_a_command_returns_its_own_code_and_none_means_success(word: Callable[[Run], None]) -> None:
    word(lambda arguments: 3)
    assert cli.main(["work"]) == 3
    word(lambda arguments: None)
    assert cli.main(["work"]) == 0


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            errors.DataError("bad line", field="line", value=7, hint="Mend it"),
            65,
            "bad line (line=7). Mend it",
        ),
        (errors.ProtocolError("stale", "round is old"), 76, "round is old"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.EADDRINUSE, "Address already in use"), 69, "port is taken"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 69, "no connection"),
        (OSError(errno.EMFILE, "Too many open files"), 69, "ulimit"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            74,
            "cannot use /x/y: Permission denied",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), 74, "/x/y"),
        (OSError(errno.ENOSPC, "No space left on device", "/"), 74, "bytes free"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "cannot write"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), 66, "/x/y does not exist"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 69, "pip install 'fedge[hub]'"),
        (KeyError("oops"), 70, "KeyError: 'oops'. This is a bug"),
        (ValueError("two\nlines"), 70, "ValueError: two. This is a bug"),
    ],
)
def test_every_failure_is_one_line_and_a_code(
    word: Callable[[Run], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    word(raising(error))
    assert cli.main(["work"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("fedge: ")
    assert text in shown
    assert shown.count("\n") == 1


def test_debug_shows_the_trace_wherever_it_stands(word: Callable[[Run], None]) -> None:
    word(raising(errors.DataError("bad line")))
    for words in (["--debug", "work"], ["work", "--debug"]):
        with pytest.raises(errors.DataError):
            cli.main(words)


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fedge", "models", "list"],
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (cli.BROKEN_PIPE_CODE, b"")


def test_the_list_for_programs_has_what_a_program_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "list", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in models] == ["smollm2-135m", "all-minilm-l6-v2"]
    assert {model["licence"] for model in models} == {"Apache-2.0"}


def test_a_group_without_an_action_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data"])
    assert stopped.value.code == 0
    assert "fedge data pull chitchat" in capsys.readouterr().out


def _classes(root: type[errors.FedgeError]) -> list[type[errors.FedgeError]]:
    return [root, *(found for child in root.__subclasses__() for found in _classes(child))]


def test_the_exit_codes_in_the_docs_are_those_of_the_error_classes() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    documented = {
        name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    }
    classes = [found for found in _classes(errors.FedgeError) if found.__module__ == errors.__name__]
    assert documented == {found.__name__: found.exit_code for found in classes}
    others = {int(code) for code in re.findall(r"^\| (\d+) \| \|", page, re.MULTILINE)}
    assert others == {0, cli.INTERRUPTED_CODE, cli.BROKEN_PIPE_CODE}
