"""A head that trains alone: the encoder runs once for each row, and the numbers are those of whole steps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from encoders import labelled_rows, random_vector

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import Batch
from edge_agent.depth import FEATURES, HEAD
from edge_agent.trainer import HEAD_ONLY, Trainer, TrainState, train_round
from edge_agent.trainer.frozen import FrozenEncoder
from edge_agent.trainer.sessions import Graph
from edge_agent.trial import train_once
from fedge.errors import ConfigError, UsageError
from fedge.io.adapter_file import read_adapter
from fedge.lora import DENSE
from fedge.messages import Training

SEED = bytes(range(16))
ONE_RUN = 1  # what a step takes once all its rows are known: the head's own session


@pytest.fixture(scope="module")
def bundle(classifier_folder: Callable[[str], Path]) -> Bundle:
    return open_bundle(classifier_folder("bare") / "bundle")


@pytest.fixture
def trainer(bundle: Bundle) -> Trainer:
    return Trainer(bundle, a_seed=SEED)


def assert_head_of_whole_step(trainer: Trainer, batch: Batch, vector: np.ndarray) -> None:
    adapter = trainer.layout.split(vector)
    whole = trainer.loss_and_gradients(batch, adapter)
    found = trainer.loss_and_gradients(batch, adapter, HEAD_ONLY)
    assert found.labels == whole.labels
    assert found.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert found.gradients.keys() == {name for name in whole.gradients if name.startswith(DENSE)}
    for name, value in found.gradients.items():
        scale = np.abs(whole.gradients[name]).max()
        assert scale > 1e-4, name  # a vanishing gradient would prove nothing
        assert np.allclose(value, whole.gradients[name], atol=1e-5 * scale), name


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_loss_and_gradient_are_those_of_a_whole_step_whatever_the_head(
    classifier_folder: Callable[[str], Path], name: str
) -> None:
    """BERT's pooler reads the first token; Llama's score meets every token, so its bundle has nothing to keep."""
    trainer = Trainer(open_bundle(classifier_folder(name) / "bundle"), a_seed=SEED)
    assert (f"{FEATURES}.onnx" in trainer.manifest.files) == (name == "bert")
    assert_head_of_whole_step(trainer, labelled_rows(4), random_vector(trainer))


def test_another_adapter_in_the_layers_is_another_encoder(trainer: Trainer) -> None:
    for seed in (5, 6, 5):
        assert_head_of_whole_step(trainer, labelled_rows(4), random_vector(trainer, seed))


def test_a_row_without_a_class_is_left_out(trainer: Trainer) -> None:
    batch = labelled_rows(4)
    with_hole = Batch(batch.ids, batch.mask, batch.labels, np.array([0, -1, 2, 1]))
    assert_head_of_whole_step(trainer, with_hole, random_vector(trainer))


def test_rows_are_encoded_once_and_not_in_batches_of_other_company(bundle: Bundle) -> None:
    runs: list[int] = []
    trainer = Trainer(bundle, a_seed=SEED, pause=lambda: runs.append(1))
    batch, adapter = labelled_rows(4), trainer.layout.split(random_vector(trainer))

    def count(given: Batch) -> int:
        runs.clear()
        trainer.loss_and_gradients(given, adapter, HEAD_ONLY)
        return len(runs)

    a_row = 1 + trainer.layout.layers + 1  # before the layers, each of them, and what the head reads
    assert count(batch) == 4 * a_row + ONE_RUN
    assert count(batch) == ONE_RUN
    wider = Batch(
        *(np.pad(part[1:], ((0, 0), (0, 3))) for part in (batch.ids, batch.mask)),
        batch.labels[1:],
        batch.classes[1:],
    )
    assert count(wider) == ONE_RUN
    assert count(labelled_rows(2, seed=1)) == 2 * a_row + ONE_RUN


def test_a_round_moves_the_head_and_nothing_else(trainer: Trainer) -> None:
    batches, start = [labelled_rows(4, seed=seed) for seed in range(3)], random_vector(trainer)
    outcome = train_round(trainer, start, batches * 5, a_seed=SEED, lr=0.02, depth=HEAD_ONLY)
    moved = trainer.layout.split(outcome.delta)
    assert {name for name, value in moved.items() if value.any()} == {
        DENSE + name for name in trainer.manifest.dense
    }
    losses = [
        sum(trainer.row_losses(batch, trainer.layout.split(vector))[0].sum() for batch in batches)
        for vector in (start, start + outcome.delta)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_a_round_that_was_cut_off_ends_with_the_same_bits(bundle: Bundle, trainer: Trainer) -> None:
    """The second half meets rows that the first half had met in other batches."""
    batch = labelled_rows(6)
    cut = [
        Batch(*(part[chosen] for part in (batch.ids, batch.mask, batch.labels, batch.classes)))
        for chosen in ([0, 5], [3, 1, 2], [4, 0, 1], [5, 3, 2])
    ]
    states: list[TrainState] = []
    start = random_vector(trainer)

    def keep(state: TrainState) -> None:
        moments = tuple(moment.copy() for moment in state.moments)
        states.append(TrainState(b"", state.progress, state.vector.copy(), moments))

    def end(of: Trainer, batches: list[Batch], resume: TrainState | None = None) -> np.ndarray:
        return train_round(
            of, start, batches, a_seed=SEED, lr=0.02, depth=HEAD_ONLY, resume=resume, keep=keep
        ).delta

    whole = end(trainer, cut)
    assert np.array_equal(end(Trainer(bundle, a_seed=SEED), cut[2:], states[1]), whole)


def test_what_does_not_fit_is_encoded_again(bundle: Bundle) -> None:
    """The first rows stay: a data set comes round as a whole, and the last ones would only push out the next."""
    graphs = [Graph(bundle.graph(name), 1) for name in (FEATURES, HEAD)]
    hidden, encoded = bundle.manifest.hidden, list[int]()
    frozen = FrozenEncoder(*graphs, kept_bytes_max=2 * (4 * hidden + 16))
    values = {DENSE + name: np.ones(shape, np.float32) for name, shape in bundle.manifest.dense.items()}

    def encode(ids: np.ndarray, mask: np.ndarray):  # type: ignore[no-untyped-def]
        encoded.append(ids.shape[1])
        yield
        return np.ones((1, ids.shape[1], hidden), np.float32)

    batch = labelled_rows(3)
    labelled = Batch(batch.ids, batch.mask, batch.classes[:, None])
    for _ in range(3):
        for _ in frozen.step(labelled, {}, values, {}, encode):
            pass
    assert encoded == [14, 13, 12, 12, 12]


def test_a_bundle_without_a_head_that_trains_is_refused(tiny_bundle: Path) -> None:
    trainer = Trainer(open_bundle(tiny_bundle), a_seed=SEED)
    batch = Batch(np.ones((1, 4), np.int64), np.ones((1, 4), np.int64), np.ones((1, 4), np.int64))
    with pytest.raises(ConfigError, match="no head"):
        trainer.loss_and_gradients(batch, trainer.layout.split(random_vector(trainer)), HEAD_ONLY)


def write_rows(path: Path) -> Path:
    words = {
        "lights": "the lazy dog and the hen",
        "music": "how are you my friend",
        "weather": "best of the week",
    }
    lines = [
        json.dumps({"text": f"{text} {i}", "label": label}) for i in range(8) for label, text in words.items()
    ]
    path.write_text("\n".join(lines))
    return path


def test_a_device_alone_trains_the_head_and_then_all_of_it(bundle: Bundle, tmp_path: Path) -> None:
    data, head, whole = write_rows(tmp_path / "rows.jsonl"), tmp_path / "head.fedge", tmp_path / "whole.fedge"
    training = Training(a_seed=SEED, batch_rows=8, window_tokens=32, rate=0.02)
    first = train_once(
        bundle.folder, data, steps=40, adapter_out=head, head_only=True, training=training, threads=1
    )
    assert first.loss_after < 0.7 * first.loss_before
    moved = read_adapter(head, bundle.manifest).tensors
    assert all(value.any() == name.startswith(DENSE) for name, value in moved.items() if name[-2:] != ".A")
    second = train_once(
        bundle.folder, data, steps=3, adapter_out=whole, start=head, training=training, threads=1
    )
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-4)
    assert any(v.any() for n, v in read_adapter(whole, bundle.manifest).tensors.items() if n.endswith(".B"))


def test_a_head_alone_is_refused_before_any_work_where_there_is_none(
    bundle: Bundle, tiny_bundle: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UsageError, match="no head"):
        train_once(tiny_bundle, data, steps=1, training=Training(), head_only=True)
    with pytest.raises(UsageError, match="core"):
        train_once(bundle.folder, data, steps=2, training=Training(rule="core"), head_only=True)
