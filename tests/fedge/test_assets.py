"""Fetching by name, with real pip against a folder of wheels made here. No network."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.errors import DataError, IntegrityError, NoInputError, UnavailableError
from fedge.io import assets
from fedge.io.assets import Asset
from fedge.io.model_source import resolve_model
from fedge.io.wheels import Member, WheelFile

CONTENT = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """A wheel with one data file, and code that must never run."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('code of a package was run')")
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes for its index. The cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    wheel = make_wheel(shelf)
    source = WheelFile(
        package="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        file=Member("tiny_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)),
    )
    asset = Asset(name="tiny", kind="models", licence="MIT", note="made in a test", source=source)
    monkeypatch.setattr(assets, "ASSETS", (asset,))
    return asset


@pytest.fixture
def folder(tiny: Asset, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """The same wheel as a model of two files; that the second one is code matters to nobody."""
    code = b"raise SystemExit('code of a package was run')"
    beside = Member("tiny_model/__init__.py", hashlib.sha256(code).hexdigest(), len(code))
    asset = replace(tiny, source=replace(tiny.source, beside=(beside,)))
    monkeypatch.setattr(assets, "ASSETS", (asset,))
    return asset


def change(monkeypatch: pytest.MonkeyPatch, asset: Asset, **fields: Member | tuple[Member, ...]) -> None:
    changed = replace(asset, source=replace(asset.source, **fields))  # type: ignore[arg-type]
    monkeypatch.setattr(assets, "ASSETS", (changed,))


def test_pull_puts_the_named_member_into_the_cache_and_does_nothing_the_second_time(
    tiny: Asset, shelf: Path
) -> None:
    phases: list[str] = []
    path = assets.pull("models", "tiny", progress=lambda phase, done, total: phases.append(phase))
    assert path.read_bytes() == CONTENT
    assert path == assets.cached_path(tiny)
    assert set(phases) == {"download", "unpack"}
    next(shelf.iterdir()).unlink()  # nothing could be fetched any more
    assert assets.pull("models", "tiny", progress=lambda *_: pytest.fail("worked again")) == path
    assert not list(path.parent.glob("*.part"))


def test_a_damaged_cache_is_noticed_named_with_both_hashes_and_fetched_again(tiny: Asset) -> None:
    path = assets.pull("models", "tiny")
    path.write_bytes(b"damaged")
    notes: list[str] = []
    assets.pull("models", "tiny", progress=lambda phase, done, total: notes.append(phase))
    assert path.read_bytes() == CONTENT
    (note,) = (note for note in notes if note.startswith("note: "))
    assert hashlib.sha256(b"damaged").hexdigest() in note
    assert tiny.source.file.sha256 in note


def test_damage_that_keeps_size_and_time_is_found_by_verify(tiny: Asset) -> None:
    path = assets.pull("models", "tiny")
    before = path.stat()
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert assets.pull("models", "tiny").read_bytes() != CONTENT
    assert assets.pull("models", "tiny", verify=True).read_bytes() == CONTENT


def test_a_copied_cache_with_new_times_is_hashed_and_kept(tiny: Asset, shelf: Path) -> None:
    path = assets.pull("models", "tiny")
    os.utime(path, (1, 1))
    next(shelf.iterdir()).unlink()
    assert not assets.is_cached(tiny)
    assert assets.pull("models", "tiny") == path
    assert assets.is_cached(tiny)


def test_a_changed_wheel_is_refused_with_both_hashes_and_nothing_stays(tiny: Asset, shelf: Path) -> None:
    other = make_wheel(shelf, CONTENT[::-1])
    notes: list[str] = []
    with pytest.raises(IntegrityError) as caught:
        assets.pull("models", "tiny", progress=lambda phase, done, total: notes.append(phase))
    assert hashlib.sha256(other.read_bytes()).hexdigest() in str(caught.value)
    assert tiny.source.wheel_sha256 in str(caught.value)
    assert any("fetching it again" in note for note in notes)
    folder = assets.cached_path(tiny).parent
    assert [entry.name for entry in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "fields",
    [
        {"sha256": "0" * 64},
        {"size": len(CONTENT) - 1},
        {"path": "tiny_model/other.gguf"},
    ],
)
def test_a_member_that_is_not_the_stated_one_never_enters_the_cache(
    tiny: Asset, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str | int]
) -> None:
    change(monkeypatch, tiny, file=replace(tiny.source.file, **fields))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError):
        assets.pull("models", "tiny")
    assert [entry.name for entry in assets.cached_path(tiny).parent.iterdir()] == [".lock"]


