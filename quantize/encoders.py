"""Classifiers: which checkpoints are one, which can become one, and the model that is trained of them.

A checkpoint with a classification head of its own keeps it, whatever the head is made of. A bare encoder, or one with
a language head, gets a fresh one: the mean of its last hidden states over the text (Reimers and Gurevych 2019,
arXiv 1908.10084) and one matrix to the classes. Either way the model takes ids and an attention mask and answers with
`logits` [B, C], and that is all that the rest of this package knows of it.

The rule: names of classes come from the checkpoint or from the user, never from nowhere, and travel with the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from fedge.errors import UnsupportedError, UsageError
from fedge.lora import LoraConfig
from fedge.release import SentenceVectors
from quantize.blocks import linears_of
from quantize.checkpoint import read_checkpoint
from quantize.inputs import hears
from quantize.sentences import BareEncoder, SentenceEncoder, mean_of, says_vectors
from quantize.supported import kind_of
from quantize.watching import layers_of

CLASSES_MAX: Final = 10_000
CLASS_CHARS_MAX: Final = 200
# Query and value under the names that families give them, for users who name no targets.
_TARGETS: Final = (
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("q", "v"),
    ("Wqkv",),
    ("c_attn",),
)
_PROBLEMS: Final = (None, "single_label_classification")


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model that gives `logits` for ids and a mask, and what its outputs are called."""

    model: Any
    classes: tuple[str, ...]


class MeanPooled(BareEncoder):
    """A bare encoder with a fresh head: the mean of the last hidden states over the text, times one matrix.

    For stock PEFT: `PeftModel.from_pretrained(MeanPooled.from_folder(folder, classes), adapter)`.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__(model)
        self.classifier = nn.Linear(model.config.hidden_size, classes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.classifier.weight, std=1 / math.sqrt(model.config.hidden_size))
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def from_folder(cls, folder: str | Path, classes: int) -> MeanPooled:
        """The encoder in a model folder, and a head for so many classes. Raises DataError."""
        return cls(cls.read(Path(folder)), classes).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Any) -> SequenceClassifierOutput:
        """Logits [B, C] of ids [B, S]."""
        mean = mean_of(self.hidden(input_ids, attention_mask), attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(mean))


def task_of(folder: Path, architecture: str, classes: Sequence[str], asked: str = "") -> str:
    """What a model folder is made a bundle for: as the user `asked`, else as the folder says.

    A folder of sentence-transformers without a classifier's head is for vectors, unless classes are named. Raises
    UsageError for what the model cannot be asked.
    """
    kind = kind_of(architecture)
    if not asked and not classes and kind != "classify" and says_vectors(folder):
        return "embed"
    found = "generate" if kind == "generate" else "classify"
    if asked == "embed" and classes:
        raise UsageError(
            "vectors tell no classes apart",
            field="classes",
            value=", ".join(classes[:4]),
            hint="Leave out --classes, or --task embed",
        )
    if asked not in ("", "embed", found):
        raise UsageError(
            f"this model is there to {found}, not to {asked}",
            field="task",
            value=architecture,
            hint=f"--task {found}, or --task embed for sentence vectors",
        )
    return asked or found


def task_for(classes: Sequence[str], vectors: SentenceVectors | None) -> str:
    """One of `fedge.release.TASKS`, from what a model's outputs are: classes, vectors, or else the next token."""
    return "embed" if vectors is not None else "classify" if classes else "generate"


def open_classifier(folder: Path, architecture: str, classes: Sequence[str]) -> Classifier:
    """The classifier in a model folder; `classes` are the user's names for its outputs, empty for its own.

    Raises UsageError when names are needed or do not fit, UnsupportedError for a head that does something else,
    DataError when the folder cannot be loaded.
    """
    if kind_of(architecture) == "encode":
        check_fresh(architecture, classes)
        return Classifier(MeanPooled.from_folder(folder, len(classes)), tuple(classes))
    check_names(classes)
    model = read_checkpoint(AutoModelForSequenceClassification, folder)
    return Classifier(model, check_head(model, classes))


def outline_classifier(config: Any, architecture: str, classes: Sequence[str]) -> Classifier:
    """What `open_classifier` would give, with shapes and without values. Raises the same but DataError."""
    with torch.device("meta"):
        if kind_of(architecture) == "encode":
            check_fresh(architecture, classes)
            return Classifier(MeanPooled(AutoModel.from_config(config), len(classes)), tuple(classes))
        check_names(classes)
        model = AutoModelForSequenceClassification.from_config(config)
        return Classifier(model, check_head(model, classes))


def check_fresh(architecture: str, classes: Sequence[str], *, vectors: bool = True) -> None:
    """Raise UsageError unless the user names what a model without a head shall tell apart.

    `vectors`: whether it could make vectors of texts instead.
    """
    if not classes:
        named = "--classes yes,no or --classes-from FILE, one a line"
        raise UsageError(
            "this model has no head: name the classes that it shall tell apart",
            field="classes",
            value=architecture,
            hint=f"For sentence vectors: --task embed. For a classifier: {named}" if vectors else named,
        )
    check_names(classes)


def check_head(model: Any, classes: Sequence[str]) -> tuple[str, ...]:
    """What the outputs of a model's own head are called: as the user says, else as the model does.

    Raises UnsupportedError for a head that does not choose one of several, UsageError for names that do not fit.
    """
    problem, count = model.config.problem_type, int(model.config.num_labels)
    if problem not in _PROBLEMS or count < 2:
        raise UnsupportedError(
            "only heads that choose one of several classes are handled",
            field="problem_type",
            value=problem or f"{count} output",
        )
    if classes and len(classes) != count:
        raise UsageError(
            f"the model tells {count} classes apart, not {len(classes)}",
            field="classes",
            value=", ".join(classes[:4]),
            hint="Leave --classes out to keep its own, or give the bare encoder to get a fresh head",
        )
    own = tuple(str(model.config.id2label[index]) for index in range(count))
    check_names(own)
    return tuple(classes) or own


def check_names(classes: Sequence[str]) -> None:
    """Raise UsageError unless these can be names of classes: none twice, none empty."""
    twice = [name for name in dict.fromkeys(classes) if list(classes).count(name) > 1] if classes else []
    odd = [name for name in classes if not name.strip() or len(name) > CLASS_CHARS_MAX]
    if twice or odd:
        raise UsageError("a class needs a name of its own", field="classes", value=(twice + odd)[0][:40])
    if classes and not 2 <= len(classes) <= CLASSES_MAX:
        raise UsageError(f"classes must be 2 to {CLASSES_MAX:,}", field="classes", value=len(classes))


def like(model: Any, config: Any) -> Any:
    """An empty model of the same make as `model` for another configuration."""
    config._attn_implementation = "eager"
    how: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if isinstance(model, MeanPooled):
        return MeanPooled(AutoModel.from_config(config, **how), model.classifier.out_features).eval()
    if isinstance(model, SentenceEncoder):
        return SentenceEncoder(AutoModel.from_config(config, **how), model.makes).eval()
    make = AutoModelForAudioClassification if hears(model) else AutoModelForSequenceClassification
    return make.from_config(config, **how).eval()


def with_targets(model: Any, lora: LoraConfig) -> LoraConfig:
    """The config with the family's own names of query and value, where the user named none."""
    last = {path.rpartition(".")[2] for path in linears_of(layers_of(model)[0])}
    if lora.targets != LoraConfig().targets or last.intersection(lora.targets):
        return lora
    found = next((names for names in _TARGETS if last.issuperset(names)), lora.targets)
    return msgspec.structs.replace(lora, targets=found)
