"""How a round moves, how it goes on after a cut, and that every plan for less memory computes the same step."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from training_scene import SEED, make_batch, random_b

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import IGNORE, Batch
from edge_agent.planner import Plan
from edge_agent.trainer import Recipe, Schedule, Sgd, Trainer, TrainState, train_round
from edge_agent.trainer.checkpoints import Filed, Half
from edge_agent.trainer.state import read_state
from edge_agent.worker import memory_used
from fedge.errors import ConfigError, DataError

HALVES = (slice(0, 2), slice(2, 4))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def trainer(bundle: Bundle) -> Trainer:
    return Trainer(bundle, a_seed=SEED)


# ---------------------------------------------------------------- recipes
def test_accumulated_batches_are_one_large_batch(trainer: Trainer) -> None:
    """Batches of different label counts: the mean is over labels, not over batches."""
    start, whole = random_b(trainer), make_batch(4, 24, padded=True)
    whole.labels[0, :20] = IGNORE
    halves = [Batch(*(part[cut] for part in (whole.ids, whole.mask, whole.labels))) for cut in HALVES]
    one = train_round(trainer, start, [whole], a_seed=SEED, lr=0.01)
    two = train_round(trainer, start, halves, a_seed=SEED, lr=0.01, recipe=Recipe(accumulate=2))
    assert (two.steps, two.labels, two.rows) == (2, one.labels, one.rows)
    np.testing.assert_allclose(two.delta, one.delta, atol=2e-5)
    apart = train_round(trainer, start, halves, a_seed=SEED, lr=0.01)
    assert np.abs(apart.delta - one.delta).max() > 1e-3


def test_a_clipped_gradient_has_the_length_that_was_asked_for(trainer: Trainer) -> None:
    start, batch = random_b(trainer), make_batch(2, 12)
    plain = train_round(trainer, start, [batch], a_seed=SEED, lr=0.1, weight_decay=0.0, recipe=Recipe("sgd"))
    clipped = train_round(
        trainer, start, [batch], a_seed=SEED, lr=0.1, weight_decay=0.0, recipe=Recipe("sgd", clip_norm=1e-3)
    )
    assert np.linalg.norm(clipped.delta) == pytest.approx(1e-4, rel=1e-2)
    cosine = plain.delta @ clipped.delta / np.linalg.norm(plain.delta) / np.linalg.norm(clipped.delta)
    assert cosine == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(
        train_round(
            trainer,
            start,
            [batch],
            a_seed=SEED,
            lr=0.1,
            weight_decay=0.0,
            recipe=Recipe("sgd", clip_norm=1e9),
        ).delta,
        plain.delta,
    )


def test_the_rate_follows_its_schedule(trainer: Trainer) -> None:
    schedule = Schedule(0.1, "cosine", warmup=2, steps=6)
    rates = [schedule.rate(step) for step in range(1, 7)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert sorted(rates[2:], reverse=True) == rates[2:]
    start, batch = random_b(trainer), make_batch(2, 12)
    with_it = train_round(
        trainer, start, [batch], a_seed=SEED, lr=9.0, recipe=Recipe("sgd", schedule=Schedule(0.1, warmup=2))
    )
    without = train_round(trainer, start, [batch], a_seed=SEED, lr=0.05, recipe=Recipe("sgd"))
    np.testing.assert_array_equal(with_it.delta, without.delta)
    with pytest.raises(ConfigError, match="warm-up"):
        Schedule(0.1, "cosine", warmup=6, steps=6)


def test_sgd_is_torch_s_with_the_decay_apart() -> None:
    draw = np.random.default_rng(0)
    ours = draw.standard_normal(1_000).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(ours.copy()))
    optimizer = Sgd(1_000, rate=0.1, weight_decay=0.01, momentum=0.9)
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(20):
        gradient = draw.standard_normal(1_000).astype(np.float32)
        optimizer.step(ours, gradient)
        theirs.data.mul_(1 - 0.1 * 0.01)
        theirs.grad = torch.from_numpy(gradient)
        reference.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
    assert Sgd(10, rate=0.1, weight_decay=0.0).moments == ()


# ---------------------------------------------------------------- going on
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_round_ends_with_the_same_bits(
    trainer: Trainer, tmp_path: Path, optimizer: str, cut: int
) -> None:
    """Cut off after any batch, one of them without labels; the file in between is read back from the disk."""
    start, batches = random_b(trainer), [make_batch(2, 12, seed=seed) for seed in range(6)]
    batches[2].labels[:] = IGNORE
    recipe = Recipe(optimizer, momentum=0.9, schedule=Schedule(0.02, "cosine", warmup=2, steps=5))
    rest = {"a_seed": SEED, "lr": 0.02, "recipe": recipe}
    whole = train_round(trainer, start, batches, **rest)

    path, states = tmp_path / "round.state", list[TrainState]()
    train_round(trainer, start, batches[:cut], **rest, keep=lambda s: states.append(s))
    msgspec.structs.replace(states[-1], run=b"r").write(path)
    state = read_state(path, b"r")
    assert state is not None
    again = train_round(trainer, start, batches[state.progress.cursor :], **rest, resume=state)
    assert again.delta.tobytes() == whole.delta.tobytes()
    assert replace(again, delta=start) == replace(whole, delta=start)


def test_a_state_of_another_run_or_a_damaged_one_is_not_believed(trainer: Trainer, tmp_path: Path) -> None:
    path, states = tmp_path / "round.state", list[TrainState]()
    assert read_state(path, b"r") is None
    train_round(trainer, random_b(trainer), [make_batch(2, 12)], a_seed=SEED, lr=0.01, keep=states.append)
    msgspec.structs.replace(states[0], run=b"r").write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_state(path, b"another") is None
    whole = path.read_bytes()
    for at in (0, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_state(path, b"r") is None
    for length in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_state(path, b"r") is None
    path.write_bytes(whole)
    assert read_state(path, b"r") is not None


# ---------------------------------------------------------------- plans
@pytest.mark.parametrize(
    ("plan", "exact"),
    [
        (Plan(keep=1), True),
        (Plan(keep=2), True),
        (Plan(checkpoints="file"), True),
        (Plan(checkpoints="file", keep=1), True),
        (Plan(head_rows=37), False),
        (Plan(rows=1), False),
        (Plan(rows=2, checkpoints="file", head_rows=64), False),
        (Plan(checkpoints="half"), False),
    ],
)
def test_every_plan_computes_the_same_step(bundle: Bundle, trainer: Trainer, plan: Plan, exact: bool) -> None:
    """Bit for bit where the plan only moves memory; else but for the order of additions, or rounding to 1/2048."""
    vector, batch = random_b(trainer), make_batch(3, 20, padded=True)
    expected = trainer.loss_and_gradients(batch, trainer.layout.split(vector))
    planned = Trainer(bundle, a_seed=SEED, plan=plan)
    for _ in range(2):
        found = planned.loss_and_gradients(batch, trainer.layout.split(vector))
        assert found.labels == expected.labels
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=0 if exact else 1e-6)
        assert found.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            error = np.linalg.norm(found.gradients[name] - gradient) / np.linalg.norm(gradient)
            assert error <= (0 if exact else 2e-3 if plan.checkpoints == "half" else 2e-5), name


def test_one_layer_that_trains_needs_no_gradient_of_its_input(bundle: Bundle, trainer: Trainer) -> None:
    """The graph for it is there, is used, and gives the same numbers."""
    assert "block_bwd_first.onnx" in bundle.manifest.files
    loaded = set(trainer._streamer._graphs)
    trainer.loss_and_gradients(make_batch(1, 9), trainer.layout.split(random_b(trainer)), 1)
    assert loaded | {"block_bwd_first"} == set(trainer._streamer._graphs)


def test_half_precision_holds_the_large_features_of_a_hidden_state() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    x[0, 0, 3] = 250_000.0
    half = Half()
    half.put(0, x)
    np.testing.assert_allclose(half.take(0), x, rtol=2**-10, atol=2**-10)


def test_checkpoints_in_a_file_leave_no_name_behind(tmp_path: Path) -> None:
    filed = Filed(tmp_path, 3)
    for width in (4, 9, 2):
        tensors = [np.full((1, width, 600), i, np.float32) for i in range(3)]
        for i, x in enumerate(tensors):
            filed.put(i, x)
        assert not list(tmp_path.iterdir())
        for i in (2, 0, 1):
            np.testing.assert_array_equal(filed.take(i), tensors[i])


# ---------------------------------------------------------------- the limits of the model (F12, F13)
def test_text_beyond_the_position_table_is_refused_by_name(bundle: Bundle, trainer: Trainer) -> None:
    """F13."""
    too_long = make_batch(1, bundle.manifest.positions_max + 1)
    b = trainer.layout.split(random_b(trainer))
    for work in (trainer.loss_and_gradients, trainer.row_losses):
        with pytest.raises(DataError, match=r"longer than the model has positions.*128"):
            work(too_long, b)


def test_a_token_beyond_the_vocabulary_is_refused_by_name(bundle: Bundle, trainer: Trainer) -> None:
    batch = make_batch(1, 9)
    batch.ids[0, 3] = bundle.manifest.vocabulary
    with pytest.raises(DataError, match="not in the vocabulary"):
        trainer.loss_and_gradients(batch, trainer.layout.split(random_b(trainer)))


# ---------------------------------------------------------------- memory (F10)
def test_memory_stays_flat_whatever_lengths_come_in_whatever_order(bundle: Bundle) -> None:
    """F10: shapes that were never met before take no more than those that were."""
    trainer = Trainer(bundle, a_seed=SEED)
    vector, draw = random_b(trainer), np.random.default_rng(0)

    def some(count: int) -> int:
        for _ in range(count):
            batch = make_batch(int(draw.integers(1, 5)), int(draw.integers(3, 65)))
            trainer.loss_and_gradients(batch, trainer.layout.split(vector))
        return memory_used().anonymous

    warm = some(30)
    assert some(150) - warm < 2_000_000
