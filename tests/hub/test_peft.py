"""An exported adapter computes in stock PEFT what the device computes; an import uses everything or refuses."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_twin import mean_loss, torch_twin, write_vector

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import (
    IGNORE,
    Batch,
    TextExample,
    evaluation_batches,
    load_dataset,
    load_encoder,
    make_batch,
)
from edge_agent.trainer import Trainer
from fedge.errors import DataError, NoInputError, UnsupportedError
from fedge.io.assets import pull
from fedge.io.peft_folder import read_peft
from fedge.lora import AdapterLayout, LoraConfig
from fedge.messages import Template
from fedge.peft import CONFIG_FILE, TENSOR_FILE
from firmware_sim.processes.people import read_people

SEED = bytes(range(16))
LAYOUT = AdapterLayout.of(2, {"self_attn.q_proj": (12, 16), "self_attn.v_proj": (6, 16)}, 4)
CONFIG = LoraConfig(r=4, alpha=16, targets=("q_proj", "v_proj"))
VECTOR = np.random.default_rng(0).standard_normal(LAYOUT.numbers).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vector(tmp_path, LAYOUT, CONFIG, SEED, VECTOR, "a-base-model")
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """`change` maps the file's tensors to others."""
    save_file(change(load_file(folder / TENSOR_FILE)), folder / TENSOR_FILE)


# ---------------------------------------------------------------- our own round trip
def test_what_is_written_is_read_back(folder: Path) -> None:
    found = read_peft(folder, LAYOUT)
    assert (found.config, found.base_model_name, found.notices) == (CONFIG, "a-base-model", ())
    b = {name: found.tensors[name] for name in LAYOUT.b_shapes}
    np.testing.assert_array_equal(LAYOUT.join(b), VECTOR)
    for name, a in LAYOUT.frozen(SEED).items():
        np.testing.assert_array_equal(found.tensors[name], a)


def test_an_adapter_without_effect_is_announced(folder: Path) -> None:
    write_vector(folder, LAYOUT, CONFIG, SEED, np.zeros_like(VECTOR), "base")
    assert any("no effect" in notice for notice in read_peft(folder, LAYOUT).notices)


# ---------------------------------------------------------------- element types
def test_bfloat16_and_float16_widen_bit_for_bit(folder: Path) -> None:
    """A in float16, B in bfloat16; torch's own widening is the oracle."""
    before = load_file(folder / TENSOR_FILE)
    narrow = {
        name: value.to(torch.bfloat16 if "lora_B" in name else torch.float16)
        for name, value in before.items()
    }
    narrow[next(name for name in narrow if "lora_B" in name)].view(-1)[:3] = torch.tensor(
        [-0.0, 1e-40, 3.0e38], dtype=torch.bfloat16
    )
    save_file(narrow, folder / TENSOR_FILE)
    found = read_peft(folder, LAYOUT).tensors
    oracle = {name.rpartition(".layers.")[2]: value.float().numpy() for name, value in narrow.items()}
    for name, value in found.items():
        layer, _, rest = name.partition("/")
        path, _, letter = rest.rpartition(".")
        expected = oracle[f"{layer[1:]}.{path}.lora_{letter}.weight"]
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float64, torch.int32])
def test_another_element_type_is_refused_with_tensor_and_type(folder: Path, kind: torch.dtype) -> None:
    rewrite(
        folder,
        lambda t: {n: v.to(kind) if "layers.1" in n and "q_proj.lora_B" in n else v for n, v in t.items()},
    )
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.q_proj\.lora_B.*dtype"):
        read_peft(folder, LAYOUT)