def test_offline_says_which_package_and_what_to_do(tiny: Asset, shelf: Path) -> None:
    next(shelf.iterdir()).unlink()
    with pytest.raises(UnavailableError, match=r"tiny-model==1\.0.*pip config list"):
        assets.pull("models", "tiny")


def test_an_asset_of_several_files_is_a_folder_of_them_all(folder: Asset, shelf: Path) -> None:
    path = assets.pull("models", "tiny")
    assert path == assets.cached_path(folder)
    assert {file.name for file in path.iterdir()} >= {"__init__.py", "tiny.gguf"}
    assert assets.is_cached(folder)
    named = resolve_model("tiny")
    assert (named.kind, named.path, named.name, named.licence) == ("folder", path, "tiny", "MIT")


@pytest.mark.parametrize("name", ["tiny.gguf", "__init__.py"])
def test_damage_to_any_file_of_a_folder_is_noticed_and_mended(folder: Asset, name: str) -> None:
    path = assets.pull("models", "tiny")
    right = (path / name).read_bytes()
    for damage in (b"damaged", None):
        if damage is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(damage)
        assert not assets.is_cached(folder)
        assets.pull("models", "tiny")
        assert (path / name).read_bytes() == right


def test_a_file_beside_that_is_not_the_stated_one_never_enters_the_cache(
    folder: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stated,) = folder.source.beside
    change(monkeypatch, folder, beside=(replace(stated, sha256="0" * 64),))
    with pytest.raises(IntegrityError):
        assets.pull("models", "tiny")
    assert [entry.name for entry in assets.cached_path(folder).iterdir()] == [".lock"]


def test_what_a_killed_pull_left_is_swept(tiny: Asset) -> None:
    left = assets.cached_path(tiny).parent / ".tiny.gguf.999999999.0.part"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"x")
    assets.pull("models", "tiny")
    assert not left.exists()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(NoInputError, match="smollm2-135m"):
        assets.pull("models", "gpt-5")
    with pytest.raises(NoInputError, match="chitchat"):
        assets.pull("data", "smollm2-135m")


def test_the_table_is_pinned_and_openly_licensed() -> None:
    assert len({(asset.kind, asset.name) for asset in assets.ASSETS}) == len(assets.ASSETS)
    for asset in assets.ASSETS:
        assert len(bytes.fromhex(asset.source.wheel_sha256)) == 32
        assert all(len(bytes.fromhex(member.sha256)) == 32 for member in asset.source.members)
        assert asset.licence in ("Apache-2.0", "MIT")


def test_a_relative_cache_home_is_ignored_as_the_specification_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert assets.cache_folder() == Path.home() / ".cache" / "fedge"


def test_a_model_is_a_name_a_file_a_folder_or_a_hub_id(tiny: Asset, tmp_path: Path) -> None:
    named = resolve_model("tiny")
    assert (named.kind, named.path, named.licence) == ("gguf", assets.cached_path(tiny), "MIT")
    assert named.path is not None
    assert resolve_model(str(named.path)).kind == "gguf"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "model")).path == tmp_path / "model"
    assert (
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


@pytest.mark.parametrize("text", ["", "nothing", "./no/such.gguf", "owner/file.gguf", "a/b/c", "../x", "/x"])
def test_what_is_no_model_is_refused_with_the_choices(tiny: Asset, text: str) -> None:
    with pytest.raises(NoInputError, match=r"tiny.*hub id"):
        resolve_model(text)


def test_a_path_that_holds_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="no GGUF"):
        resolve_model(str(tmp_path / "x.gguf"))
