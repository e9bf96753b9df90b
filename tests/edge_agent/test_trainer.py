"""The device's training against torch, and the rules of a round."""

import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch_twin import b_gradients, torch_twin, write_vector
from training_scene import SEED, Poisoned, make_batch, random_b

from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import IGNORE, Batch
from edge_agent.trainer import AdamW, Trainer, train_round
from edge_agent.trainer.sessions import check_runtime
from fedge.errors import ConfigError, DataError, UnsupportedError


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def trainer(bundle: Bundle) -> Trainer:
    return Trainer(bundle, a_seed=SEED)


# ---------------------------------------------------------------- against torch
@pytest.mark.parametrize(("rows", "width", "padded"), [(1, 7, False), (3, 20, True), (4, 64, True)])
def test_gradients_are_those_of_torch_autograd(
    trainer: Trainer,
    bundle: Bundle,
    tiny_model: Path,
    tmp_path: Path,
    rows: int,
    width: int,
    padded: bool,
) -> None:
    """Through PEFT's own modules on the decoded weights: scale, orientation, order of A and B, padding."""
    from peft import PeftModel

    vector = random_b(trainer)
    write_vector(tmp_path, trainer.layout, bundle.manifest.lora, SEED, vector, "tiny")
    twin = PeftModel.from_pretrained(torch_twin(bundle, tiny_model), str(tmp_path), is_trainable=True)
    batch = make_batch(rows, width, padded=padded)

    result = trainer.loss_and_gradients(batch, trainer.layout.split(vector))
    loss, gradients = b_gradients(twin, batch)

    assert result.labels == (batch.labels >= 0).sum()
    assert result.loss_sum / result.labels == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == trainer.layout.b_shapes.keys()
    assert result.gradients.keys() == gradients.keys() | trainer.layout.a_shapes.keys()
    for name, expected in gradients.items():
        error = np.linalg.norm(result.gradients[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name


def test_adamw_is_torch_s() -> None:
    draw = np.random.default_rng(0)
    ours = draw.standard_normal(1_000).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(ours.copy()))
    optimizer = AdamW(1_000, rate=0.016, weight_decay=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.016, weight_decay=0.01)
    for _ in range(20):
        gradient = draw.standard_normal(1_000).astype(np.float32)
        optimizer.step(ours, gradient)
        theirs.grad = torch.from_numpy(gradient)
        reference.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-6, atol=1e-7)


# ---------------------------------------------------------------- losses
def test_row_losses_add_up_and_padding_changes_nothing(trainer: Trainer) -> None:
    b = trainer.layout.split(random_b(trainer))
    batch = make_batch(3, 20, padded=True)
    nll, labels = trainer.row_losses(batch, b)
    result = trainer.loss_and_gradients(batch, b)
    assert nll.sum() == pytest.approx(result.loss_sum, rel=1e-5)
    assert labels.tolist() == (batch.labels >= 0).sum(axis=1).tolist()
    for row in range(3):
        width = int(batch.mask[row].sum())
        alone = Batch(*(part[row : row + 1, :width] for part in (batch.ids, batch.mask, batch.labels)))
        assert trainer.row_losses(alone, b)[0][0] == pytest.approx(nll[row], rel=1e-4)


def test_a_row_without_labels_counts_nothing(trainer: Trainer) -> None:
    b = trainer.layout.split(random_b(trainer))
    batch = make_batch(2, 12)
    batch.labels[0] = IGNORE
    nll, labels = trainer.row_losses(batch, b)
    assert (nll[0], labels[0]) == (0.0, 0)
    assert nll[1] > 0
    batch.labels[1] = IGNORE
    nll, labels = trainer.row_losses(batch, b)
    assert nll.tolist() == [0.0, 0.0]
    assert labels.tolist() == [0, 0]
    with pytest.raises(DataError, match="no label"):
        trainer.loss_and_gradients(batch, b)


def test_another_a_is_another_function(bundle: Bundle, trainer: Trainer) -> None:
    other = Trainer(bundle, a_seed=bytes(16))
    vector, batch = random_b(trainer), make_batch(2, 12)
    ours = trainer.row_losses(batch, trainer.layout.split(vector))[0].sum()
    assert other.row_losses(batch, other.layout.split(vector))[0].sum() != pytest.approx(ours, rel=1e-5)
    other.freeze_a(SEED)
    assert other.row_losses(batch, other.layout.split(vector))[0].sum() == ours


