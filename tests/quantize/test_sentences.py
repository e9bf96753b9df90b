"""Sentence encoders: what a folder says of its vectors, what is refused, the gates, and the way out to PEFT."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import encoders
import numpy as np
import pytest
import tiny

from edge_agent.bundle import open_bundle
from edge_agent.embedder import Embedder
from edge_agent.trainer import Trainer, train_round
from fedge.errors import FedgeError, UnsupportedError, UsageError
from fedge.io.adapter_file import adapter_of, read_adapter, write_adapter
from fedge.lora import LoraConfig
from fedge.release import SentenceVectors
from quantize.adapter_cli import register
from quantize.bundle import quantize
from quantize.dry_run import forecast
from quantize.encoders import task_of
from quantize.formats import FORMATS
from quantize.gates import Draft, GateError
from quantize.sentence_graphs import SentenceExam
from quantize.sentences import SentenceEncoder, vectors_of
from quantize.source import load
from quantize.weights import quantise

SEED = bytes(range(16))
TEXTS = ("how are you my friend", "the lazy dog", "the hen and the lazy dog are the best of the week")
# The reload knows nothing of us but the folders: transformers, peft, and the mean of sentence-transformers' own page.
_RELOAD = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModel
from tokenizers import Tokenizer
home, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(home + "/model/tokenizer.json")
found = {}
for name in ("peft", "merged"):
    if name == "peft":
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(home + "/model"), home + "/peft").eval()
    else:
        model = AutoModel.from_pretrained(home + "/merged").eval()
    vectors = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        vectors.append(torch.nn.functional.normalize(states.mean(1), p=2, dim=1)[0].numpy())
    found[name] = np.stack(vectors)
np.savez(home + "/out.npz", **found)
"""


# ---------------------------------------------------------------- what is found
@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("mean", SentenceVectors("mean", normalised=True)),
        ("cls", SentenceVectors("cls", normalised=False)),
        ("plain", SentenceVectors()),
        ("mpnet", SentenceVectors()),
    ],
)
def test_an_encoder_becomes_a_bundle_that_says_what_its_vectors_are(
    name: str, vectors: SentenceVectors, sentence_folder: Callable[[str], Path]
) -> None:
    manifest = open_bundle(sentence_folder(name) / "bundle").manifest
    assert (manifest.task, manifest.embeds, manifest.classes) == ("embed", vectors, ())
    assert manifest.lora.targets == (("q", "v") if name == "mpnet" else ("query", "value"))
    assert manifest.layer_path == "encoder.layer"  # of the encoder by itself, whose adapter stock PEFT loads
    assert not manifest.dense
    assert {"pool.onnx", "pool_bwd.onnx", "block_fwd.onnx"} <= manifest.files.keys()
    assert not {"infer.onnx", "classify.onnx", "norm_fwd.onnx"} & manifest.files.keys()
    for gate in ("cut_gradient_error", "gradient_error", "vector_error", "position_error", "loss_error"):
        assert manifest.gates[gate] <= 1e-5, gate
    assert manifest.gates["vector_cosine"] > 0.999


def test_a_task_follows_from_the_folder_or_is_asked_for(tmp_path: Path) -> None:
    bare = encoders.write_model(tmp_path / "bare", "bare")
    named = encoders.write_sentences(tmp_path / "mean", "mean")
    assert task_of(named, "BertModel", ()) == "embed"
    assert task_of(named, "BertModel", ("yes", "no")) == "classify"
    assert task_of(named, "BertForSequenceClassification", ()) == "classify"
    assert task_of(named, "BertModel", ("yes", "no"), "classify") == "classify"
    assert task_of(bare, "BertModel", ()) == "classify"
    assert task_of(bare, "BertModel", (), "embed") == "embed"
    assert task_of(bare, "LlamaForCausalLM", ()) == "generate"
    for architecture, classes, asked in (
        ("BertModel", ("yes", "no"), "embed"),
        ("BertModel", (), "generate"),
        ("LlamaForCausalLM", (), "classify"),
    ):
        with pytest.raises(UsageError):
            task_of(bare, architecture, classes, asked)
    with pytest.raises(UsageError, match="--task embed"):
        load(str(bare))


def test_texts_are_cut_where_the_folder_cuts_them(tmp_path: Path) -> None:
    folder = encoders.write_sentences(tmp_path / "model", "mean")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    made = quantize(
        str(folder), tmp_path / "bundle", tiny.PUBLISHER, lora=LoraConfig(r=4), weights_format="int8g"
    )
    assert made.positions_max == 24
    embedder = Embedder(open_bundle(tmp_path / "bundle"))
    long = "the lazy dog and the hen " * 20
    assert np.array_equal(embedder(long), embedder(long + "are the best"))
    assert embedder.cut == 2


def test_a_dry_run_foretells_vectors(sentence_folder: Callable[[str], Path]) -> None:
    folder = sentence_folder("mean")
    found = forecast(str(folder / "model"), LoraConfig(r=4, alpha=8.0), "int8g")
    manifest = open_bundle(folder / "bundle").manifest
    assert found.weights_bytes == manifest.files["weights.bin"].size
    assert found.adapter["numbers"] == manifest.layout.numbers
    assert any(board["fits"] for board in found.boards)