# ---------------------------------------------------------------- partial and strange files
def test_names_of_the_bare_model_are_mapped_with_a_notice(folder: Path) -> None:
    rewrite(folder, lambda t: {n.replace("model.model.", "model.", 1): v for n, v in t.items()})
    found = read_peft(folder, LAYOUT)
    assert len(found.notices) == 1
    np.testing.assert_array_equal(LAYOUT.join({n: found.tensors[n] for n in LAYOUT.b_shapes}), VECTOR)


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_refused_by_name(folder: Path) -> None:
    whole = load_file(folder / TENSOR_FILE)
    name = next(n for n in whole if "layers.1.self_attn.v_proj.lora_B" in n)
    for change, refusal in (
        ({n: v for n, v in whole.items() if n != name}, "missing.*lora_B"),
        ({**whole, "base_model.model.lm_head.lora_A.weight": whole[name].clone()}, "belong nowhere.*lm_head"),
        ({**whole, name: whole[name].t().contiguous()}, r"shape.*L1/self_attn\.v_proj\.B"),
    ):
        save_file(change, folder / TENSOR_FILE)
        with pytest.raises(DataError, match=refusal):
            read_peft(folder, LAYOUT)


def test_settings_that_are_not_computed_here_are_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    for field, value in (("use_dora", True), ("bias", "lora_only"), ("r", 99), ("peft_type", "LOHA")):
        (folder / CONFIG_FILE).write_text(json.dumps({**config, field: value}))
        with pytest.raises(UnsupportedError, match=field):
            read_peft(folder, LAYOUT)


def test_files_that_are_not_there_or_not_what_they_say(folder: Path) -> None:
    tensors, config = (folder / TENSOR_FILE).read_bytes(), (folder / CONFIG_FILE).read_bytes()
    for damage in (b"", tensors[:100], b"\xff" * 200):
        (folder / TENSOR_FILE).write_bytes(damage)
        with pytest.raises(DataError, match=TENSOR_FILE):
            read_peft(folder, LAYOUT)
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(NoInputError):
        read_peft(folder, LAYOUT)
    (folder / CONFIG_FILE).write_bytes(config[:-3])
    with pytest.raises(DataError, match=CONFIG_FILE):
        read_peft(folder, LAYOUT)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(NoInputError):
        read_peft(folder, LAYOUT)


# ---------------------------------------------------------------- stock PEFT
def our_loss(bundle: Bundle, batch: Batch, vector: np.ndarray) -> float:
    trainer = Trainer(bundle, a_seed=SEED)
    nll, labels = trainer.row_losses(batch, trainer.layout.split(vector))
    return float(nll.sum() / labels.sum())


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_transformers_reach_our_loss(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, rslora: bool
) -> None:
    from peft import PeftModel

    bundle = open_bundle(tiny_bundle)
    lora, layout = bundle.manifest.lora, bundle.layout
    if rslora:  # the same function, said in the other way: alpha / sqrt(r) = scale
        lora = msgspec.structs.replace(lora, alpha=lora.scale * lora.r**0.5, rslora=True)
    vector = (np.random.default_rng(3).standard_normal(layout.numbers) * 0.2).astype(np.float32)
    draw = np.random.default_rng(4)
    ids = draw.integers(1, 300, (4, 40))
    labels = np.concatenate([ids[:, 1:], np.full((4, 1), IGNORE)], axis=1)
    batch = Batch(ids, np.ones_like(ids), labels)

    write_vector(tmp_path, layout, lora, SEED, vector, "tiny")
    model = PeftModel.from_pretrained(torch_twin(bundle, tiny_model), str(tmp_path))
    with torch.no_grad():
        theirs = mean_loss(model, batch).item()
    assert our_loss(bundle, batch, vector) == pytest.approx(theirs, abs=1e-4)
    assert abs(theirs - our_loss(bundle, batch, np.zeros_like(vector))) > 0.01  # it does something


# ---------------------------------------------------------------- the real model
@pytest.fixture(scope="module")
def real_bundle(smollm2_bundle: Path) -> Bundle:
    return open_bundle(smollm2_bundle)


