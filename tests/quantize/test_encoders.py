"""Classifiers of several families: what is found in them, what is refused, and the way out to PEFT (field case F05)."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import encoders
import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch
from edge_agent.trainer import Trainer, train_round
from fedge.errors import UnsupportedError, UsageError
from fedge.io.adapter_file import adapter_of, write_adapter
from fedge.lora import LoraConfig
from fedge.release import MANIFEST, SIGNATURE, Manifest, open_manifest
from quantize import classifier_gates
from quantize.adapter_cli import register
from quantize.classifier_gates import ClassifierExam
from quantize.encoders import MeanPooled, check_names, with_targets
from quantize.formats import FORMATS
from quantize.gates import Draft, GateError
from quantize.source import load
from quantize.weights import quantise

SEED = bytes(range(16))
FAMILIES = ("bert", "roberta", "distilbert", "llama", "bare")
HEADS = {
    "bert": (("bert.pooler", "classifier"), 4),
    "roberta": (("classifier",), 4),
    "distilbert": (("classifier", "pre_classifier"), 4),
    "llama": (("score",), 1),
    "bare": (("classifier",), 2),
}
# The reload knows nothing of us but the folders; the head of a bare encoder is the one class of ours that it takes.
_RELOAD = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
for home in sys.argv[1:]:
    labels = json.load(open(home + "/peft/labels.json"))
    if home.endswith("/bare"):
        from quantize.encoders import MeanPooled
        base = MeanPooled.from_folder(home + "/model", len(labels["id2label"]))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(home + "/model")
    tuned = PeftModel.from_pretrained(base, home + "/peft").eval()
    given = np.load(home + "/rows.npz")
    words = {"input_ids": torch.from_numpy(given["ids"]), "attention_mask": torch.from_numpy(given["mask"])}
    with torch.no_grad():
        np.savez(home + "/out.npz", logits=tuned(**words).logits.numpy())
    json.dump(labels["id2label"], open(home + "/said.json", "w"))
"""


def manifest_of(folder: Path) -> Manifest:
    bundle = folder / "bundle"
    return open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())


def rows_of(count: int = 6, width: int = 20) -> Batch:
    draw = np.random.default_rng(0)
    ids = draw.integers(2, 300, (count, width))
    mask = np.ones_like(ids)
    for row in range(1, count):
        mask[row, width - row :], ids[row, width - row :] = 0, 1
    return Batch(ids, mask, np.full_like(ids, -100), np.arange(count) % 3)


# ---------------------------------------------------------------- what is found
@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_becomes_a_bundle_with_its_head_and_names(
    name: str, classifier_folder: Callable[[str], Path]
) -> None:
    manifest = manifest_of(classifier_folder(name))
    modules, tensors = HEADS[name]
    assert (manifest.task, manifest.classes) == ("classify", encoders.CLASSES)
    assert manifest.lora.modules_to_save == modules
    assert manifest.lora.targets == encoders.ENCODERS[name].targets
    assert len(manifest.dense) == tensors
    assert manifest.layout.numbers > sum(np.prod(shape) for shape in manifest.dense.values())
    assert {"classify.onnx", "prologue.onnx", "block_fwd.onnx"} <= manifest.files.keys()
    assert not {"infer.onnx", "ce.onnx", "norm_fwd.onnx"} & manifest.files.keys()
    assert manifest.gates["cut_gradient_error"] <= 1e-5
    assert manifest.gates["gradient_error"] <= 1e-5
    assert manifest.gates["logits_error"] <= 1e-5


def test_positions_are_counted_as_the_family_counts_them(classifier_folder: Callable[[str], Path]) -> None:
    """RoBERTa's first position is the one after the padding token's number: 66 rows take texts of 64 (F13)."""
    assert manifest_of(classifier_folder("roberta")).positions_max == 64
    assert manifest_of(classifier_folder("bert")).positions_max == 66


# ---------------------------------------------------------------- F05
@dataclass(frozen=True, slots=True)
class Answers:
    """Logits of the device before and after training, those of stock PEFT, and the names of the classes there."""

    before: np.ndarray
    after: np.ndarray
    found: np.ndarray
    names: list[str]


