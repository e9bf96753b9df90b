"""The evaluation's workers and the pooled reference, against the trainer itself, on a tiny real bundle."""

import math
import multiprocessing
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.bundle import open_bundle
from edge_agent.dataset import batches, load_dataset, load_encoder, make_batch
from edge_agent.round import data_seed
from edge_agent.trainer import AdamW, Trainer, train_round
from edge_agent.trainer.round import FrozenA
from fedge.errors import ConfigError, DataError, NoInputError
from fedge.messages import Training
from fedge.rules import Part
from firmware_sim.processes import evaluation
from firmware_sim.processes.evaluation import PersonLoss, evaluate_people, pooled, spread
from firmware_sim.processes.local_training import LocalWork, Plan
from firmware_sim.processes.reference import _Channel, federated
from firmware_sim.processes.reference import pooled as pooled_reference

TRAINING = Training(batch_rows=2, rate=0.02, data_seed=5, a_seed=b"a" * 16)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "the", "hen"]


@pytest.fixture
def people(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for place in range(4):
        lines = [
            {
                "prompt": " ".join(WORDS[row : row + 2]),
                "completion": " ".join(WORDS[place : place + 2 + row % 3]),
            }
            for row in range(7)
        ]
        path = tmp_path / f"person-{place}.jsonl"
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))
        found[f"person-{place}"] = path
    return found


@pytest.fixture
def adapter(tiny_bundle: Path, tmp_path: Path) -> Path:
    numbers = open_bundle(tiny_bundle).layout.numbers
    values = np.random.default_rng(1).normal(0, 0.05, numbers).astype("<f4")
    path = tmp_path / "adapter.f32"
    path.write_bytes(values.tobytes())
    return path


def rows_of(bundle: Path, path: Path, training: Training = TRAINING) -> Any:
    opened = open_bundle(bundle)
    return load_dataset(
        path,
        training.template,
        load_encoder(opened.tokenizer),
        eos_id=opened.manifest.eos_id,
        window=training.window_tokens,
    ).rows


def test_children_find_what_the_trainer_finds(
    tiny_bundle: Path, people: dict[str, Path], adapter: Path
) -> None:
    told: list[tuple[int, int]] = []
    found = evaluate_people(
        tiny_bundle, people, adapter, TRAINING, processes=2, progress=lambda *now: told.append(now)
    )
    assert list(found) == list(people)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    trainer = Trainer(open_bundle(tiny_bundle), a_seed=TRAINING.a_seed)
    b = trainer.layout.split(np.frombuffer(adapter.read_bytes(), "<f4").astype(np.float32))
    for person, path in people.items():
        nll, labels = 0.0, 0
        for row in rows_of(tiny_bundle, path):  # one row at a time: padding and order must not matter
            sums, counts = trainer.row_losses(make_batch([row], 0), b)
            nll, labels = nll + float(sums.sum()), labels + int(counts.sum())
        assert found[person].labels == labels
        assert found[person].nll == pytest.approx(nll, rel=1e-5)
    whole = pooled(found.values())
    assert whole == pytest.approx(sum(p.nll for p in found.values()) / sum(p.labels for p in found.values()))


