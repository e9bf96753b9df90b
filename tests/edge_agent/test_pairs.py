"""A sentence encoder on the device against torch: vectors, the loss of pairs, gradients, rounds, pieces of a batch."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from encoders import pairs, random_vector, twin_of

from edge_agent import jobs, worker
from edge_agent.bundle import Bundle, open_bundle
from edge_agent.dataset import Batch, load_encoder
from edge_agent.planner import Plan, plan, step_rows, worker_bytes
from edge_agent.trainer import Trainer, TrainState, train_round
from edge_agent.trainer.pairs import SCALE, in_batch
from edge_agent.trial import text, train_once
from fedge.cli import main
from fedge.errors import ConfigError, DataError, UsageError
from fedge.io.adapter_file import read_adapter
from fedge.messages import Training
from quantize.inputs import words_of
from quantize.reference import adapted
from quantize.sentences import SentenceEncoder

SEED = bytes(range(16))


@pytest.fixture(scope="module")
def folder(sentence_folder: Callable[[str], Path]) -> Path:
    return sentence_folder("mean")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def trainer(bundle: Bundle) -> Trainer:
    return Trainer(bundle, a_seed=SEED)


@pytest.fixture(scope="module")
def dequantised(folder: Path) -> SentenceEncoder:
    return twin_of(folder)


def reference_loss(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """MultipleNegativesRankingLoss of sentence-transformers, its defaults, from vectors: mean over the pairs."""
    units = torch.nn.functional.normalize(vectors, p=2, dim=1)
    scores = torch.mm(units[:count], units[count:].transpose(0, 1)) * 20.0
    return torch.nn.CrossEntropyLoss()(scores, torch.arange(count))


def by_torch(
    model: SentenceEncoder, trainer: Trainer, vector: np.ndarray, batch: Batch, count: int
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """(mean loss, vectors, gradients of A and B)."""
    tensors = {**trainer.layout.frozen(SEED), **trainer.layout.split(vector)}
    leaves = {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in tensors.items()}
    model.requires_grad_(False)
    with adapted(model, trainer.manifest.lora, leaves):
        vectors = model(**words_of(model, torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))).logits
        loss = reference_loss(vectors, count)
        found = torch.autograd.grad(loss, list(leaves.values()))
    gradients = {name: value.numpy() for name, value in zip(leaves, found, strict=True)}
    return loss.item(), vectors.detach().numpy(), gradients


def near(found: np.ndarray, expected: np.ndarray, relative: float = 1e-4) -> bool:
    norm = np.linalg.norm(expected)
    assert norm > 1e-6  # a vanishing gradient would prove nothing
    return bool(np.linalg.norm(found - expected) <= relative * norm)


# ---------------------------------------------------------------- against torch
@pytest.mark.parametrize("pooling", ["mean", "cls", "plain"])
def test_vectors_loss_and_gradients_are_those_of_torch(
    pooling: str, sentence_folder: Callable[[str], Path]
) -> None:
    """Of a mean of length one; of the first token as it is; and where no folder says anything."""
    folder = sentence_folder(pooling)
    trainer, model = Trainer(open_bundle(folder / "bundle"), a_seed=SEED), twin_of(folder, "embed")
    vector, batch = random_vector(trainer), pairs(5, 20)
    loss, vectors, gradients = by_torch(model, trainer, vector, batch, 5)
    adapter = trainer.layout.split(vector)
    found = trainer.loss_and_gradients(batch, adapter)
    assert found.labels == 5
    assert found.loss_sum / 5 == pytest.approx(loss, abs=1e-5)
    assert np.allclose(trainer.vectors(batch.ids, batch.mask, adapter), vectors, atol=1e-5)
    length = np.linalg.norm(vectors, axis=1)
    assert np.allclose(length, 1, atol=1e-5) == (pooling != "cls")
    for name in trainer.layout.shapes:
        assert near(found.gradients[name], gradients[name]), name
    answer = trainer.answers(batch, adapter)
    assert float(answer.nll.mean()) == pytest.approx(loss, abs=1e-5)
    assert answer.right.tolist() == (answer.logits.argmax(1) == np.arange(5)).tolist()


def test_other_texts_of_a_batch_are_told_from_as_well(trainer: Trainer, dequantised: SentenceEncoder) -> None:
    """Texts that belong to nobody, as sentence-transformers has hard negatives."""
    vector, batch = random_vector(trainer), pairs(3, more=2)
    loss, _, gradients = by_torch(dequantised, trainer, vector, batch, 3)
    found = trainer.loss_and_gradients(batch, trainer.layout.split(vector))
    assert found.loss_sum / 3 == pytest.approx(loss, abs=1e-5)
    assert all(near(found.gradients[name], gradients[name]) for name in trainer.layout.shapes)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(
    bundle: Bundle, trainer: Trainer, rows: int
) -> None:
    """The negatives of a pair are all the texts of its batch, however few of them memory holds."""
    small = Trainer(bundle, a_seed=SEED, plan=Plan(rows=rows))
    vector, batch = random_vector(trainer), pairs(5, 20)
    whole, parts = (t.loss_and_gradients(batch, t.layout.split(vector)) for t in (trainer, small))
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert parts.labels == whole.labels == 5
    for name, value in whole.gradients.items():
        assert np.allclose(parts.gradients[name], value, atol=1e-4 * np.abs(value).max()), name


# ---------------------------------------------------------------- the loss by itself
def loss_of(vectors: np.ndarray, batch: Batch) -> np.ndarray:
    return in_batch(vectors, Labelled(batch)).nll


class Labelled:
    """A batch as the trainer has it: a label a row."""

    def __init__(self, batch: Batch) -> None:
        assert batch.classes is not None
        self.ids, self.mask, self.labels = batch.ids, batch.mask, batch.classes[:, None]


def test_a_text_that_stands_twice_is_nobodys_negative() -> None:
    """Pair 1 repeats the positive of pair 0, pair 2 its anchor: none of these teaches 0 what it is not."""
    batch, draw = pairs(4, seed=3), np.random.default_rng(1)
    vectors = draw.standard_normal((8, 6)).astype(np.float32)
    plain = loss_of(vectors, batch)
    ids, mask = batch.ids.copy(), batch.mask.copy()
    ids[5], mask[5] = ids[4], mask[4]
    ids[2], mask[2] = ids[0], mask[0]
    found = loss_of(vectors, Batch(ids, mask, batch.labels, batch.classes))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = SCALE * units[:4] @ units[4:].T

    def by_hand(row: int, others: list[int]) -> float:
        return float(np.log(np.exp(scores[row, [row, *others]]).sum()) - scores[row, row])

    assert found[0] == pytest.approx(by_hand(0, [3]), rel=1e-5)
    assert found[1] == pytest.approx(by_hand(1, [2, 3]), rel=1e-5)
    assert found[2] == pytest.approx(by_hand(2, [1, 3]), rel=1e-5)
    assert found[3] == pytest.approx(plain[3], rel=1e-6)


def test_a_negative_that_is_the_anchor_itself_is_none() -> None:
    batch = pairs(3, seed=4)
    ids, mask = batch.ids.copy(), batch.mask.copy()
    ids[5], mask[5] = ids[0], mask[0]
    vectors = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    scores = in_batch(vectors, Labelled(Batch(ids, mask, batch.labels, batch.classes))).scores
    assert np.isneginf(scores).tolist() == [[False, False, True], [False] * 3, [False] * 3]


def test_vectors_that_vanish_or_are_no_numbers_do_not_break_the_loss() -> None:
    zero = in_batch(np.zeros((4, 3), np.float32), Labelled(pairs(2)))
    assert np.isfinite(zero.gradient).all()
    assert zero.nll.tolist() == pytest.approx([np.log(2)] * 2)
    assert np.isnan(in_batch(np.full((4, 3), np.nan, np.float32), Labelled(pairs(2))).nll).all()


# ---------------------------------------------------------------- rounds
def test_training_lowers_the_loss_and_finds_more(trainer: Trainer) -> None:
    batches = [pairs(6, 12, seed) for seed in range(2)]
    zero = np.zeros(trainer.layout.numbers, np.float32)
    outcome = train_round(trainer, zero, batches * 12, a_seed=SEED, lr=0.02)
    assert (outcome.labels, outcome.steps) == (144, 24)
    before, after = (
        [trainer.answers(batch, trainer.layout.split(vector)) for batch in batches]
        for vector in (zero, outcome.delta)
    )
    assert sum(a.nll.sum() for a in after) < 0.6 * sum(a.nll.sum() for a in before)
    assert sum(a.right.sum() for a in after) > sum(a.right.sum() for a in before)


def test_a_round_that_was_cut_off_ends_with_the_same_bits(bundle: Bundle) -> None:
    batches, states = [pairs(4, 12, seed) for seed in range(4)], list[TrainState]()
    zero = np.zeros(bundle.layout.numbers, np.float32)

    def keep(state: TrainState) -> None:
        moments = tuple(moment.copy() for moment in state.moments)
        states.append(TrainState(b"", state.progress, state.vector.copy(), moments))

    def end(given: list[Batch], resume: TrainState | None = None, plan: Plan | None = None) -> np.ndarray:
        fresh = Trainer(bundle, a_seed=SEED, plan=plan)
        return train_round(fresh, zero, given, a_seed=SEED, lr=0.02, resume=resume, keep=keep).delta

    whole = end(batches)
    assert np.array_equal(end(batches[2:], states[1]), whole)
    assert np.array_equal(end(batches), whole)
    assert np.array_equal(end(batches, plan=Plan(keep=bundle.manifest.layers)), whole)


def test_labels_of_something_else_are_refused(trainer: Trainer) -> None:
    batch = pairs(3)
    adapter = trainer.layout.split(random_vector(trainer))
    for own in ([0, 2, 1, -1, -1, -1], [0, 1, 2, 3, -1, -1], [-1, -1, -1, 0, 1, 2], [1, 1, 1, 0, 0, 0]):
        wrong = Batch(batch.ids, batch.mask, batch.labels, np.array(own))
        with pytest.raises(DataError, match="no pairs"):
            trainer.loss_and_gradients(wrong, adapter)


# ---------------------------------------------------------------- from a file, by the worker
def write_pairs(path: Path, count: int = 20) -> Path:
    """Halves of one sentence, of which each has a word of its own."""
    words = ["lamp", "river", "horse", "stone", "bread", "cloud", "train", "glass", "apple", "music"]
    lines = [
        json.dumps(
            {"anchor": f"tell me of the {words[n % 10]} {n}", "positive": f"{n} {words[n % 10]}, this is it"}
        )
        for n in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


def test_train_once_learns_and_tells_what_it_found(bundle: Bundle, tmp_path: Path) -> None:
    adapter = tmp_path / "mine"
    trial = train_once(
        bundle.folder,
        write_pairs(tmp_path / "pairs.jsonl", 40),
        steps=30,
        training=Training(a_seed=SEED, batch_rows=8, window_tokens=32, rate=0.02),
        threads=1,
        adapter_out=adapter,
    )
    assert trial.loss_after < 0.8 * trial.loss_before
    assert trial.accuracy_after is not None
    assert trial.accuracy_after >= trial.accuracy_before
    assert "nats per pair" in text(trial)
    assert adapter.is_file()


def test_a_head_alone_and_a_batch_of_one_pair_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(UsageError, match="no head"):
        train_once(bundle.folder, data, steps=1, training=Training(), head_only=True)
    with pytest.raises(ConfigError, match="one pair"):
        train_once(bundle.folder, data, steps=1, training=Training(batch_rows=1, window_tokens=32), threads=1)


def test_a_pair_by_itself_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Of five pairs one is held out: there is nothing to tell it from."""
    data = write_pairs(tmp_path / "pairs.jsonl", 5)
    with pytest.raises(DataError, match="by itself"):
        train_once(bundle.folder, data, steps=1, training=Training(window_tokens=32), threads=1)


