"""A campaign that goes on from a PEFT adapter begins as the function that stock PEFT computes, under every rule."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from encoders import CLASSES
from torch_twin import torch_twin

from edge_agent.bundle import open_bundle
from edge_agent.dataset import IGNORE, Batch
from edge_agent.trainer import Trainer
from edge_agent.trainer.rules import campaign_rule
from fedge.errors import DataError, UnsupportedError
from fedge.io.adapter_source import adapter_for
from fedge.io.peft_folder import write_peft
from fedge.lora import RULES, LoraConfig
from fedge.release import WEIGHTS
from fedge.rules import rule_of
from hub.blobs import Blobs
from hub.campaigns import Wish, make_campaign
from hub.effects import CampaignRow
from hub.export import export_adapter, export_file
from quantize.formats import FORMATS
from quantize.source import load
from quantize.weights import quantise

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


# ---------------------------------------------------------------- heads
HEAD_CONFIG = LoraConfig(r=2, alpha=6.0, targets=("query",), modules_to_save=("classifier", "score"))


@pytest.fixture(scope="module")
def classifier(classifier_folder: Callable[[str], Path]) -> Path:
    return classifier_folder("bert")


def start_of(bundle: Path, start: Path, blobs: Blobs, rule: str, said: list[str]) -> CampaignRow:
    return make_campaign(
        Wish("c", rule=rule, start_from=start), bundle, blobs, "https://hub", tell=said.append
    )


def test_a_head_goes_out_as_a_peft_folder_and_comes_back_as_the_same_numbers(
    classifier: Path, tmp_path: Path
) -> None:
    """F05: all that was trained; the change of a head is told from its value, and back."""
    bundle, blobs, said = classifier / "bundle", Blobs(tmp_path / "blobs"), list[str]()
    row = make_campaign(Wish("c", rule="fedit"), bundle, blobs, "https://hub")
    first = np.frombuffer(blobs.read(row.adapter), "<f4")
    moved = first + np.random.default_rng(0).normal(0, 0.3, first.size).astype(np.float32)
    moved_row = msgspec.structs.replace(row, adapter=blobs.put(moved.astype("<f4").tobytes()))
    export_adapter(moved_row, blobs, tmp_path / "out")
    again = start_of(bundle, tmp_path / "out", blobs, "fedit", said)
    found = np.frombuffer(blobs.read(again.adapter), "<f4")
    np.testing.assert_allclose(found, moved, rtol=0, atol=1e-6)
    assert np.abs(moved - first).mean() > 0.2
    assert said == []

    opened = open_bundle(bundle)
    wanted = rule_of("fedit", opened.layout, row.training.a_seed).tensors(moved)
    read = adapter_for(tmp_path / "out", opened.manifest, bundle / WEIGHTS).tensors
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(read[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rule", ["ffa", "core"])
def test_a_classifier_that_stock_peft_trained_answers_the_same_here(
    rule: str, classifier: Path, tmp_path: Path
) -> None:
    import peft

    model = load(str(classifier / "model"))
    quantise(model, FORMATS["int8g"], lambda phase, fraction: None)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=6, target_modules=["query"])
    twin = peft.get_peft_model(model.model, config)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(
                    0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
                )
    twin.save_pretrained(tmp_path / "start")
    ids = np.random.default_rng(4).integers(2, 300, (4, 12))
    with torch.no_grad():
        expected = twin.eval()(input_ids=torch.from_numpy(ids)).logits.numpy()

    blobs, said = Blobs(tmp_path / "blobs"), list[str]()
    row = start_of(classifier / "bundle", tmp_path / "start", blobs, rule, said)
    state = np.frombuffer(blobs.read(row.adapter), "<f4").astype(np.float32)
    trainer = Trainer(open_bundle(classifier / "bundle"), a_seed=row.training.a_seed)
    batch = Batch(ids, np.ones_like(ids), np.full_like(ids, IGNORE), np.zeros(4, np.int64))
    held = campaign_rule(trainer, row.training, state).held(state)
    found = trainer.answers(batch, held).logits
    np.testing.assert_allclose(found, expected, atol=2e-5)
    plain = trainer.answers(batch, {name: 0 * value for name, value in held.items()}).logits
    assert np.abs(plain - found).max() > 0.05, "it does something"
    assert len(said) == 1
    assert "no bert.pooler.dense.bias, bert.pooler.dense.weight" in said[0], "PEFT leaves the pooler as it is"


def write_head(folder: Path, bundle: Path, **shapes: tuple[int, ...]) -> Path:
    """A folder of HEAD_CONFIG; `shapes` by the last word of a head's name are other ones than the bundle's."""
    layout = open_bundle(bundle).layout.like(HEAD_CONFIG)
    tensors = {
        name: np.ones(shapes.get(name.rpartition(".")[2], shape) if "dense/" in name else shape, np.float32)
        for name, shape in {**layout.a_shapes, **layout.shapes}.items()
    }
    write_peft(folder, tensors, HEAD_CONFIG, "bert", layout=layout, task_type="SEQ_CLS")
    return folder


def test_a_head_of_another_number_of_classes_is_refused_with_both_shapes(
    classifier: Path, tmp_path: Path
) -> None:
    bundle, blobs = classifier / "bundle", Blobs(tmp_path / "blobs")
    start = write_head(tmp_path / "start", bundle, weight=(5, 64), bias=(5,))
    with pytest.raises(DataError, match=r"classifier\..*another number of classes") as refused:
        start_of(bundle, start, blobs, "ffa", [])
    assert "(3" in refused.value.hint
    assert refused.value.value in {(5,), (5, 64)}
    assert not list(blobs.folder.iterdir())


@pytest.mark.parametrize("names", [["music", "lights", "weather"], ["lights", "music"]])
def test_a_head_whose_classes_are_in_another_order_is_refused(
    names: list[str], classifier: Path, tmp_path: Path
) -> None:
    """Its rows would mean other classes, and no shape would tell."""
    bundle, blobs = classifier / "bundle", Blobs(tmp_path / "blobs")
    start = write_head(tmp_path / "start", bundle)
    labels = start / "labels.json"
    labels.write_text(json.dumps({"id2label": dict(enumerate(CLASSES)), "label2id": {}}))
    start_of(bundle, start, blobs, "ffa", [])
    labels.write_text(json.dumps({"id2label": dict(enumerate(names)), "label2id": {}}))
    with pytest.raises(DataError, match="another order") as refused:
        start_of(bundle, start, Blobs(tmp_path / "none"), "ffa", [])
    assert "lights, music, weather" in refused.value.hint
    labels.write_text("{")
    with pytest.raises(DataError, match=r"labels\.json"):
        start_of(bundle, start, Blobs(tmp_path / "none"), "ffa", [])


def test_an_adapter_without_a_head_keeps_the_bundles_own_and_says_so(
    classifier: Path, tmp_path: Path
) -> None:
    bundle, blobs, said = classifier / "bundle", Blobs(tmp_path / "blobs"), list[str]()
    config = msgspec.structs.replace(HEAD_CONFIG, modules_to_save=())
    layout = open_bundle(bundle).layout.like(config)
    tensors = {n: np.ones(s, np.float32) for n, s in {**layout.a_shapes, **layout.shapes}.items()}
    write_peft(tmp_path / "start", tensors, config, "bert", layout=layout)
    row = start_of(bundle, tmp_path / "start", blobs, "fedit", said)
    state = np.frombuffer(blobs.read(row.adapter), "<f4").astype(np.float32)
    dense = rule_of("fedit", open_bundle(bundle).layout, row.training.a_seed).split(state)
    assert all(not value.any() for name, value in dense.items() if name.startswith("dense/"))
    assert ["no head" in notice for notice in said] == [True]
