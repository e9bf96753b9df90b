"""Adapters of every shape that PEFT knows, from the flags of `fedge quantize` to the device's gradients and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from torch_twin import IGNORE, b_gradients, torch_twin
from transformers import AutoModelForCausalLM, LlamaConfig

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch
from edge_agent.trainer import Trainer
from fedge.cli import main
from fedge.errors import ConfigError
from fedge.io.adapter_file import adapter_of
from fedge.io.peft_folder import write_peft
from fedge.lora import LoraConfig
from quantize.blocks import adapted_modules, graph_config

SEED = bytes(range(16))
WORDS = [
    "--lora-targets", r".*\.(q_proj|down_proj|o_proj)", "--lora-rank", "4", "--lora-alpha", "8", "--rslora",
    "--rank-pattern", "down_proj=2", "--alpha-pattern", "layers.1.self_attn.q_proj=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    home = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        assert main(["quantize", str(tiny_model), "--out", str(home / "b"), "--quiet", *WORDS]) == 0
    return home / "b"


@pytest.mark.xdist_group("lora shapes")
def test_ranks_scales_and_targets_by_pattern_train_as_in_peft(
    bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Loss and the gradient of every B: mixed ranks, one layer with a scale of its own (F01's kind)."""
    opened = open_bundle(bundle)
    layout = opened.layout
    assert {(slot.path.rpartition(".")[2], slot.r) for slot in layout.slots} == {
        ("q_proj", 4), ("o_proj", 4), ("down_proj", 2),
    }  # fmt: skip
    assert len({round(slot.scale, 6) for slot in layout.slots}) == 3
    vector = (np.random.default_rng(3).standard_normal(layout.numbers) * 0.2).astype(np.float32)
    ids = np.random.default_rng(4).integers(1, 300, (3, 30))
    labels = np.concatenate([ids[:, 1:], np.full((3, 1), IGNORE)], axis=1)
    batch = Batch(ids, np.ones_like(ids), labels)
    made = adapter_of(opened.manifest, vector, a_seed=SEED)
    write_peft(tmp_path, made.tensors, made.header.lora, "tiny", layout=layout)
    model = PeftModel.from_pretrained(torch_twin(opened, tiny_model), str(tmp_path), is_trainable=True)
    loss, expected = b_gradients(model, batch)
    result = Trainer(opened, a_seed=SEED).loss_and_gradients(batch, layout.split(vector))
    assert result.loss_sum / result.labels == pytest.approx(loss, abs=1e-4)
    assert {name for name in result.gradients if name.endswith(".B")} == set(expected)
    for name, gradient in expected.items():
        error = np.abs(result.gradients[name] - gradient).max() / np.abs(gradient).max()
        assert error < 1e-3, name


@pytest.mark.xdist_group("lora shapes")
def test_the_commands_carry_every_shape(bundle: Path, tmp_path: Path, tiny_model: Path) -> None:
    lines = [{"prompt": "how are you", "completion": "i am fine and you"}] * 10
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["agent", "train-once", str(bundle), str(tmp_path / "d.jsonl"), "--steps", "2"]
    assert main([*words, "--adapter-out", str(tmp_path / "a"), "--threads", "1"]) == 0
    for kind in ("peft", "gguf"):
        out = str(tmp_path / kind)
        assert (
            main(["adapter", "export", str(tmp_path / "a"), "--bundle", str(bundle), "--to", kind, out]) == 0
        )
        assert main(["adapter", "diff", str(tmp_path / "a"), out]) == 0
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "peft")
    )
    assert (
        main(["adapter", "merge", str(tmp_path / "a"), str(tmp_path / "m"), "--base", str(tiny_model)]) == 0
    )
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        apart = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits - stock(ids).logits
    assert apart.abs().max() < 1e-4


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**tiny.SIZES))


def test_the_graphs_config_names_paths_and_the_largest_rank(model: torch.nn.Module) -> None:
    plain = graph_config(model, LoraConfig(r=4, alpha=8.0, targets=("v_proj", "q_proj"), rslora=True))
    assert plain == LoraConfig(r=4, alpha=8.0, targets=("self_attn.q_proj", "self_attn.v_proj"), rslora=True)
    every = graph_config(model, LoraConfig(targets="all-linear"))
    assert len(every.targets) == 7
    some = graph_config(
        model, LoraConfig(targets=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 16})
    )
    assert adapted_modules(model, some) == {"self_attn.q_proj": (64, 64)}
    assert some.rank_of("self_attn.q_proj") == 16
    assert some.scale_of("self_attn.q_proj") == 1.0  # the layers' scales differ: B carries them


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraConfig(targets=("query",)), "q_proj"),
        (LoraConfig(targets=r"nothing\.like\.this"), "no module"),
        (LoraConfig(layers=(0, 2)), "no such layer"),
        (LoraConfig(r=65), "rank"),
        (LoraConfig(rank_pattern={"v_proj": 33}), "rank"),
        (LoraConfig(targets=()), "no module"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(lora: LoraConfig, said: str, model: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match=said):
        graph_config(model, lora)
