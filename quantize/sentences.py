"""Sentence encoders: a model whose output is one vector of a text, and the folder that says how it is made.

A folder of sentence-transformers (Reimers and Gurevych 2019, arXiv 1908.10084) says it in `modules.json` and in the
`config.json` of its pooling: the mean of the last hidden states over the text, or the state of the first token, then
length one or not. Any other encoder gets the mean, of length one. What a folder asks for beyond that is refused by
file and field: vectors of another kind would look right and be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fedge.errors import DataError, UnsupportedError
from fedge.release import SentenceVectors
from quantize.checkpoint import read_checkpoint

MODULES: Final = "modules.json"
_POOLING_CONFIG: Final = "config.json"
_ENCODER_CONFIG: Final = "sentence_bert_config.json"
_PROMPTS: Final = "config_sentence_transformers.json"
_STEPS: Final = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_MODES: Final[dict[str, Literal["mean", "cls"]]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_MODE: Final = "pooling_mode"
_HINT: Final = "Handled: the mean over the text or the first token, then length one or not"


class BareEncoder(nn.Module):
    """An encoder without a head of its own, in `model`; whoever inherits says what is made of its hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.model = model.config, model
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # of the first token, and read by nobody here

    @staticmethod
    def read(folder: Path) -> Any:
        """The encoder in a model folder; what else is in it is left. Raises DataError."""
        return read_checkpoint(AutoModel, folder, optional=("pooler.",), surplus=True)

    def get_input_embeddings(self) -> Any:
        """The table of token embeddings."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: there is no matrix to the vocabulary."""

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last hidden states [B, S, D] of ids [B, S]."""
        found: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return found


class SentenceEncoder(BareEncoder):
    """An encoder and what is made of its last hidden states: `logits` [B, D] are the vectors of B texts."""

    # PEFT's names are those of the encoder by itself.
    within: Final = "model."

    def __init__(self, model: Any, vectors: SentenceVectors) -> None:
        super().__init__(model)
        self.makes = vectors

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> SequenceClassifierOutput:
        """Vectors [B, D] of ids [B, S]."""
        hidden = self.hidden(input_ids, attention_mask)
        found = mean_of(hidden, attention_mask) if self.makes.pooling == "mean" else hidden[:, 0]
        return SequenceClassifierOutput(logits=of_length_one(found) if self.makes.normalised else found)


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, D]: the mean of hidden states [B, S, D] over the text."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def of_length_one(vectors: Tensor) -> Tensor:
    """The rows of [B, D], each of length one; spelt out, because the derivative of a norm is a longer graph."""
    return vectors / (vectors * vectors).sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def open_sentences(folder: Path, vectors: SentenceVectors) -> SentenceEncoder:
    """The encoder in a model folder. Raises DataError."""
    return SentenceEncoder(SentenceEncoder.read(folder), vectors).eval()


def outline_sentences(config: Any, vectors: SentenceVectors) -> SentenceEncoder:
    """The same with shapes and without values."""
    with torch.device("meta"):
        return SentenceEncoder(AutoModel.from_config(config), vectors)


def says_vectors(folder: Path) -> bool:
    """Whether the folder is one of sentence-transformers."""
    return (folder / MODULES).is_file()


def vectors_of(folder: Path) -> SentenceVectors:
    """What the folder says of its vectors. Raises UnsupportedError and DataError naming file and field."""
    _check_texts(folder)
    if not says_vectors(folder):
        return SentenceVectors()
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise DataError(f"{MODULES} is no list of modules", field="model", value=str(folder))
    steps = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if steps not in _STEPS:
        raise UnsupportedError(
            f"{MODULES}: these steps from text to vector are not handled",
            field="type",
            value=", ".join(steps),
            hint=_HINT,
        )
    if modules[0].get("path"):
        raise UnsupportedError(
            f"{MODULES}: the encoder is not in the folder itself",
            field="path",
            value=modules[0]["path"],
            hint="Load it with a newer sentence-transformers and save it again",
        )
    path = folder / str(modules[1].get("path")) / _POOLING_CONFIG
    return SentenceVectors(_pooling(path, _object(path)), normalised=len(steps) == len(_STEPS[1]))


def _pooling(path: Path, fields: Mapping[str, object]) -> Literal["mean", "cls"]:
    where = f"{path.parent.name}/{path.name}"
    named = fields.get(_MODE)  # newer files name the modes, older ones have a flag for each
    if named is not None:
        modes = [f"{_MODE}_{name}" for name in (named if isinstance(named, list) else [named])]
        known = {f"{_MODE}_{name}": name for name in _MODES.values()}
    else:
        modes = [name for name, value in fields.items() if name.startswith(f"{_MODE}_") and value]
        known = dict(_MODES)
    if len(modes) != 1 or modes[0] not in known:
        raise UnsupportedError(
            f"{where}: this pooling is not handled",
            field=_MODE if named is not None else next((m for m in modes if m not in known), _MODE),
            value=named if named is not None else ", ".join(modes) or "none",
            hint=_HINT,
        )
    if fields.get("include_prompt") is False:
        raise UnsupportedError(
            f"{where}: a prompt that is left out of the mean is not handled",
            field="include_prompt",
            value=False,
        )
    return known[modes[0]]


def _check_texts(folder: Path) -> None:
    """What is done to a text before it is read."""
    for name, field, plain in (
        (_ENCODER_CONFIG, "do_lower_case", (None, False)),
        (_PROMPTS, "default_prompt_name", (None,)),
    ):
        value = _object(folder / name).get(field) if (folder / name).is_file() else None
        if value not in plain:
            raise UnsupportedError(
                f"{name}: texts are given to the tokenizer as they are",
                field=field,
                value=value,
                hint="Set it to null and write texts as the model shall read them",
            )


def longest_said(folder: Path) -> int:
    """After how many tokens the folder has texts cut, 0 where it does not say."""
    path = folder / _ENCODER_CONFIG
    value = _object(path).get("max_seq_length") if path.is_file() else None
    if value is None:
        return 0
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{_ENCODER_CONFIG}: not a number of tokens", field="max_seq_length", value=value)
    return value


def _object(path: Path) -> dict[str, Any]:
    found = _read(path)
    if not isinstance(found, dict):
        raise DataError(f"{path.name} is not a JSON object", field="model", value=str(path))
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError("a file of the model cannot be read", field="model", value=str(path)) from error
    except ValueError as error:
        raise DataError(f"{path.name} is not JSON", field="model", value=str(path)) from error
