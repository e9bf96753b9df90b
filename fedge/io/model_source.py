"""What a user means by a model: a registered name, a local GGUF file, a local model folder, or a hub id.

The rule: a path that exists wins over a name, and nothing is guessed: what is none of the four is refused with the
list of what would be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedge.errors import DataError, NoInputError
from fedge.io import assets
from fedge.io.wheels import Progress

# Hugging Face's own rule for repository names: letters, digits, '-', '_', '.', at most 96 characters each.
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_GGUF_MAGIC: Final = b"GGUF"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from. `path` is set for what is on this disk, `hub_id` for what is not."""

    kind: Literal["gguf", "folder", "hub"]
    path: Path | None = None
    hub_id: str = ""
    licence: str = ""
    name: str = ""  # of a registered model


def resolve_model(text: str, *, progress: Progress | None = None) -> ModelSource:
    """The source that `text` names; a registered name is pulled, a hub id is left to whoever loads it.

    Raises NoInputError (none of the four), DataError (a path that is no model), and what `assets.pull` raises.
    """
    path = Path(text).expanduser()
    if text and path.exists():
        return _local(path)
    for asset in assets.ASSETS:
        if asset.kind == "models" and asset.name == text:
            kind: Literal["gguf", "folder"] = "folder" if asset.source.beside else "gguf"
            pulled = assets.pull("models", text, progress=progress)
            return ModelSource(kind, path=pulled, licence=asset.licence, name=text)
    if _HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return ModelSource("hub", hub_id=text)
    names = ", ".join(asset.name for asset in assets.ASSETS if asset.kind == "models")
    raise NoInputError(
        "no such model",
        field="model",
        value=text,
        hint=f"Give a registered name ({names}), a .gguf file, a folder with config.json, or a hub id owner/name",
    )


def _local(path: Path) -> ModelSource:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(
                "this folder is no model: it has no config.json",
                field="model",
                value=str(path),
                hint="A model folder holds config.json, *.safetensors and tokenizer.json",
            )
        return ModelSource("folder", path=path)
    with path.open("rb") as stream:
        magic = stream.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise DataError(
            "this file is no GGUF",
            field="model",
            value=str(path),
            hint="Give the .gguf file itself, or the folder that holds config.json",
        )
    return ModelSource("gguf", path=path)