@pytest.fixture(scope="module")
def answers(
    classifier_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    """Every family trained, exported, and read again by one process, which takes ten seconds to load its libraries."""
    base, device = tmp_path_factory.mktemp("reload"), {}
    for name in FAMILIES:
        home, folder = base / name, classifier_folder(name)
        home.mkdir()
        bundle = open_bundle(folder / "bundle")
        trainer, batch = Trainer(bundle, a_seed=SEED), rows_of()
        zero = np.zeros(trainer.layout.numbers, np.float32)
        delta = train_round(trainer, zero, [batch] * 12, a_seed=SEED, lr=0.02).delta
        assert all(np.abs(value).max() > 1e-3 for value in trainer.layout.split(delta).values())
        device[name] = [trainer.answers(batch, trainer.layout.split(v)).logits for v in (zero, delta)]
        write_adapter(home / "adapter", adapter_of(bundle.manifest, delta, a_seed=SEED, steps=12))
        export(home / "adapter", home / "peft", folder / "bundle")
        np.savez(home / "rows.npz", ids=batch.ids, mask=batch.mask)
        (home / "model").symlink_to(folder / "model")
    command = [sys.executable, "-c", _RELOAD, *(str(base / name) for name in FAMILIES)]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return {
        name: Answers(
            *logits,
            np.load(base / name / "out.npz")["logits"],
            list(json.loads((base / name / "said.json").read_text()).values()),
        )
        for name, logits in device.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_trained_answers_the_same_after_export_in_stock_peft(
    name: str, answers: dict[str, Answers]
) -> None:
    """F05: every trained tensor is in the delta, in the export and in the reload, whatever the head is made of."""
    before, after, found = answers[name].before, answers[name].after, answers[name].found
    assert answers[name].names == list(encoders.CLASSES)
    # The base there has its source's weights, here those of int8: the answers differ by that and no more.
    assert np.linalg.norm(found - after) <= 0.1 * np.linalg.norm(after)
    assert np.linalg.norm(before - after) > np.linalg.norm(found - after) * 3
    assert (found.argmax(1) == after.argmax(1)).all()


def export(adapter: Path, out: Path, bundle: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    words = ["adapter", "export", str(adapter), str(out), "--bundle", str(bundle), "--to", "peft", "--json"]
    arguments = parser.parse_args(words)
    arguments.run(arguments)


# ---------------------------------------------------------------- gates
def test_a_head_whose_gradient_is_wrong_is_named(
    classifier_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate compares the head's own tensors: a gradient that misses a factor does not pass."""
    folder = classifier_folder("bare")
    manifest = manifest_of(folder)
    source, fmt = load(str(folder / "model"), encoders.CLASSES), FORMATS[manifest.weights_format]
    exam = ClassifierExam.of(source, exact=False, fmt=fmt, lora=manifest.lora)
    quantise(source, fmt, lambda phase, fraction: None)
    draft = Draft(folder / "bundle", manifest.tensors, frozenset(manifest.operators), None, 0)
    assert exam.run(draft, lambda phase, fraction: None) == manifest.gates
    real = classifier_gates.torch_answers

    def doubled(*given: object) -> object:
        loss, logits, gradients = real(*given)  # type: ignore[arg-type]
        return (
            loss,
            logits,
            {n: 2 * g if n.endswith("classifier.weight") else g for n, g in gradients.items()},
        )

    monkeypatch.setattr(classifier_gates, "torch_answers", doubled)
    with pytest.raises(GateError, match="cut_gradient_error"):
        exam.run(draft, lambda phase, fraction: None)


# ---------------------------------------------------------------- refusals
def test_a_bare_encoder_needs_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name the classes.*For sentence vectors: --task embed") as caught:
        load(str(encoders.write_model(tmp_path, "bare")))
    assert "--classes yes,no" in caught.value.hint


def test_names_that_do_not_fit_the_models_own_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tells 3 classes apart, not 2"):
        load(str(encoders.write_model(tmp_path, "bert")), ("yes", "no"))


def test_other_names_for_the_models_own_classes_are_taken(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    assert load(str(encoders.write_model(tmp_path, "bert")), names).classes == names


def test_a_causal_lm_tells_no_classes_apart(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="causal LM"):
        load(str(tiny_model), ("yes", "no"))


def test_a_head_that_chooses_no_class_is_refused(tmp_path: Path) -> None:
    folder = encoders.write_model(tmp_path, "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    with pytest.raises(UnsupportedError, match="choose one of several"):
        load(str(folder))


@pytest.mark.parametrize("names", [("yes", "yes"), ("yes", " "), ("yes",), ("yes", "x" * 201)], ids=str)
def test_names_that_are_none_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        check_names(names)


# ---------------------------------------------------------------- the head of a bare encoder
def test_padding_does_not_enter_the_mean() -> None:
    class Steps(nn.Module):
        config = type("Config", (), {"hidden_size": 2})

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            hidden = input_ids[:, :, None].float() * torch.tensor([1.0, -1.0])
            return type("Output", (), {"last_hidden_state": hidden})

    model = MeanPooled(Steps(), 2)
    nn.init.eye_(model.classifier.weight)
    ids, mask = torch.tensor([[2, 4, 90]]), torch.tensor([[1, 1, 0]])
    assert model(ids, mask).logits.tolist() == [[3.0, -3.0]]


def test_targets_that_were_named_are_left_alone(tmp_path: Path) -> None:
    model = load(str(encoders.write_model(tmp_path, "bert"))).model
    assert with_targets(model, LoraConfig()).targets == ("query", "value")
    assert with_targets(model, LoraConfig(targets=("key",))).targets == ("key",)
    assert with_targets(model, msgspec.structs.replace(LoraConfig(), r=4)).r == 4