def test_a_bad_file_is_named_and_no_child_is_left(
    tiny_bundle: Path, people: dict[str, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def recorded(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        children.append(start(*args, **kwargs))
        return children[-1]

    monkeypatch.setattr(evaluation.subprocess, "Popen", recorded)
    people["person-1"].write_text('{"prompt": 3}\n')
    with pytest.raises(DataError, match=r"person-1\.jsonl"):
        evaluate_people(tiny_bundle, people, adapter, TRAINING, processes=2)
    assert len(children) == 2
    assert all(child.poll() == -signal.SIGKILL for child in children)


def test_what_is_missing_is_said(tiny_bundle: Path, people: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match=r"none\.f32"):
        evaluate_people(tiny_bundle, people, tmp_path / "none.f32", TRAINING, processes=1)
    assert evaluate_people(tiny_bundle, {}, tmp_path / "none.f32", TRAINING, processes=1) == {}


def test_a_model_that_diverges_is_not_an_error_but_a_finding(
    tiny_bundle: Path, people: dict[str, Path], adapter: Path
) -> None:
    numbers = len(adapter.read_bytes()) // 4
    adapter.write_bytes(np.full(numbers, 3e38, "<f4").tobytes())
    found = evaluate_people(tiny_bundle, people, adapter, TRAINING, processes=1)
    assert not any(math.isfinite(loss.nll) for loss in found.values())


def test_a_group_weighs_its_tokens() -> None:
    assert pooled([PersonLoss(10.0, 2), PersonLoss(30.0, 18)]) == 2.0
    assert PersonLoss(10.0, 2).per_token == 5.0
    with pytest.raises(ConfigError):
        pooled([])


def test_spread_over_people() -> None:
    found = spread([(4.0, 3.0), (5.0, 3.5), (4.0, 4.25)])
    assert (found.people, found.improved, found.smallest) == (3, 2, -0.25)
    assert found.mean == pytest.approx(0.75)
    assert found.sd == pytest.approx(0.901388, abs=1e-6)
    assert spread([(4.0, 3.0)]).sd == 0.0
    for bad in ([], [(math.nan, 1.0)]):
        with pytest.raises(ConfigError):
            spread(bad)


def test_pooled_reference_is_the_trainers_own_loop(tiny_bundle: Path, people: dict[str, Path]) -> None:
    found = pooled_reference(Plan(tiny_bundle, people, TRAINING, rounds=2, steps=2), processes=2)
    assert not multiprocessing.active_children()
    trainer = Trainer(open_bundle(tiny_bundle), a_seed=TRAINING.a_seed)
    vector = np.zeros(trainer.layout.numbers, np.float32)
    optimizer = AdamW(vector.size, rate=TRAINING.rate, weight_decay=TRAINING.weight_decay)
    losses = []
    for number in (1, 2):
        ahead = [
            batches(
                rows_of(tiny_bundle, path),
                size=TRAINING.batch_rows,
                seed=data_seed(TRAINING, person, number),
                pad_id=0,
            )
            for person, path in people.items()
        ]
        for _ in range(2):
            steps = [
                trainer.loss_and_gradients(next(endless), trainer.layout.split(vector)) for endless in ahead
            ]
            gradients = [FrozenA(trainer.layout).gradient(step.gradients, 0) for step in steps]
            optimizer.step(vector, np.mean(gradients, axis=0, dtype=np.float32))
            losses.append(sum(step.loss_sum for step in steps) / sum(step.labels for step in steps))
    assert found.training_loss == pytest.approx(losses, rel=1e-6)
    np.testing.assert_allclose(found.vector, vector, rtol=0, atol=1e-6)
    assert found.training_loss[-1] < found.training_loss[0]
    assert found.adapter == found.vector.tobytes()


def test_float_federation_is_the_mean_of_local_rounds(tiny_bundle: Path, people: dict[str, Path]) -> None:
    found = federated(Plan(tiny_bundle, people, TRAINING, rounds=1, steps=2), 2, codec=False)
    trainer = Trainer(open_bundle(tiny_bundle))
    zero = np.zeros(trainer.layout.numbers, np.float32)
    deltas = []
    for person, path in people.items():
        seed = data_seed(TRAINING, person, 1)
        endless = batches(rows_of(tiny_bundle, path), size=TRAINING.batch_rows, seed=seed, pad_id=0)
        two = [next(endless) for _ in range(2)]
        deltas.append(train_round(trainer, zero, two, a_seed=TRAINING.a_seed, lr=TRAINING.rate).delta)
    np.testing.assert_allclose(found.vector, np.mean(deltas, axis=0), rtol=0, atol=1e-6)


def test_the_codec_stays_near_the_float_federation(tiny_bundle: Path, people: dict[str, Path]) -> None:
    plan = Plan(tiny_bundle, people, TRAINING, rounds=3, steps=2)
    exact = federated(plan, 2, codec=False)
    coded = federated(plan, 2, codec=True, seed=1)
    assert coded.wrapped == 0
    assert [(figures.round, figures.bits) for figures in coded.sums] == [
        (1, 16), (1, 16), (2, 8), (2, 8), (3, 8), (3, 8),
    ]  # fmt: skip
    assert all(0 < figures.error <= 2 * figures.predicted for figures in coded.sums)
    assert 0 < np.linalg.norm(coded.vector - exact.vector) < 0.1 * np.linalg.norm(exact.vector)
    again = federated(plan, 2, codec=True, seed=1, processes=2)
    assert again.adapter == coded.adapter


def test_blocs_must_be_whole(tiny_bundle: Path, people: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="whole blocs"):
        federated(Plan(tiny_bundle, people, TRAINING, rounds=1, steps=1), 3, codec=False)


def test_errors_of_a_process_reach_the_caller(tiny_bundle: Path, tmp_path: Path) -> None:
    plan = Plan(tiny_bundle, {"nobody": tmp_path / "none.jsonl"}, TRAINING, rounds=1, steps=1)
    with pytest.raises(NoInputError, match=r"none\.jsonl"):
        pooled_reference(plan)


def test_a_sum_that_wraps_sits_out_and_is_carried(tiny_bundle: Path) -> None:
    """Eight devices that agree after eight that did not: the sum is 2.8 times what the words were made for."""
    rng = np.random.default_rng(3)
    names = [f"person-{place}" for place in range(8)]
    plan = Plan(tiny_bundle, {name: Path(name) for name in names}, TRAINING, rounds=3, steps=2)

    def work(vectors: list[Any]) -> dict[str, LocalWork]:
        unit = [(vector / np.linalg.norm(vector)).astype(np.float32) for vector in vectors]
        return {name: LocalWork(v, 10.0, 5, 4) for name, v in zip(names, unit, strict=True)}

    channel = _Channel(plan, Part("b", {"B": (2_048,)}), 8, seed=1)
    channel.total(1, work([rng.normal(size=2_048) for _ in names]))
    same = rng.normal(size=2_048)
    assert not channel.total(2, work([same] * 8)).any()
    assert (channel.wrapped, len(channel.figures)) == (1, 1)
    third = work([rng.normal(size=2_048) for _ in names])
    expected = sum(part.vector for part in third.values()) + 8 * same / np.linalg.norm(same)
    channel._spread *= 4  # wide enough words, so that the sum of both opens
    channel._mean_norm *= 2
    total = channel.total(3, third)
    assert np.linalg.norm(total - expected) < 0.15 * np.linalg.norm(expected)
