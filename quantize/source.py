"""Where a model comes from: a GGUF file, a model folder or a hub id, all to one `Source`.

Rule: what cannot be handled is refused from its configuration alone, before a single weight is read; and no code
that came with a model is ever run (`trust_remote_code` stays off, weights are safetensors or GGUF, never pickles).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from fedge.audio import AudioInput
from fedge.errors import DataError, NoInputError, UnavailableError, UnsupportedError, UsageError
from fedge.io.model_source import ModelSource, resolve_model
from fedge.release import SentenceVectors
from quantize import tokenizer as tokenizers
from quantize.anatomy import Anatomy, dissect
from quantize.audio import check_audio_config, is_audio, open_audio
from quantize.chat_template import template_in, tokens_in
from quantize.checkpoint import read_checkpoint
from quantize.encoders import open_classifier, task_for, task_of
from quantize.formats import Parts
from quantize.sentences import longest_said, open_sentences, vectors_of
from quantize.supported import check_config, kind_of

_HUB_FILES: Final = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.json",
    "README.md",
]
# What a folder must hold for a task.
_MAKERS: Final = {
    "generate": "a causal LM",
    "classify": "an encoder, with --classes, or of a classifier",
    "embed": "an encoder of texts",
}
_README_LICENCE: Final = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)  # without slots: a property is cached
class Source:
    """A causal LM, a classifier or a sentence encoder in float32 with eager attention, ready to be taken apart.

    `exact` holds matrices that already lie on a grid of ours: parameter name -> (format name, parts).
    """

    model: Any  # transformers.PreTrainedModel
    architecture: str
    tokenizer: bytes
    name: str
    licence: str
    sha256: str
    eos_id: int
    pad_id: int
    exact: dict[str, tuple[str, Parts]] = field(default_factory=dict)
    chat_template: str = ""
    template_tokens: dict[str, str] = field(default_factory=dict)  # special tokens that the template names
    classes: tuple[str, ...] = ()  # of a classifier, by index
    audio: AudioInput | None = None  # what a classifier of sound hears; such a source has no tokenizer
    vectors: SentenceVectors | None = None  # what a sentence encoder makes of a text
    tokens_max: int = 0  # after so many its maker has texts cut; 0 = as the model takes them

    @property
    def task(self) -> str:
        """What its bundle is for: one of `fedge.release.TASKS`."""
        return task_for(self.classes, self.vectors)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its parts. Raises UnsupportedError naming what was not found."""
        return dissect(self.model)


