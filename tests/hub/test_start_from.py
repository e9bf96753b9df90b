"""A campaign that goes on from a PEFT adapter begins as the function that stock PEFT computes, under every rule."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch_twin import torch_twin

from edge_agent.bundle import open_bundle
from edge_agent.dataset import IGNORE, Batch
from edge_agent.trainer import Trainer
from edge_agent.trainer.rules import campaign_rule
from fedge.errors import UnsupportedError
from fedge.io.peft_folder import write_peft
from fedge.lora import RULES, LoraConfig
from hub.blobs import Blobs
from hub.campaigns import Wish, make_campaign
from hub.export import export_adapter, export_file

CONFIG = LoraConfig(r=4, alpha=4.0, rslora=True, targets=("q_proj",), layers=(1,))


def batch() -> Batch:
    ids = np.random.default_rng(4).integers(1, 300, (4, 40))
    labels = np.concatenate([ids[:, 1:], np.full((4, 1), IGNORE)], axis=1)
    return Batch(ids, np.ones_like(ids), labels)


def write_adapter(folder: Path, bundle: Path) -> Path:
    layout = open_bundle(bundle).layout.like(CONFIG)
    draw = np.random.default_rng(0)
    tensors = {
        name: draw.standard_normal(shape).astype(np.float32) * np.float32(0.5)
        for name, shape in {**layout.a_shapes, **layout.b_shapes}.items()
    }
    write_peft(folder, tensors, CONFIG, "tiny", layout=layout)
    return folder


def losses_in_peft(adapter: Path, bundle: Path, model: Path) -> np.ndarray:
    """Nats of each row."""
    from peft import PeftModel

    twin = PeftModel.from_pretrained(torch_twin(open_bundle(bundle), model), str(adapter))
    rows = batch()
    with torch.no_grad():
        logits = twin(input_ids=torch.from_numpy(rows.ids), attention_mask=torch.from_numpy(rows.mask)).logits
        labels = torch.from_numpy(rows.labels)
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
    found: np.ndarray = nll.view(labels.shape).sum(1).numpy()
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_first_adapter_and_its_export_are_the_function_of_the_start(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, rule: str
) -> None:
    """F01: rank-stabilised scale, another rank, one layer and one module of those that the bundle has."""
    start = write_adapter(tmp_path / "start", tiny_bundle)
    expected = losses_in_peft(start, tiny_bundle, tiny_model)
    blobs = Blobs(tmp_path / "blobs")
    said: list[str] = []
    row = make_campaign(
        Wish("c", rule=rule, start_from=start), tiny_bundle, blobs, "https://hub", tell=said.append
    )
    state = np.frombuffer(blobs.read(row.adapter), "<f4").astype(np.float32)
    trainer = Trainer(open_bundle(tiny_bundle), a_seed=row.training.a_seed)
    held = campaign_rule(trainer, row.training, state).held(state)
    nll, _ = trainer.row_losses(batch(), held)
    plain, _ = trainer.row_losses(batch(), {name: 0 * value for name, value in held.items()})
    np.testing.assert_allclose(nll, expected, atol=5e-3)  # of 250 nats a row
    assert np.abs(plain - nll).max() > 1.0, "it does something"
    assert not row.probes
    assert said == []

    export_adapter(row, blobs, tmp_path / "out")
    exported = losses_in_peft(tmp_path / "out", tiny_bundle, tiny_model)
    np.testing.assert_allclose(exported, expected, atol=5e-3)
    export_file(row, blobs, tmp_path / "adapter.safetensors")


def test_a_start_without_effect_is_announced(tiny_bundle: Path, tmp_path: Path) -> None:
    """F03: nobody should wonder."""
    layout = open_bundle(tiny_bundle).layout
    config = open_bundle(tiny_bundle).manifest.lora
    zeros = {n: np.zeros(s, np.float32) for n, s in layout.b_shapes.items()}
    write_peft(tmp_path / "start", {**layout.frozen(bytes(16)), **zeros}, config, "tiny", layout=layout)
    said: list[str] = []
    wish = Wish("c", start_from=tmp_path / "start")
    make_campaign(wish, tiny_bundle, Blobs(tmp_path / "blobs"), "https://hub", tell=said.append)
    assert len(said) == 1
    assert "no effect" in said[0]


def test_a_start_that_the_bundle_has_no_room_for_leaves_nothing_behind(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    layout = open_bundle(tiny_bundle).layout.like(msgspec.structs.replace(CONFIG, r=16))
    tensors = {n: np.ones(s, np.float32) for n, s in {**layout.a_shapes, **layout.b_shapes}.items()}
    config = msgspec.structs.replace(CONFIG, r=16)
    write_peft(tmp_path / "start", tensors, config, "tiny", layout=layout)
    blobs = Blobs(tmp_path / "blobs")
    with pytest.raises(UnsupportedError, match=r"L1/self_attn\.q_proj"):
        make_campaign(Wish("c", start_from=tmp_path / "start"), tiny_bundle, blobs, "https://hub")
    assert not list(blobs.folder.iterdir())