# ---------------------------------------------------------------- what is refused
def rewrite(path: Path, **fields: object) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **fields}))


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, r"1_Pooling/config.json.*max_tokens"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True},
            r"1_Pooling/config.json.*lasttoken",
        ),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, r"weightedmean_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, r"pooling is not handled.*none"),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, r"pooling_mode='max'"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, r"pooling_mode="),
        ("1_Pooling/config.json", {"include_prompt": False}, r"include_prompt"),
        ("sentence_bert_config.json", {"do_lower_case": True}, r"sentence_bert_config.json.*do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, r"max_seq_length='many'"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
            r"config_sentence_transformers.json.*default_prompt_name",
        ),
    ],
)
def test_vectors_that_cannot_be_right_are_refused_by_file_and_field(
    tmp_path: Path, file: str, fields: dict[str, object], said: str
) -> None:
    folder = encoders.write_sentences(tmp_path, "mean")
    rewrite(folder / file, **fields)
    with pytest.raises(FedgeError, match=said):
        load(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "sentence_transformers.models.Dense"}, "type='Transformer, Dense, Normalize'"),
        ({"type": None}, "modules.json"),
    ],
)
def test_other_steps_to_a_vector_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    folder = encoders.write_sentences(tmp_path, "mean")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1] |= change
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedError, match=said):
        vectors_of(folder)
    modules[0]["path"], modules[1]["type"] = "0_Transformer", "sentence_transformers.models.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UnsupportedError, match="path='0_Transformer'"):
        vectors_of(folder)


def test_a_pooling_that_is_named_in_the_newer_way_is_read(tmp_path: Path) -> None:
    folder = encoders.write_sentences(tmp_path, "mean")
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 64, "pooling_mode": "cls"}')
    assert vectors_of(folder) == SentenceVectors("cls", normalised=True)


def test_what_has_no_texts_to_give_vectors_of_is_refused(audio_folder: Path, tmp_path: Path) -> None:
    said = r"no bundle to embed can be made of it, only one to classify.*Leave out --task; to embed, give"
    with pytest.raises(UsageError, match=said):
        load(str(audio_folder / "model"), task="embed")


# ---------------------------------------------------------------- gates
def test_vectors_of_another_make_do_not_pass(sentence_folder: Callable[[str], Path]) -> None:
    """Graphs that take the mean, for a model that takes the first token."""
    folder = sentence_folder("mean")
    manifest = open_bundle(folder / "bundle").manifest
    fmt = FORMATS[manifest.weights_format]
    draft = Draft(folder / "bundle", manifest.tensors, frozenset(manifest.operators), None, 0)
    source = load(str(folder / "model"))
    for vectors in (SentenceVectors(), SentenceVectors("cls")):
        model = SentenceEncoder(source.model.model, vectors).eval()
        given = replace(source, model=model, vectors=vectors)
        exam = SentenceExam.of(given, exact=False, fmt=fmt, lora=manifest.lora)
        quantise(given, fmt, lambda phase, fraction: None)
        if vectors.pooling == "mean":
            assert exam.run(draft, lambda phase, fraction: None).keys() == manifest.gates.keys()
        else:
            with pytest.raises(GateError, match="cut_gradient_error"):
                exam.run(draft, lambda phase, fraction: None)


# ---------------------------------------------------------------- the way out
def run(*words: object) -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    arguments = parser.parse_args(["adapter", *map(str, words), "--json"])
    arguments.run(arguments)


def test_what_was_trained_gives_the_same_vectors_in_stock_peft_and_merged(
    sentence_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = sentence_folder("mean")
    bundle = open_bundle(folder / "bundle")
    trainer = Trainer(bundle, a_seed=SEED)
    zero = np.zeros(trainer.layout.numbers, np.float32)
    delta = train_round(trainer, zero, [encoders.pairs(6, 12)] * 12, a_seed=SEED, lr=0.02).delta
    write_adapter(tmp_path / "adapter", adapter_of(bundle.manifest, delta, a_seed=SEED, steps=12))
    tensors = read_adapter(tmp_path / "adapter", bundle.manifest).tensors
    before, after = (
        np.stack([embedder(text) for text in TEXTS])
        for embedder in (Embedder(bundle), Embedder(bundle, adapter=tensors))
    )
    (tmp_path / "model").symlink_to(folder / "model")
    run("export", tmp_path / "adapter", tmp_path / "peft", "--bundle", bundle.folder, "--to", "peft")
    run("merge", tmp_path / "adapter", tmp_path / "merged", "--base", folder / "model")
    command = [sys.executable, "-c", _RELOAD, str(tmp_path), json.dumps(TEXTS)]
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found = np.load(tmp_path / "out.npz")
    assert (
        json.loads((tmp_path / "peft/adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    )
    for name in ("peft", "merged"):
        # The base there has its source's weights, here those of int8: the vectors differ by that and no more.
        apart = np.linalg.norm(found[name] - after)
        assert apart <= 0.05 * np.linalg.norm(after), name
        assert np.linalg.norm(before - after) > 3 * apart, name
    assert np.allclose(found["peft"], found["merged"], atol=1e-5)