@pytest.mark.real
def test_smollm2_in_stock_peft_reaches_our_loss(real_bundle: Bundle, tmp_path: Path) -> None:
    from peft import PeftModel

    layout = real_bundle.layout
    vector = (np.random.default_rng(3).standard_normal(layout.numbers) * 0.01).astype(np.float32)
    write_vector(tmp_path, layout, real_bundle.manifest.lora, SEED, vector, "smollm2-135m")
    encode = load_encoder(real_bundle.tokenizer)
    data = tmp_path / "few.jsonl"
    lines = [
        {"prompt": "Hi! How are you today?", "completion": f"I am fine, {n} times over."} for n in range(4)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    rows = load_dataset(data, Template(), encode, eos_id=real_bundle.manifest.eos_id, window=64).rows
    batch = make_batch(rows, real_bundle.manifest.pad_id)
    model = PeftModel.from_pretrained(torch_twin(real_bundle, pull("models", "smollm2-135m")), str(tmp_path))
    with torch.no_grad():
        theirs = mean_loss(model, batch).item()
    assert our_loss(real_bundle, batch, vector) == pytest.approx(theirs, abs=0.01)


@pytest.mark.real
def test_zero_shot_loss_of_the_144_held_out_messages(real_bundle: Bundle, tmp_path: Path) -> None:
    """A loader is right when it reaches its known in-domain loss: 4.616 nats a token over 2,152 tokens."""
    encode, manifest = load_encoder(real_bundle.tokenizer), real_bundle.manifest
    lines = [
        json.dumps({"prompt": example.prompt, "completion": example.completion})
        for example in held_out_messages(encode)
    ]
    data = tmp_path / "heldout.jsonl"
    data.write_text("\n".join(lines))
    dataset = load_dataset(data, Template(), encode, eos_id=manifest.eos_id, window=64)
    assert dataset.counts.kept == len(lines) == 144

    trainer = Trainer(real_bundle)
    zero = trainer.layout.split(np.zeros(trainer.layout.numbers, np.float32))
    nll = labels = 0.0
    for _, batch in evaluation_batches(dataset.rows, size=12, pad_id=manifest.pad_id):
        sums, counts = trainer.row_losses(batch, zero)
        nll, labels = nll + sums.sum(), labels + counts.sum()
    assert labels == 2_152
    assert nll / labels == pytest.approx(4.616, abs=0.002)


def held_out_messages(encode: Any) -> list[TextExample]:
    """The 12 people who wrote most; of each, 12 messages from every fifth conversation, drawn with seed 1."""
    chosen: list[TextExample] = []
    for turns in list(read_people(pull("data", "chitchat")).values())[:12]:
        turns = turns[:3_000]
        held = set(sorted({turn.conversation for turn in turns})[::5])
        usable = [
            turn
            for turn in turns
            if turn.conversation in held and len(turn.completion.split()) >= 4 and _tokens(turn, encode) < 64
        ]
        drawn = random.Random(1).sample(usable, 12)
        chosen += [TextExample(turn.prompt, turn.completion) for turn in drawn]
    return chosen


def _tokens(turn: Any, encode: Any) -> int:
    prompt = turn.prompt[-160:] or "(start)"
    return len(encode(f"Friend: {prompt}\nMe:")) + len(encode(f" {turn.completion}")) + 1


def test_a_changed_scale_would_be_seen(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The guard on the round trip itself: half the alpha in the config must move PEFT's loss off ours."""
    from peft import PeftModel

    bundle = open_bundle(tiny_bundle)
    vector = (np.random.default_rng(3).standard_normal(bundle.layout.numbers) * 0.2).astype(np.float32)
    ids = np.random.default_rng(4).integers(1, 300, (2, 20))
    batch = Batch(ids, np.ones_like(ids), np.roll(ids, -1, axis=1))
    weak = msgspec.structs.replace(bundle.manifest.lora, alpha=bundle.manifest.lora.alpha / 2)
    write_vector(tmp_path, bundle.layout, weak, SEED, vector, "tiny")
    model = PeftModel.from_pretrained(torch_twin(bundle, tiny_model), str(tmp_path))
    with torch.no_grad():
        assert abs(mean_loss(model, batch).item() - our_loss(bundle, batch, vector)) > 1e-3