# ---------------------------------------------------------------- rounds
def test_a_round_learns_repeats_itself_and_leaves_its_input_alone(trainer: Trainer) -> None:
    start = np.zeros(trainer.layout.numbers, np.float32)
    batch = make_batch(4, 24)
    told: list[float] = []
    outcome = train_round(
        trainer,
        start,
        [batch] * 8,
        a_seed=SEED,
        lr=0.016,
        after_step=lambda _, step: told.append(step.loss_sum),
    )
    assert not start.any()
    assert (outcome.steps, outcome.rows, outcome.labels) == (8, 32, 8 * (batch.labels >= 0).sum())
    assert outcome.loss_sum == pytest.approx(sum(told))
    after = trainer.row_losses(batch, trainer.layout.split(outcome.delta))[0].sum()
    assert after < 0.97 * told[0]  # q and v of a random two-layer model cannot do more on random tokens
    assert told == sorted(told, reverse=True)
    again = train_round(trainer, start, [batch] * 8, a_seed=SEED, lr=0.016)
    np.testing.assert_array_equal(again.delta, outcome.delta)


def test_the_delta_is_what_adamw_moved(trainer: Trainer) -> None:
    start, batch = random_b(trainer), make_batch(2, 12)
    outcome = train_round(trainer, start, [batch], a_seed=SEED, lr=0.01, weight_decay=0.1)
    moved = start.copy()
    gradients = trainer.loss_and_gradients(batch, trainer.layout.split(start)).gradients
    AdamW(len(start), rate=0.01, weight_decay=0.1).step(
        moved, trainer.layout.join({name: gradients[name] for name in trainer.layout.b_shapes})
    )
    np.testing.assert_array_equal(outcome.delta, moved - start)


def test_batches_without_labels_are_skipped_and_counted(trainer: Trainer) -> None:
    start, good, empty = random_b(trainer), make_batch(2, 12), make_batch(2, 12)
    empty.labels[:] = IGNORE
    mixed = train_round(trainer, start, [empty, good, empty], a_seed=SEED, lr=0.01)
    alone = train_round(trainer, start, [good], a_seed=SEED, lr=0.01)
    assert (mixed.steps, mixed.skipped) == (1, 2)
    np.testing.assert_array_equal(mixed.delta, alone.delta)
    with pytest.raises(DataError, match="no batch has a label"):
        train_round(trainer, start, [empty], a_seed=SEED, lr=0.01)


def test_training_that_diverges_is_an_error_with_a_name(trainer: Trainer) -> None:
    start, batch = random_b(trainer), make_batch(2, 12)
    with pytest.raises(ConfigError, match=r"diverged.*loss"):
        train_round(trainer, np.full_like(start, np.nan), [batch], a_seed=SEED, lr=0.01)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ConfigError, match=r"diverged.*delta"):
        train_round(trainer, start, [batch], a_seed=SEED, lr=1e39)


def test_a_step_that_is_no_number_moves_nothing_and_is_counted(trainer: Trainer) -> None:
    """Poisoned weights in one batch only: the others train as if it had not been there."""
    start, good = random_b(trainer), make_batch(2, 12)
    batches = [good, make_batch(2, 12, seed=3), make_batch(2, 12, seed=4)]
    with Poisoned(trainer, {2}) as poisoned:
        outcome = train_round(poisoned, start, batches, a_seed=SEED, lr=0.01)
    alone = train_round(trainer, start, [batches[0], batches[2]], a_seed=SEED, lr=0.01)
    assert (outcome.steps, outcome.not_finite) == (2, 1)
    np.testing.assert_array_equal(outcome.delta, alone.delta)


def test_three_of_them_in_a_row_end_the_round(trainer: Trainer) -> None:
    start, batches = random_b(trainer), [make_batch(2, 12, seed=seed) for seed in range(6)]
    with Poisoned(trainer, {1, 2, 4, 5}) as poisoned:
        assert train_round(poisoned, start, batches, a_seed=SEED, lr=0.01).not_finite == 4
    with (
        Poisoned(trainer, {3, 4, 5}) as poisoned,
        pytest.raises(ConfigError, match=r"diverged: 3 steps in a row"),
    ):
        train_round(poisoned, start, batches, a_seed=SEED, lr=0.01)


# ---------------------------------------------------------------- depth
def test_all_layers_by_name_are_all_layers(trainer: Trainer) -> None:
    start, batches = random_b(trainer), [make_batch(2, 12, seed=seed) for seed in range(3)]
    plain = train_round(trainer, start, batches, a_seed=SEED, lr=0.016)
    for depth in (trainer.layout.layers, trainer.layout.layers + 7):
        deep = train_round(trainer, start, batches, a_seed=SEED, lr=0.016, depth=depth)
        assert deep.delta.tobytes() == plain.delta.tobytes()


