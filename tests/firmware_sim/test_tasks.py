"""Tasks of a world: the same bytes for the same arguments, a loss that falls, rare classes on the slow boards."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedge.errors import ConfigError, NoInputError
from fedge.messages import Training
from firmware_sim.world import tasks
from firmware_sim.world.real_task import RealTask
from firmware_sim.world.task import Task
from firmware_sim.world.tasks import RARE, Mlp, drawn_samples, make_task


def odd(number: int) -> bool:
    return number % 2 == 1


def small(name: str, seed: int = 3) -> Task:
    return make_task(name, 40, seed, slow=odd)  # type: ignore[arg-type]


def averaged(task: Task, rounds: int, devices: int, depth: int = 0) -> bytes:
    """The adapter after rounds in which all devices train and their changes are averaged."""
    adapter = task.first()
    for number in range(rounds):
        mean = np.mean([task.train(n, adapter, 20, number, depth).delta for n in range(devices)], axis=0)
        adapter = (np.frombuffer(adapter, "<f4") + mean).astype("<f4").tobytes()
    return adapter


@pytest.mark.parametrize("name", ["bowl", "mlp"])
def test_the_same_arguments_give_the_same_bytes_in_any_order(name: str) -> None:
    one, other = small(name), small(name)
    other.train(5, other.first(), 3, 1, 0)  # what was asked before changes nothing
    first = one.first()
    a, b = one.train(7, first, 20, 9, 0), other.train(7, first, 20, 9, 0)
    assert a.delta.tobytes() == b.delta.tobytes()
    assert (a.loss_sum, a.labels) == (b.loss_sum, b.labels)
    assert a.delta.dtype == np.float32
    assert a.delta.shape == (one.numbers,)
    assert one.evaluate(first) == other.evaluate(first)


@pytest.mark.parametrize("name", ["bowl", "mlp"])
def test_another_seed_device_or_round_is_other_work(name: str) -> None:
    task = small(name)
    first = task.first()
    work = [task.train(7, first, 20, 9, 0), task.train(8, first, 20, 9, 0), task.train(7, first, 20, 10, 0)]
    work.append(small(name, seed=4).train(7, first, 20, 9, 0))
    assert len({learned.delta.tobytes() for learned in work}) == len(work)


@pytest.mark.parametrize("name", ["bowl", "mlp"])
def test_a_device_is_the_same_in_a_fleet_of_any_size(name: str) -> None:
    few, many = make_task(name, 10, 1), make_task(name, 100_000, 1)  # type: ignore[arg-type]
    assert few.samples(9) == many.samples(9)
    first = few.first()
    assert few.train(9, first, 2, 0, 0).delta.tobytes() == many.train(9, first, 2, 0, 0).delta.tobytes()


@pytest.mark.parametrize(("name", "rounds", "below"), [("bowl", 10, 0.2), ("mlp", 25, 0.7)])
def test_rounds_lower_the_public_loss(name: str, rounds: int, below: float) -> None:
    task = small(name)
    before = task.evaluate(task.first())["loss"]
    after = task.evaluate(averaged(task, rounds, devices=16))["loss"]
    assert after < below < before


def test_a_bowl_begins_at_one_and_has_nothing_to_hide_at_its_optimum() -> None:
    task = small("bowl")
    assert task.evaluate(task.first())["loss"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("name", "split"), [("bowl", 48), ("mlp", 24 * 32 + 32)])
def test_depth_trains_the_upper_layers_alone(name: str, split: int) -> None:
    delta = small(name).train(3, small(name).first(), 5, 0, 1).delta
    assert not delta[:split].any()
    assert delta[split:].any()


def test_more_steps_go_further() -> None:
    task = small("bowl")
    few, many = (task.train(3, task.first(), steps, 0, 0) for steps in (2, 20))
    assert np.linalg.norm(many.delta) > 2 * np.linalg.norm(few.delta)
    assert (few.labels, many.labels) == (32, 320)


def test_rare_classes_live_on_slow_boards() -> None:
    task = Mlp(200, 1, slow=odd)
    rare = [np.isin(task.data(number)[1], RARE).mean() for number in range(200)]
    slow, fast = np.mean(rare[1::2]), np.mean(rare[0::2])
    assert slow > 0.3
    assert fast < 0.05


def test_a_model_without_the_slow_boards_is_bad_at_rare_classes() -> None:
    task = make_task("mlp", 40, 1, slow=lambda number: number >= 20)
    without, with_them = averaged(task, 12, devices=20), averaged(task, 12, devices=40)
    assert task.evaluate(without)["rare_accuracy"] < 0.4 < task.evaluate(with_them)["rare_accuracy"]


def test_a_losses_mean_is_what_training_meets() -> None:
    task = Mlp(10, 1)
    losses = task.losses(2, task.first())
    assert losses.shape == (task.samples(2),)
    one_step = task.train(2, task.first(), 1, 0, 0)
    assert one_step.loss_sum / one_step.labels == pytest.approx(losses.mean(), rel=0.5)


def test_data_is_forgotten_when_there_is_no_room_and_comes_back_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_CACHED_DEVICES_MAX", 3)
    task = Mlp(10, 1)
    before = task.data(0)[0].tobytes()
    for number in range(1, 8):
        task.data(number)
    assert len(task._cached) == 3
    assert task.data(0)[0].tobytes() == before


def test_sample_counts_keep_their_bounds_and_their_law() -> None:
    counts = [drawn_samples(1, number) for number in range(2_000)]
    assert min(counts) == 20
    assert max(counts) == 600
    assert 65 < np.median(counts) < 82  # exp(4.3) = 73.7


def test_samples_may_come_from_the_draws() -> None:
    task = make_task("mlp", 10, 1, samples=lambda number: 30 + number)
    assert isinstance(task, Mlp)
    assert task.samples(4) == len(task.data(4)[1]) == 34


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match="no such task"):
        make_task("maze", 10, 1)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the shipped trainer
@pytest.fixture
def people(tmp_path: Path) -> Path:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "and",
        "then",
        "the",
        "hen",
    ]
    for person in range(2):
        folder = tmp_path / f"person-{person}"
        folder.mkdir()
        for name, rows in (("train.jsonl", range(8)), ("heldout.jsonl", range(8, 11))):
            lines = [
                {"prompt": " ".join(words[row : row + 2]), "completion": " ".join(words[person : person + 3])}
                for row in rows
            ]
            (folder / name).write_bytes(msgspec.json.Encoder().encode_lines(lines))
    return tmp_path


def test_a_real_bundle_learns_in_a_world(tiny_bundle: Path, people: Path) -> None:
    task = RealTask(tiny_bundle, people, Training(batch_rows=2, rate=0.02))
    assert task.samples(0) == task.samples(2) == 8  # two people for any number of devices
    first = task.first()
    learned = task.train(1, first, 3, 5, 0)
    assert learned.delta.tobytes() == task.train(3, first, 3, 5, 0).delta.tobytes()
    adapter = averaged(task, 3, devices=2)
    assert task.evaluate(adapter)["loss"] < task.evaluate(first)["loss"] - 0.1


def test_depth_leaves_the_lower_layers_of_a_bundle_alone(tiny_bundle: Path, people: Path) -> None:
    task = RealTask(tiny_bundle, people, Training(batch_rows=2))
    parts = task._trainer.layout.split(task.train(0, task.first(), 2, 0, 1).delta)
    assert {name for name, part in parts.items() if part.any()} == {
        name for name in parts if name.startswith("L1/")
    }


def test_no_people_is_said_with_what_to_do(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="no data") as caught:
        RealTask(tiny_bundle, tmp_path)
    assert "fedge sim demo" in str(caught.value.hint)