def test_an_evaluation_has_no_batch_of_one_pair(bundle: Bundle, tmp_path: Path) -> None:
    job = jobs.Evaluate(
        bundle=str(bundle.folder),
        adapter=str(tmp_path / "zero.f32"),
        data=str(write_pairs(tmp_path / "pairs.jsonl", 5)),
        training=Training(batch_rows=4, window_tokens=32),
    )
    Path(job.adapter).write_bytes(bytes(4 * bundle.layout.numbers))
    found = worker.evaluate(job, lambda answer: None)
    assert found.row_labels == [1] * 5
    assert min(found.nll) > 0
    assert len(found.right) == 5
    assert found.loss_sum == pytest.approx(sum(found.nll))
    assert msgspec.json.decode(msgspec.json.encode(found), type=jobs.Evaluated) == found


def test_a_board_of_little_memory_takes_pairs_in_pieces(bundle: Bundle, tmp_path: Path) -> None:
    """A pair is two rows for the planner; what it plans is carried out: timed first, as in a fleet, then trained."""
    training = Training(batch_rows=8, window_tokens=32, a_seed=SEED, rate=0.01)
    manifest = bundle.manifest
    assert step_rows(manifest, training) == 16
    tight = min(worker_bytes(manifest, training, Plan(rows=rows)) for rows in (1, 2))
    chosen = plan(manifest, training, tight)
    assert 0 < chosen.rows < 16
    words = {"bundle": str(bundle.folder), "training": training, "plan": chosen, "scratch": str(tmp_path)}
    assert worker.gauge(jobs.Gauge(**words), lambda answer: None).seconds > 0
    (tmp_path / "zero.f32").write_bytes(bytes(4 * bundle.layout.numbers))
    job = jobs.Train(
        **words,
        adapter=str(tmp_path / "zero.f32"),
        data=str(write_pairs(tmp_path / "pairs.jsonl")),
        delta=str(tmp_path / "delta.f32"),
        steps=3,
    )
    done = worker.train(job, lambda answer: None)
    assert (done.steps, done.labels, done.samples) == (3, 24, 20)
    whole = msgspec.structs.replace(job, plan=Plan(), delta=str(tmp_path / "whole.f32"))
    worker.train(whole, lambda answer: None)
    parts, plain = (np.fromfile(one.delta, "<f4") for one in (job, whole))
    assert np.linalg.norm(parts - plain) < 0.05 * np.linalg.norm(plain)


