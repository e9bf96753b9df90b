"""Whisper's encoder as a classifier of sound: what is found in it, what is refused, and the way out to PEFT (F05)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
import torch
import whispers
from test_encoders import export
from torch import nn
from transformers import WhisperForAudioClassification

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch, load_recordings, make_batch
from edge_agent.gauge import step_seconds
from edge_agent.planner import Plan, need
from edge_agent.trainer import Trainer
from edge_agent.trial import text, train_once
from fedge.audio import AudioInput
from fedge.errors import DataError, FedgeError, IntegrityError, UnsupportedError, UsageError
from fedge.lora import DENSE, LoraConfig
from fedge.messages import Training
from fedge.release import (
    MANIFEST,
    SIGNATURE,
    WEIGHTS,
    Manifest,
    encode_manifest,
    open_manifest,
    sign_manifest,
)
from quantize.audio_gates import AudioExam, features_of, sounds
from quantize.classifier_gates import LabelledBatch, torch_answers
from quantize.dry_run import draft, outline_of
from quantize.encoders import with_targets
from quantize.formats import FORMATS
from quantize.gates import Draft, GateError
from quantize.source import Source, load
from quantize.weights import quantise

SEED = bytes(range(16))
WITH_HEAD = "WhisperForAudioClassification"


def manifest_of(folder: Path) -> Manifest:
    bundle = folder / "bundle"
    return open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())


def source_of(folder: Path) -> Source:
    return load(str(folder / "model"), whispers.CLASSES, whispers.SECONDS)


def batch_of(count: int = 5) -> Batch:
    draw = np.random.default_rng(0)
    features = draw.standard_normal((count, 16, 20)).astype(np.float32)
    mask = np.ones((count, 10), np.int64)
    return Batch(features, mask, np.full_like(mask, -100), np.arange(count) % 3)


@pytest.fixture(scope="module")
def trainer(audio_folder: Path) -> Trainer:
    return Trainer(open_bundle(audio_folder / "bundle"), a_seed=SEED)


@pytest.fixture(scope="module")
def dequantised(audio_folder: Path) -> object:
    """transformers' model, its window cut, whose weights are what the bundle's codes mean."""
    source = source_of(audio_folder)
    quantise(source, FORMATS["int8g"], lambda phase, fraction: None)
    return source.model


# ---------------------------------------------------------------- what is found
def test_a_whisper_without_a_head_becomes_a_bundle_that_hears(audio_folder: Path) -> None:
    manifest = manifest_of(audio_folder)
    assert (manifest.task, manifest.classes) == ("classify", whispers.CLASSES)
    assert manifest.hears == AudioInput(mels=16, samples=3_200)
    assert (manifest.positions_max, manifest.layer_path, manifest.vocabulary) == (10, "encoder.layers", 0)
    assert manifest.lora.modules_to_save == ("classifier", "projector")
    assert manifest.lora.targets == ("q_proj", "v_proj")
    assert "tokenizer.json" not in manifest.files
    gates = ("cut_gradient_error", "gradient_error", "logits_error", "aux_error", "position_error")
    assert all(manifest.gates[name] <= 1e-5 for name in gates)


def test_a_head_of_its_own_is_kept_with_its_names(tmp_path: Path) -> None:
    folder = whispers.write_model(tmp_path, WITH_HEAD)
    source = load(str(folder))
    assert (source.classes, source.audio) == (whispers.CLASSES, AudioInput(mels=16, samples=6_400))
    stock = WhisperForAudioClassification.from_pretrained(folder)
    assert torch.equal(source.model.projector.weight, stock.projector.weight)
    assert source.anatomy.tail.modules == ("classifier", "projector")
    assert source.anatomy.tail.frozen == ("encoder.layer_norm.weight", "encoder.layer_norm.bias")


def test_the_window_is_cut_after_the_first_positions(audio_folder: Path) -> None:
    cut, whole = source_of(audio_folder).model, load(str(audio_folder / "model"), ("a", "b")).model
    table = whole.encoder.embed_positions.weight
    assert torch.equal(cut.encoder.embed_positions.weight, table[:10])
    assert len(table) == 20


# ---------------------------------------------------------------- the device against torch
def test_gradients_are_those_of_torch(trainer: Trainer, dequantised: object) -> None:
    batch = batch_of()
    layout, draw = trainer.layout, np.random.default_rng(1)
    moved = {n: draw.normal(0, 0.05, s).astype(np.float32) for n, s in layout.shapes.items()}
    found = trainer.loss_and_gradients(batch, moved)
    start = {n: p.detach().numpy() for n, p in dequantised.named_parameters()}  # type: ignore[attr-defined]
    adapter = {
        name: value + start[name.removeprefix(DENSE)] if name.startswith(DENSE) else value
        for name, value in {**layout.frozen(SEED), **moved}.items()
    }
    assert batch.classes is not None
    loss, _, expected = torch_answers(
        dequantised, trainer.manifest.lora, adapter, LabelledBatch(batch.ids, batch.mask, batch.classes)
    )
    assert abs(found.loss_sum / found.labels - loss) <= 1e-5
    for name, gradient in found.gradients.items():
        assert np.linalg.norm(gradient - expected[name]) <= 1e-4 * np.linalg.norm(expected[name]), name


def test_rows_in_pieces_give_the_same(audio_folder: Path, trainer: Trainer) -> None:
    piecewise = Trainer(open_bundle(audio_folder / "bundle"), a_seed=SEED, plan=Plan(rows=2))
    zero = {name: np.zeros(shape, np.float32) for name, shape in trainer.layout.shapes.items()}
    one, other = (some.loss_and_gradients(batch_of(), zero) for some in (trainer, piecewise))
    assert abs(one.loss_sum - other.loss_sum) <= 1e-5
    for name, gradient in one.gradients.items():
        assert np.allclose(gradient, other.gradients[name], rtol=1e-4, atol=1e-6), name


def test_other_features_than_the_bundles_are_refused(trainer: Trainer) -> None:
    zero = {name: np.zeros(shape, np.float32) for name, shape in trainer.layout.shapes.items()}
    batch = batch_of()
    with pytest.raises(DataError, match="other features"):
        trainer.loss_and_gradients(Batch(batch.ids[:, :, :18], batch.mask, batch.labels, batch.classes), zero)


def test_a_step_is_timed_and_planned_by_the_bundles_own_length(trainer: Trainer) -> None:
    """The window of a campaign counts tokens of text: it has no say here, and is no reason to refuse."""
    assert step_seconds(trainer, Training(a_seed=SEED, batch_rows=2, window_tokens=64)) > 0
    short, long = (need(trainer.manifest, Training(window_tokens=tokens)) for tokens in (8, 4_096))
    assert short == long


# ---------------------------------------------------------------- end to end
def test_recordings_are_learnt_alone_and_answer_the_same_in_stock_peft(
    audio_folder: Path, dequantised: object, trainer: Trainer, tmp_path: Path
) -> None:
    """F05: what a device learnt from a folder of WAV files computes the same where stock PEFT has loaded it."""
    from peft import PeftModel

    from fedge.io.adapter_file import read_adapter

    data = whispers.write_recordings(tmp_path / "data", 8)
    trial = train_once(
        audio_folder / "bundle",
        data,
        steps=30,
        training=Training(a_seed=SEED, batch_rows=8, rate=0.01),
        threads=1,
        adapter_out=tmp_path / "mine",
    )
    assert trial.loss_after < 0.5 * trial.loss_before
    assert trial.accuracy_after == 1.0
    assert "nats per row" in text(trial)

    manifest = trainer.manifest
    assert manifest.hears is not None
    batch = make_batch(load_recordings(data, manifest.hears, manifest.classes).rows, 0)
    adapter = read_adapter(tmp_path / "mine", manifest)
    answers = trainer.answers(batch, trainer.layout.split(adapter.vector))
    assert answers.right.all()
    export(tmp_path / "mine", tmp_path / "peft", audio_folder / "bundle")
    given = torch.from_numpy(batch.ids)
    stock = WhisperForAudioClassification.from_pretrained(audio_folder / "model", num_labels=3)
    stock.encoder.embed_positions = nn.Embedding.from_pretrained(stock.encoder.embed_positions.weight[:10])
    stock.config.max_source_positions = 10
    exact, near = (PeftModel.from_pretrained(base, tmp_path / "peft").eval() for base in (dequantised, stock))
    with torch.no_grad():
        found, floats = (model(input_features=given).logits.numpy() for model in (exact, near))
    scale = np.linalg.norm(answers.logits)
    assert np.linalg.norm(found - answers.logits) <= 1e-4 * scale
    assert np.linalg.norm(floats - answers.logits) <= 0.05 * scale  # the float weights, not those of int8
    assert (floats.argmax(1) == answers.labels).all()


# ---------------------------------------------------------------- gates
@pytest.mark.parametrize("spoilt", ["POS", "encoder.conv2.bias"])
def test_a_bundle_that_computes_something_else_is_not_signed(
    audio_folder: Path, tmp_path: Path, spoilt: str
) -> None:
    manifest = manifest_of(audio_folder)
    folder = tmp_path / "bundle"
    shutil.copytree(audio_folder / "bundle", folder)
    place = manifest.tensors[spoilt]
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(place.offset)
        values = np.frombuffer(stream.read(4 * int(np.prod(place.shape))), "<f4")
        stream.seek(place.offset)
        stream.write((values + 0.05).astype("<f4").tobytes())
    source, fmt = source_of(audio_folder), FORMATS["int8g"]
    lora = LoraConfig(r=4, alpha=8.0)
    exam = AudioExam.of(source, exact=False, fmt=fmt, lora=lora)
    quantise(source, fmt, lambda phase, fraction: None)
    with pytest.raises(GateError):
        exam.run(
            Draft(folder, manifest.tensors, frozenset(manifest.operators), None, 0),
            lambda phase, fraction: None,
        )


def test_the_gates_sounds_are_heard_as_transformers_hears_them() -> None:
    from transformers import WhisperFeatureExtractor

    audio = AudioInput(mels=80, samples=16_000)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    for sound in sounds(audio):
        expected = extractor._np_extract_fbank_features(sound[None].astype(np.float32), "cpu")[0]
        assert np.abs(features_of(sound.astype(np.float32), audio) - expected).max() <= 1e-5


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("seconds", [0.21, 0.5, -1.0, float("nan")])
def test_a_window_that_the_model_has_not_is_refused(audio_folder: Path, seconds: float) -> None:
    with pytest.raises(UsageError, match="cannot hear a window"):
        load(str(audio_folder / "model"), whispers.CLASSES, seconds)


def test_names_are_needed_and_fit(audio_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the classes") as caught:
        load(str(audio_folder / "model"))
    assert "--classes yes,no" in caught.value.hint
    assert "embed" not in caught.value.hint, "it reads no texts"
    with pytest.raises(UsageError, match="tells 3 classes apart, not 2"):
        load(str(whispers.write_model(tmp_path, WITH_HEAD)), ("yes", "no"))


def test_seconds_are_for_sound(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="only a model of sound"):
        load(str(tiny_model), (), 1.0)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"use_weighted_layer_sum": True}, "reads every layer"),
        ("config.json", {"architectures": ["WhisperForCausalLM"]}, "architecture is not supported"),
        ("config.json", {"new_trick": 1}, "not handled"),
        ("config.json", {"quantization_config": {"bits": 4}}, "not handled.*unquantised checkpoint"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "never run"),
        ("preprocessor_config.json", {"hop_length": 128}, "features made in this way"),
        ("preprocessor_config.json", {"dither": 0.1}, "features made in this way"),
    ],
)
def test_what_would_be_heard_wrongly_is_refused(
    audio_folder: Path, tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    shutil.copytree(audio_folder / "model", tmp_path / "model")
    path = tmp_path / "model" / file
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, **change}))
    with pytest.raises(UnsupportedError, match=message):
        load(str(tmp_path / "model"), whispers.CLASSES)


def test_a_dry_run_foretells_a_classifier_of_sound(audio_folder: Path) -> None:
    made = manifest_of(audio_folder)
    lora = LoraConfig(r=4, alpha=8.0)
    outline = outline_of(str(audio_folder / "model"), whispers.CLASSES, "", whispers.SECONDS)
    told = draft(outline, with_targets(outline.model, lora), FORMATS["int8g"])
    assert told.files[WEIGHTS].size == made.files[WEIGHTS].size
    assert told.layout.numbers == made.layout.numbers
    same = (
        "hears",
        "positions_max",
        "hidden",
        "layers",
        "heads",
        "vocabulary",
        "classes",
        "task",
        "architecture",
    )
    assert [getattr(told, name) for name in same] == [getattr(made, name) for name in same]
    assert need(told, Training(), data=False) == need(made, Training(), data=False)


def test_a_dry_run_refuses_what_quantising_would(audio_folder: Path, tiny_model: Path) -> None:
    folder = str(audio_folder / "model")
    for words, said in (
        ((folder,), "name the classes"),
        ((folder, whispers.CLASSES, "embed"), "only one to classify"),
        ((folder, whispers.CLASSES, "", 0.21), "cannot hear a window"),
        ((str(tiny_model), (), "", 1.0), "only a model of sound"),
    ):
        with pytest.raises(UsageError, match=said):
            outline_of(*words)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the manifest
@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"kind": "mfcc"}, UnsupportedError, "audio.kind"),
        ({"sample_rate": 8_000}, UnsupportedError, "audio.sample_rate"),
        ({"n_fft": 512}, UnsupportedError, "audio.n_fft"),
        ({"hop": 80}, UnsupportedError, "audio.hop"),
        ({"mels": 100_000}, IntegrityError, "audio.mels"),
        ({"samples": 3_201}, IntegrityError, "audio.samples"),
        ({"samples": 16_000 * 31}, IntegrityError, "audio.samples"),
        ({"samples": 6_400}, IntegrityError, "positions_max"),
    ],
)
def test_a_device_takes_no_features_that_it_does_not_make(
    audio_folder: Path, change: dict[str, object], error: type[FedgeError], field: str
) -> None:
    manifest = manifest_of(audio_folder)
    assert manifest.hears is not None
    with pytest.raises(error) as caught:
        reopened(msgspec.structs.replace(manifest, audio=msgspec.structs.replace(manifest.hears, **change)))
    assert caught.value.field == field


def test_a_bundle_that_hears_is_a_classifier(audio_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="tells classes apart"):
        reopened(msgspec.structs.replace(manifest_of(audio_folder), task="embed"))


def test_only_bundles_of_sound_speak_of_it(audio_folder: Path, tiny_bundle: Path) -> None:
    """A device of before refuses the field as one that it does not know, and takes bundles of texts as ever."""
    assert b'"audio"' in encode_manifest(manifest_of(audio_folder))
    assert b'"audio"' not in (tiny_bundle / MANIFEST).read_bytes()


def reopened(manifest: Manifest) -> Manifest:
    data = encode_manifest(manifest)
    return open_manifest(data, sign_manifest(data, tiny.PUBLISHER))