def load(text: str, classes: Sequence[str] = (), seconds: float = 0, task: str = "") -> Source:
    """The model that `text` names (registered name, .gguf file, folder, hub id); `classes` are names for its outputs.

    `seconds` are what a model of sound shall hear at once, 0 = all that it can; `task` as `encoders.task_of` has it.

    Raises NoInputError, DataError, UnsupportedError, or UnavailableError when the hub cannot be reached.
    """
    place = resolve_model(text)
    if place.kind == "gguf":
        from quantize.gguf_source import load_gguf

        assert place.path is not None
        if classes:
            raise no_classes(place.path.name)
        if seconds:
            raise no_seconds(place.path.name)
        if task not in ("", "generate"):
            raise other_task(place.path.name, task, "generate")
        return load_gguf(place.path, licence=place.licence)
    folder = place.path if place.path is not None else _from_hub(place)
    return _load_folder(
        folder,
        name=place.hub_id or place.name or folder.resolve().name,
        licence=place.licence,
        classes=classes,
        seconds=seconds,
        task=task,
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build_model(config: Any) -> Any:
    """An empty float32 model of a transformers configuration, with the attention that exports."""
    config._attn_implementation = "eager"
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def check_counts(model: Any, eos: int) -> None:
    """Raise DataError unless rows in, rows out, the configuration and the end token speak of one vocabulary.

    The embedding may have more rows than the tokenizer has ids (padding); `tokenizer.check_ids` looks at the rest.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    counts = {"vocab_size": model.config.vocab_size, "embedding": embedding.weight.shape[0]}
    if head is not None:
        counts["head"] = head.weight.shape[0]
    if len(set(counts.values())) > 1:
        raise DataError(
            "configuration, embedding and head count different vocabularies", field="rows", value=counts
        )
    if not 0 <= eos < counts["embedding"]:
        raise DataError("the end-of-text token has no row", field="eos_token_id", value=eos)


def _load_folder(
    folder: Path,
    *,
    name: str,
    licence: str,
    classes: Sequence[str] = (),
    seconds: float = 0,
    task: str = "",
) -> Source:
    config = _read_json(folder / "config.json")
    if is_audio(config):
        if task not in ("", "classify"):
            raise other_task(str(config["model_type"]), task, "classify")
        return _load_audio(folder, config, (name, licence), classes, seconds)
    architecture = check_config(config)
    if seconds:
        raise no_seconds(architecture)
    weights = _weights_of(folder)
    vocabulary = _tokenizer_of(folder)
    tokenizers.check_ids(vocabulary, int(config["vocab_size"]))
    if classes and kind_of(architecture) == "generate":
        raise no_classes(architecture)
    task = task_of(folder, architecture, classes, task)
    vectors = vectors_of(folder) if task == "embed" else None
    if task == "generate":
        eos, pad = _end_and_pad(config, folder)
        model = read_checkpoint(AutoModelForCausalLM, folder)
    else:
        pad = _pad_of(config)
        eos = config["eos_token_id"] if isinstance(config.get("eos_token_id"), int) else pad
        if vectors is not None:
            model = open_sentences(folder, vectors)
        else:
            opened = open_classifier(folder, architecture, classes)
            model, classes = opened.model, opened.classes
    check_counts(model, eos)
    words = (
        _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    files = [folder / "config.json", folder / "tokenizer.json", *weights]
    return Source(
        model=model,
        architecture=architecture,
        tokenizer=vocabulary,
        name=name,
        licence=licence or _licence_of(folder),
        sha256=_digest_of(files),
        eos_id=eos,
        pad_id=pad,
        chat_template=template_in(folder, words),
        template_tokens=tokens_in(words),
        classes=tuple(classes),
        vectors=vectors,
        tokens_max=longest_said(folder) if vectors is not None else 0,
    )


def _load_audio(
    folder: Path, config: dict[str, Any], names: tuple[str, str], classes: Sequence[str], seconds: float
) -> Source:
    """A classifier of sound; `names` are the model's name and its licence."""
    architecture = check_audio_config(config)
    weights = _weights_of(folder)
    opened = open_audio(folder, architecture, classes, seconds)
    return Source(
        model=opened.model,
        architecture=type(opened.model).__name__,
        tokenizer=b"",
        name=names[0],
        licence=names[1] or _licence_of(folder),
        sha256=_digest_of([folder / "config.json", *weights]),
        eos_id=0,
        pad_id=0,
        classes=opened.classes,
        audio=opened.audio,
    )


def _weights_of(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UnsupportedError(
            "no *.safetensors in the model folder",
            field="model",
            value=str(folder),
            hint="Pickled weights are not opened: save the model again with safe_serialization=True",
        )
    return weights


def _pad_of(config: dict[str, Any]) -> int:
    pad = config.get("pad_token_id", 0)
    if not isinstance(pad, int) or pad < 0:
        raise DataError("the model names no padding token", field="pad_token_id", value=pad)
    return pad


def no_classes(what: str) -> UsageError:
    """The refusal of names for the outputs of a causal LM."""
    return UsageError(
        "a causal LM tells no classes apart",
        field="classes",
        value=what,
        hint="Give an encoder, or a checkpoint for sequence classification",
    )


def other_task(what: str, task: str, own: str) -> UsageError:
    """The refusal of a task that such a model cannot have; `own` is the one that it has."""
    return UsageError(
        f"no bundle to {task} can be made of it, only one to {own}",
        field="task",
        value=what,
        hint=f"Leave out --task; to {task}, give the model folder of {_MAKERS[task]}",
    )


def no_seconds(what: str) -> UsageError:
    """The refusal of a window for what does not hear."""
    return UsageError("only a model of sound hears for a while", field="seconds", value=what)


def _from_hub(place: ModelSource) -> Path:
    """Configuration first: a model that is not handled is refused before its weights are downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        first = Path(snapshot_download(place.hub_id, allow_patterns=["config.json"]))
        config = _read_json(first / "config.json")
        check_audio_config(config) if is_audio(config) else check_config(config)
        return Path(snapshot_download(place.hub_id, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:
        raise NoInputError("no such model on the hub", field="model", value=place.hub_id) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UnavailableError(
            "the model hub is out of reach",
            field="model",
            value=place.hub_id,
            hint="Check the network, or give a local folder or GGUF",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NoInputError("a file of the model is missing", field="model", value=str(path)) from error
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON", field="model", value=str(path)) from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} is not a JSON object", field="model", value=str(path))
    return content


def _tokenizer_of(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NoInputError(
            "the model folder has no tokenizer.json",
            field="model",
            value=str(folder),
            hint="Load it with transformers.AutoTokenizer and save_pretrained() into the folder",
        )
    return tokenizers.from_file(path.read_bytes())


def _end_and_pad(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    eos = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if eos is None and generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise DataError("the model names no end-of-text token", field="eos_token_id", value=eos)
    pad = config.get("pad_token_id")
    return eos, pad if isinstance(pad, int) and pad >= 0 else eos


def _licence_of(folder: Path) -> str:
    readme = folder / "README.md"
    found = _README_LICENCE.search(readme.read_text(errors="replace")) if readme.is_file() else None
    return found[1] if found else "unknown"


def _digest_of(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {file_digest(path)}\n".encode())
    return whole.hexdigest()
