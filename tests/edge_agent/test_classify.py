"""A classifier on the device against torch: gradients, rounds, accuracy. F05: all that trains is in the vector."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from encoders import labelled_rows, random_vector, twin_of
from transformers import AutoModelForSequenceClassification

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import Batch, load_dataset, load_encoder, make_batch
from edge_agent.personal_once import personalise_once
from edge_agent.personal_once import text as personal_text
from edge_agent.planner import Plan
from edge_agent.trainer import Trainer, train_round
from edge_agent.trial import text, train_once
from fedge.errors import DataError
from fedge.io.adapter_file import read_adapter
from fedge.lora import DENSE
from fedge.messages import Template, Training
from quantize.classifier_gates import LabelledBatch, torch_answers

SEED = bytes(range(16))
WORDS = {
    "lights": "the lazy dog and the hen",
    "music": "how are you my friend",
    "weather": "best of the week",
}


@pytest.fixture(scope="module")
def folder(classifier_folder: Callable[[str], Path]) -> Path:
    return classifier_folder("bert")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def trainer(bundle: Bundle) -> Trainer:
    return Trainer(bundle, a_seed=SEED)


@pytest.fixture(scope="module")
def dequantised(folder: Path) -> object:
    return twin_of(folder)


def absolute(bundle: Bundle, trainer: Trainer, vector: np.ndarray) -> dict[str, np.ndarray]:
    """A, B and the head's own values, as torch has them."""
    tensors = {**trainer.layout.frozen(SEED), **trainer.layout.split(vector)}
    return {n: v + bundle.tensor(n) if n.startswith(DENSE) else v for n, v in tensors.items()}


# ---------------------------------------------------------------- against torch
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 17), (6, 40)])
def test_loss_and_gradients_are_those_of_torch(
    trainer: Trainer, bundle: Bundle, dequantised: object, rows: int, width: int
) -> None:
    vector, batch = random_vector(trainer), labelled_rows(rows, width)
    found = trainer.loss_and_gradients(batch, trainer.layout.split(vector))
    twin = LabelledBatch(batch.ids, batch.mask, batch.classes)
    loss, logits, expected = torch_answers(
        dequantised, bundle.manifest.lora, absolute(bundle, trainer, vector), twin
    )
    assert found.labels == rows
    assert found.loss_sum / rows == pytest.approx(loss, abs=1e-5)
    assert {DENSE + name for name in bundle.manifest.dense} <= found.gradients.keys()
    for name in trainer.layout.shapes:
        norm = np.linalg.norm(expected[name])
        assert norm > 1e-6, name  # a vanishing gradient would prove nothing
        assert np.linalg.norm(found.gradients[name] - expected[name]) <= 1e-4 * norm, name
    answer = trainer.answers(batch, trainer.layout.split(vector))
    assert np.allclose(answer.logits, logits, atol=1e-5)


def test_pieces_of_a_batch_add_up_to_the_batch(bundle: Bundle, trainer: Trainer) -> None:
    small = Trainer(bundle, a_seed=SEED, plan=Plan(rows=2))
    vector, batch = random_vector(trainer), labelled_rows(5, 20)
    whole, parts = (t.loss_and_gradients(batch, t.layout.split(vector)) for t in (trainer, small))
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    for name, value in whole.gradients.items():
        assert np.allclose(parts.gradients[name], value, atol=1e-5 * np.abs(value).max()), name


# ---------------------------------------------------------------- what counts
def test_a_row_without_a_class_is_left_out_of_loss_gradient_and_count(trainer: Trainer) -> None:
    batch, adapter = labelled_rows(4, 16), trainer.layout.split(random_vector(trainer))
    with_hole = Batch(batch.ids, batch.mask, batch.labels, np.array([0, -1, 2, 1]))
    kept = [0, 2, 3]
    without = Batch(batch.ids[kept], batch.mask[kept], batch.labels[kept], np.array([0, 2, 1]))
    found, expected = (trainer.loss_and_gradients(b, adapter) for b in (with_hole, without))
    assert (found.labels, expected.labels) == (3, 3)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    name = next(iter(trainer.layout.b_shapes))
    assert np.allclose(found.gradients[name], expected.gradients[name], atol=1e-6)
    sums, counts = trainer.row_losses(with_hole, adapter)
    assert counts.tolist() == [1, 0, 1, 1]
    assert sums[1] == 0
    assert sums.sum() == pytest.approx(found.loss_sum, rel=1e-6)