# ---------------------------------------------------------------- what a person types
def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["agent", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_vectors_are_printed_or_written(
    bundle: Bundle, dequantised: SentenceEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["how are you", "the lazy dog and the hen", "best of the week"]
    (tmp_path / "texts").write_text("\n\n".join(texts[1:]) + "\n")
    words = ("embed", bundle.folder, texts[0], "--from", tmp_path / "texts", "--threads", 1)
    code, out, err = run(capsys, *words)
    found = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [one["text"] for one in found] == texts
    vectors = np.array([one["vector"] for one in found], np.float32)
    encode = load_encoder(bundle.tokenizer)
    for said, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([[*encode.before, *encode(said), *encode.after]])
        expected = dequantised(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert np.allclose(vector, expected[0].detach().numpy(), atol=1e-5)
    assert run(capsys, *words, "--out", tmp_path / "v.npy")[0] == 0
    assert np.array_equal(np.load(tmp_path / "v.npy"), vectors)


def test_an_adapter_moves_the_vectors(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, mine = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "mine"
    assert (
        run(capsys, "train-once", bundle.folder, data, "--steps", 2, "--window", 32, "--adapter-out", mine)[0]
        == 0
    )
    header = read_adapter(mine, bundle.manifest).header
    assert (header.rule, header.steps) == ("ffa", 2)
    plain, moved = (
        json.loads(run(capsys, "embed", bundle.folder, "a text", *more)[1])["vector"]
        for more in ((), ("--adapter", mine))
    )
    assert not np.allclose(plain, moved, atol=1e-6)


def test_what_has_no_vector_is_refused(
    bundle: Bundle, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ((tiny_bundle, "a text"), "makes no vectors"),
        ((bundle.folder,), "no text is given"),
        ((bundle.folder, " "), "without any letter"),
        ((bundle.folder, "--from", tmp_path / "none"), "cannot be read"),
    ):
        code, out, err = run(capsys, "embed", *words)
        assert code != 0
        assert out == ""
        assert said in err
