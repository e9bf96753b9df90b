"""A stranger's path, word for word: a model folder of their own, a bundle, some steps, and their own tools again.

    fedge quantize ./my-hf-model --out b
    fedge agent train-once b data.jsonl --steps 20 --adapter-out a
    fedge adapter export a --bundle b --to peft out

Nothing is fetched: the model and its tokenizer are made here, random, with transformers and tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from torch_twin import IGNORE, mean_loss, torch_twin
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch
from edge_agent.trainer import Trainer
from fedge.cli import main
from fedge.io.adapter_file import read_adapter

PAIRS = [
    ("how are you", "i am fine and you"),
    ("the weather", "was the best of the week"),
    ("the fox", "jumps over the hen"),
]


class Walked(NamedTuple):
    """What lies on the stranger's disk when the three commands are through."""

    model: Path
    bundle: Path
    adapter: Path
    peft: Path
    trial: dict[str, Any]


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    home = tmp_path_factory.mktemp("stranger")
    tiny.write_model(home / "my-hf-model", LlamaConfig(**tiny.SIZES))
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS * 10]
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model, bundle, adapter, peft = (home / name for name in ("my-hf-model", "b", "a", "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        run("quantize", model, "--out", bundle, "--quiet")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        run(
            "agent",
            "train-once",
            bundle,
            home / "data.jsonl",
            "--steps",
            20,
            "--adapter-out",
            adapter,
            "--json",
        )
    run("adapter", "export", adapter, "--bundle", bundle, "--to", "peft", peft)
    return Walked(model, bundle, adapter, peft, json.loads(said[-1]))


@pytest.fixture(scope="module")
def batch() -> Batch:
    ids = np.random.default_rng(4).integers(1, 300, (3, 40))
    labels = np.concatenate([ids[:, 1:], np.full((3, 1), IGNORE)], axis=1)
    return Batch(ids, np.ones_like(ids), labels)


def ours(path: Walked, batch: Batch) -> float:
    """The device's loss with the adapter that it trained."""
    adapter = read_adapter(path.adapter)
    trainer = Trainer(open_bundle(path.bundle), a_seed=adapter.header.a_seed)
    nll, labels = trainer.row_losses(batch, trainer.layout.split(adapter.vector))
    return float(nll.sum() / labels.sum())


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch.ids)).logits


def test_training_learnt_something(path: Walked) -> None:
    assert path.trial["loss_after"] < path.trial["loss_before"] - 0.1
    assert (path.trial["steps"], path.trial["adapter"]) == (20, str(path.adapter))
    run("adapter", "show", path.adapter, "--bundle", path.bundle)


def test_stock_peft_over_the_dequantised_base_is_what_the_device_computes(path: Walked, batch: Batch) -> None:
    base = torch_twin(open_bundle(path.bundle), path.model)
    without = mean_loss(base, batch).item()
    with torch.no_grad():
        theirs = mean_loss(PeftModel.from_pretrained(base, str(path.peft)), batch).item()
    assert theirs == pytest.approx(ours(path, batch), abs=1e-4)
    assert abs(theirs - without) > 0.01  # it does something


def test_stock_peft_over_the_strangers_own_model_differs_by_the_quantisation_alone(
    path: Walked, batch: Batch
) -> None:
    """The same adapter over float and over dequantised weights: as far apart as the two bases are."""
    source = AutoModelForCausalLM.from_pretrained(path.model)
    twin = torch_twin(open_bundle(path.bundle), path.model)
    apart = (logits(source, batch) - logits(twin, batch)).abs().mean()
    adapted = [logits(PeftModel.from_pretrained(model, str(path.peft)), batch) for model in (source, twin)]
    assert (adapted[0] - adapted[1]).abs().mean() < 2 * apart + 1e-4


def test_the_model_folder_with_the_bundles_weights_is_what_the_device_computes(
    path: Walked, batch: Batch, tmp_path: Path
) -> None:
    words = ("--bundle", path.bundle, "--to", "hf", "--base", path.model, "--dtype", "float32")
    run("adapter", "export", path.adapter, tmp_path / "hf", *words)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert mean_loss(model, batch).item() == pytest.approx(ours(path, batch), abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("how are you")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "how are you"


def test_the_merged_model_is_stock_peft_merged(path: Walked, batch: Batch, tmp_path: Path) -> None:
    run("adapter", "merge", path.adapter, tmp_path / "merged", "--base", path.model)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path.model), str(path.peft))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, batch) - logits(stock.merge_and_unload(), batch)).abs().max() < 1e-4


def test_the_peft_folder_is_the_adapter(path: Walked, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    run("adapter", "diff", path.adapter, path.peft, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["relative"] < 1e-6
    assert found["modules_compared"] == 4
