"""What a stranger gets: the wheel has everything and runs elsewhere, and the README's commands exist."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("fedge-*.whl")
    return path


def test_the_wheel_has_every_file_of_the_five_packages_and_no_other(wheel: Path) -> None:
    """The builder obeys .gitignore, so a careless line there would drop package data without a word."""
    assert PACKAGES == ["fedge", "edge_agent", "hub", "quantize", "firmware_sim"]
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == there
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_runs_where_the_checkout_is_not(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = [sys.executable, "-c", "import fedge; print(fedge.__file__)"]
    script = [sys.executable, str(tmp_path / "site" / "bin" / "fedge"), "--help"]
    found, shown = (
        subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout
        for words in (where, script)
    )
    assert found.startswith(str(tmp_path))
    assert "fedge sim demo" in shown


def test_the_base_install_is_the_agent_and_cannot_pull_torch() -> None:
    names = [re.split(r"[<>=\[]", line)[0] for line in PROJECT["project"]["dependencies"]]
    assert names == ["numpy", "onnxruntime", "paho-mqtt", "cryptography", "msgspec"]


def test_the_lock_for_boards_covers_the_base_install_and_pins_every_line() -> None:
    lines = [line for line in (ROOT / "device.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    locked = {line.partition("==")[0] for line in lines}
    base = {re.split(r"[<>=\[]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert base | {"tokenizers"} <= locked
    assert not {"torch", "tuf", "transformers"} & locked


def test_one_version_of_a_package_is_pinned_in_the_constraints_and_in_run() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    assert set(re.findall(r"torch==([\d.]+)", (ROOT / "run").read_text())) == {pins["torch"]}


def test_the_two_commands_of_the_readme_are_words_of_run() -> None:
    readme, run = (ROOT / "README.md").read_text(), (ROOT / "run").read_text()
    for word in ("demo", "test"):
        assert re.search(rf"^\./run {word}\b", readme, re.MULTILINE)
        assert re.search(rf"^    {word}\)", run, re.MULTILINE)
    for link in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    ("words", "code"), [([], 0), (["help"], 0), (["nonsense"], 64), (["bench"], 64), (["bench", "no"], 64)]
)
def test_run_helps_without_setting_anything_up(tmp_path: Path, words: list[str], code: int) -> None:
    checkout = tmp_path / "a checkout with spaces"
    (checkout / "benchmarks").mkdir(parents=True)
    (checkout / "run").write_text((ROOT / "run").read_text())
    done = subprocess.run(
        ["sh", str(checkout / "run"), *words], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stdout or done.stderr
    assert not (checkout / ".venv").exists()


def test_continuous_integration_calls_exactly_what_a_stranger_calls() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == 'exec "$(dirname "${BASH_SOURCE[0]}")/../run" test'
    assert all(os.access(ROOT / name, os.X_OK) for name in ("run", ".ci/run"))