def test_the_top_layer_alone_learns_and_the_others_stay_as_they_are(trainer: Trainer) -> None:
    """Weight decay would move what has no gradient: it must not."""
    start, batch = random_b(trainer), make_batch(4, 24)
    below = trainer.layout.numbers // 2
    outcome = train_round(trainer, start, [batch] * 8, a_seed=SEED, lr=0.016, weight_decay=0.1, depth=1)
    assert not outcome.delta[:below].any()
    assert outcome.delta[below:].all()
    before = trainer.row_losses(batch, trainer.layout.split(start))[0].sum()
    after = trainer.row_losses(batch, trainer.layout.split(start + outcome.delta))[0].sum()
    assert after < before


def test_gradients_of_the_top_are_the_same_and_cost_fewer_runs(bundle: Bundle) -> None:
    runs: list[None] = []
    trainer = Trainer(bundle, a_seed=SEED, pause=lambda: runs.append(None))
    b, batch = trainer.layout.split(random_b(trainer)), make_batch(2, 12)
    whole = trainer.loss_and_gradients(batch, b)
    runs.clear()
    top = trainer.loss_and_gradients(batch, b, 1)
    assert len(runs) == runs_of_a_step(bundle) - (bundle.manifest.layers - 1)
    assert top.loss_sum == whole.loss_sum
    assert top.gradients.keys() == {name for name in whole.gradients if name.startswith("L1/")}
    for name, gradient in top.gradients.items():
        np.testing.assert_array_equal(gradient, whole.gradients[name])


# ---------------------------------------------------------------- the governor's hand
def runs_of_a_step(bundle: Bundle) -> int:
    """Prologue, blocks, norm, label rows, slices of the vocabulary, norm back, blocks back."""
    manifest = bundle.manifest
    return 2 * manifest.layers + 4 + -(-manifest.vocabulary // manifest.head_rows)


def test_a_step_may_be_paused_after_every_run_of_a_session(bundle: Bundle) -> None:
    pauses: list[None] = []
    trainer = Trainer(bundle, a_seed=SEED, pause=lambda: pauses.append(None))
    trainer.loss_and_gradients(make_batch(2, 12), trainer.layout.split(random_b(trainer)))
    assert len(pauses) == runs_of_a_step(bundle)


def test_what_pause_raises_stops_the_step(bundle: Bundle) -> None:
    class TooHotError(Exception):
        pass

    def stop() -> None:
        raise TooHotError

    trainer = Trainer(bundle, a_seed=SEED, pause=stop)
    with pytest.raises(TooHotError):
        trainer.loss_and_gradients(make_batch(2, 12), trainer.layout.split(random_b(trainer)))


def test_a_step_in_pieces_gives_what_a_step_gives(trainer: Trainer) -> None:
    b, batch = trainer.layout.split(random_b(trainer)), make_batch(2, 12)

    def interrupted() -> Generator[None, None, None]:
        result = yield from trainer.steps(batch, b)
        assert result.loss_sum == trainer.loss_and_gradients(batch, b).loss_sum
        seen.append(result.loss_sum)

    seen: list[float] = []
    for _ in interrupted():
        trainer.row_losses(make_batch(1, 9), b)  # the sessions may serve others in between
    assert len(seen) == 1


# ---------------------------------------------------------------- the board
def test_an_old_runtime_is_refused(bundle: Bundle) -> None:
    check_runtime("1.9.0")
    with pytest.raises(UnsupportedError, match="too old"):
        check_runtime("99.0.0")
    newer = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, runtime_min="1.999.0"))
    with pytest.raises(UnsupportedError, match="runtime_min"):
        Trainer(newer)


@pytest.mark.parametrize("sabotage", [b"", b"not a graph"])
def test_a_graph_that_does_not_load_is_refused_by_name(
    bundle: Bundle, copied: Callable[[], Path], sabotage: bytes
) -> None:
    folder = copied()
    (folder / "block_fwd.onnx").write_bytes(sabotage)
    with pytest.raises(UnsupportedError, match=r"block_fwd\.onnx"):
        Trainer(replace(bundle, folder=folder))


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Callable[[], Path]:
    def copy() -> Path:
        folder = tmp_path / "bundle"
        folder.mkdir()
        for path in tiny_bundle.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


def test_training_loads_no_torch() -> None:
    code = "import sys, edge_agent.trainer, edge_agent.dataset; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"torch", "transformers", "onnx"}.isdisjoint(loaded.split())
    assert "onnxruntime" in loaded.split()


def test_gradients_lie_in_memory_of_their_own(bundle: Bundle) -> None:
    """As the runtime gives them they are views of its arena, and each would hold a piece of that for a whole step."""
    trainer = Trainer(bundle)
    b = trainer.layout.split(np.zeros(trainer.layout.numbers, np.float32))
    for gradient in trainer.loss_and_gradients(make_batch(2, 12), b).gradients.values():
        owner = gradient
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert owner.flags.owndata
