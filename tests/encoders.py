"""Small random classifiers of the encoder families under test, with heads of one and of two layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tiny

CLASSES: Final = ("lights", "music", "weather")
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,  # at 0.02 attention is all but uniform, and a mistake in it would not show
    "pad_token_id": 1,
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """A configuration, the transformers class that makes the model of it, and the names of query and value."""

    config: Callable[[], Any]
    model: str
    targets: tuple[str, ...]


def _config(name: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        names = dict(enumerate(CLASSES))
        return getattr(transformers, name)(
            **sizes, id2label=names, label2id={label: index for index, label in names.items()}
        )

    return make


_DISTIL: Final[dict[str, Any]] = {
    "vocab_size": 304,
    "dim": 64,
    "hidden_dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 1,
}
ENCODERS: Final[dict[str, Encoder]] = {
    "bert": Encoder(_config("BertConfig", **_SIZES), "BertForSequenceClassification", ("query", "value")),
    "roberta": Encoder(
        _config("RobertaConfig", **_SIZES, type_vocab_size=1),
        "RobertaForSequenceClassification",
        ("query", "value"),
    ),
    "distilbert": Encoder(
        _config("DistilBertConfig", **_DISTIL), "DistilBertForSequenceClassification", ("q_lin", "v_lin")
    ),
    "llama": Encoder(
        _config("LlamaConfig", **{**tiny.SIZES, "pad_token_id": 1}),
        "LlamaForSequenceClassification",
        ("q_proj", "v_proj"),
    ),
    "bare": Encoder(_config("BertConfig", **_SIZES), "BertModel", ("query", "value")),
    "mpnet": Encoder(_config("MPNetConfig", **_SIZES), "MPNetModel", ("q", "v")),
}


def write_model(folder: Path, name: str) -> Path:
    """A model folder of random weights; biases and norms are not left at 0 and 1."""
    import torch
    import transformers

    encoder = ENCODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, encoder.model)(encoder.config())
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                torch.nn.init.normal_(value, std=0.1)
            elif value.dim() == 1:
                torch.nn.init.normal_(value, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    _write_tokenizer(folder / "tokenizer.json")
    return folder


# As sentence-transformers saves an encoder: its pooling, and whether length is one; None is a folder that says nothing.
POOLINGS: Final = {"mean": ("mean", True), "cls": ("cls", False), "plain": None, "mpnet": ("mean", True)}


def write_sentences(folder: Path, name: str) -> Path:
    """A bare encoder as `POOLINGS` says; MPNet adds positions to its scores in place, in every layer."""
    write_model(folder, name if name in ENCODERS else "bare")
    made = POOLINGS[name]
    if made is not None:
        write_modules(folder, *made)
    return folder


def write_modules(folder: Path, pooling: str, normalised: bool) -> None:
    """What sentence-transformers writes beside a model."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * normalised)]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{step}"}
        for n, (step, path) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{mode}": name == pooling for mode, name in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **flags, "include_prompt": True})
    )


def _write_tokenizer(path: Path) -> None:
    """`tiny`'s tokenizer that puts a token before and one behind a text, as encoders are used to."""
    from tokenizers import Tokenizer, processors

    tiny.write_tokenizer(path)
    words = json.loads(path.read_text())
    first = next(iter(words["model"]["vocab"]))
    tokenizer = Tokenizer.from_str(json.dumps(words))
    number = tokenizer.token_to_id(first)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {first}", special_tokens=[(first, number)]
    )
    tokenizer.save(str(path))


def twin_of(folder: Path, task: str = "") -> Any:
    """transformers' model of `folder`'s `model` whose weights are what the codes of its `bundle` (int8g) mean."""
    from quantize.formats import FORMATS
    from quantize.source import load
    from quantize.weights import quantise

    source = load(str(folder / "model"), task=task)
    quantise(source, FORMATS["int8g"], lambda phase, fraction: None)
    return source.model


def labelled_rows(count: int, width: int = 14, seed: int = 0) -> Any:
    """A batch of random rows that end early by different lengths, each of a class; nothing is a token's label."""
    from edge_agent.dataset import Batch

    draw = np.random.default_rng(seed)
    ids = draw.integers(2, 300, (count, width))
    mask = np.ones_like(ids)
    for row in range(1, count):
        mask[row, width - row :], ids[row, width - row :] = 0, 1
    return Batch(ids, mask, np.full_like(ids, -100), draw.integers(0, 3, count))


def pairs(count: int, width: int = 14, seed: int = 0, more: int = 0) -> Any:
    """Random texts that end early by different lengths: `count` anchors, what belongs to each, `more` others."""
    from edge_agent.dataset import Batch

    draw, rows = np.random.default_rng(seed), 2 * count + more
    ids = draw.integers(2, 300, (rows, width))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        mask[row, width - row % (width - 3) :], ids[row, width - row % (width - 3) :] = 0, 1
    own = np.where(np.arange(rows) < count, np.arange(rows), -1)
    return Batch(ids, mask, np.full_like(ids, -100), own)


def random_vector(trainer: Any, seed: int = 5) -> np.ndarray:
    """An adapter of small random numbers for a `Trainer`."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal(trainer.layout.numbers) * 0.05).astype(np.float32)