def test_a_class_that_the_bundle_does_not_have_is_refused(trainer: Trainer) -> None:
    batch = labelled_rows(2, 8)
    wrong = Batch(batch.ids, batch.mask, batch.labels, np.array([0, 3]))
    with pytest.raises(DataError, match="no such class"):
        trainer.loss_and_gradients(wrong, trainer.layout.split(random_vector(trainer)))


def test_a_round_moves_the_head_and_counts_rows(bundle: Bundle, trainer: Trainer, tmp_path: Path) -> None:
    batches = [labelled_rows(4, 12, seed) for seed in range(3)]
    zero = np.zeros(trainer.layout.numbers, np.float32)
    outcome = train_round(trainer, zero, batches * 4, a_seed=SEED, lr=0.01)
    moved = trainer.layout.split(outcome.delta)
    assert all(np.abs(value).max() > 1e-3 for value in moved.values())  # all that trains is in the delta
    assert (outcome.labels, outcome.rows, outcome.steps) == (48, 48, 12)
    first, last = (
        sum(trainer.row_losses(b, trainer.layout.split(v))[0].sum() for b in batches)
        for v in (zero, outcome.delta)
    )
    assert last < 0.7 * first


def test_a_delta_of_zeros_is_the_source_itself(folder: Path, trainer: Trainer, dequantised: object) -> None:
    """Dense numbers are changes: a fresh adapter answers as the quantised checkpoint does."""
    batch, zero = labelled_rows(3, 12), np.zeros(trainer.layout.numbers, np.float32)
    with torch.no_grad():
        expected = dequantised(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
    assert np.allclose(trainer.answers(batch, trainer.layout.split(zero)).logits, expected.numpy(), atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        source = plain(
            input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)
        ).logits
    assert (source - expected).norm() < 0.05 * source.norm()


# ---------------------------------------------------------------- from a file, by the worker
def write_rows(path: Path, times: int = 4) -> Path:
    rows = [
        {"text": f"{phrase} {n}", "label": label} for n in range(times) for label, phrase in WORDS.items()
    ]
    path.write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    return path


def test_labelled_texts_become_rows_framed_as_the_encoder_knows_them(bundle: Bundle, tmp_path: Path) -> None:
    data = load_dataset(
        write_rows(tmp_path / "rows.jsonl"),
        Template(),
        load_encoder(bundle.tokenizer),
        eos_id=bundle.manifest.eos_id,
        window=32,
        classes=bundle.manifest.classes,
    )
    batch = make_batch(data.rows, bundle.manifest.pad_id)
    assert batch.classes is not None
    assert batch.classes.tolist() == [0, 1, 2] * 4
    assert batch.ids[0, 0] == 0  # the token before a text


def test_train_once_learns_and_tells_accuracy(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.fedge"
    trial = train_once(
        folder / "bundle",
        write_rows(tmp_path / "rows.jsonl", 10),
        steps=30,
        training=Training(a_seed=SEED, batch_rows=8, window_tokens=32, rate=0.01),
        threads=1,
        adapter_out=adapter,
    )
    assert trial.loss_after < 0.5 * trial.loss_before
    assert trial.accuracy_after == 1.0
    assert "accuracy" in text(trial)
    assert "nats per row" in text(trial)
    assert adapter.is_file()


def test_a_persons_own_classifier_has_a_head_of_its_own(folder: Path, tmp_path: Path) -> None:
    rows, fleet, mine = (
        write_rows(tmp_path / "rows.jsonl", 10),
        tmp_path / "fleet.fedge",
        tmp_path / "mine.fedge",
    )
    training = Training(rule="fedit", a_seed=SEED, batch_rows=8, window_tokens=32, rate=0.005)
    train_once(folder / "bundle", rows, steps=1, training=training, threads=1, adapter_out=fleet)
    found = personalise_once(
        folder / "bundle", rows, fleet, mine, steps=(10,), alone_steps=(20,), training=training, threads=1
    )
    assert list(found.tried)[:3] == ["fleet", "10 steps", "20 steps alone"]
    assert len(found.tried) == 4  # and the mean of the better two
    assert "nats per row" in personal_text(found)
    adapters = [read_adapter(path, open_bundle(folder / "bundle").manifest).tensors for path in (fleet, mine)]
    heads = [name for name in adapters[0] if name.startswith(DENSE)]
    assert heads
    assert not any(np.array_equal(adapters[0][name], adapters[1][name]) for name in heads)
