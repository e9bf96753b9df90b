"""The worker as the agent meets it: a process, a line in, lines out, and files that are whole or not there."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

from edge_agent.bundle import open_bundle
from edge_agent.dataset import batches, load_dataset, load_encoder
from edge_agent.jobs import (
    BundleJob,
    Evaluate,
    Evaluated,
    Failed,
    Gauge,
    Gauged,
    Progress,
    Sealed,
    Train,
    Trained,
)
from edge_agent.trainer import Trainer, train_round
from edge_agent.worker import COMMANDS
from fedge.io import durable
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, Manifest, encode_manifest, sign_manifest

TRAINING = Training(batch_rows=2, window_tokens=60, a_seed=bytes(range(16)))
Answers = Progress | Trained | Evaluated | Gauged | Sealed | Failed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "private.jsonl"
    rows = [{"prompt": "abc"[: i % 4], "completion": "secret words"[: 3 + i % 7]} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def adapter(tiny_bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.f32"
    numbers = open_bundle(tiny_bundle).layout.numbers
    (np.random.default_rng(1).standard_normal(numbers) * 0.05).astype("<f4").tofile(path)
    return path


@pytest.fixture
def job(tiny_bundle: Path, data: Path, adapter: Path, tmp_path: Path) -> Train:
    return Train(
        bundle=str(tiny_bundle),
        adapter=str(adapter),
        data=str(data),
        training=TRAINING,
        delta=str(tmp_path / "delta.f32"),
        steps=3,
        data_seed=4,
    )


def start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edge_agent.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ask(*lines: BundleJob | bytes) -> list[Answers]:
    """All answers of one worker to these lines."""
    text = b"".join(
        (line if isinstance(line, bytes) else msgspec.json.encode(line)) + b"\n" for line in lines
    )
    with start() as child:
        out, _ = child.communicate(text, timeout=120)
        assert child.returncode == 0
    return [msgspec.json.decode(line, type=Answers) for line in out.splitlines()]


def change(job: Train, **fields: object) -> Train:
    return msgspec.structs.replace(job, **fields)


# ---------------------------------------------------------------- training
def test_training_gives_the_delta_of_the_same_round_in_this_process(job: Train) -> None:
    *progress, last = ask(job)
    assert [(p.done, p.of) for p in progress if isinstance(p, Progress)] == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(last, Trained)

    bundle = open_bundle(Path(job.bundle))
    encode, manifest = load_encoder(bundle.tokenizer), bundle.manifest
    rows = load_dataset(
        Path(job.data), TRAINING.template, encode, eos_id=manifest.eos_id, window=TRAINING.window_tokens
    ).rows
    expected = train_round(
        Trainer(bundle),
        np.fromfile(job.adapter, "<f4"),
        islice(batches(rows, size=2, seed=4, pad_id=manifest.pad_id), 3),
        a_seed=TRAINING.a_seed,
        lr=TRAINING.rate,
    )
    np.testing.assert_array_equal(np.fromfile(job.delta, "<f4"), expected.delta)
    assert (last.loss_sum, last.labels) == (expected.loss_sum, expected.labels)
    assert (last.samples, last.rows, last.steps, last.skipped) == (9, 6, 3, 0)
    assert last.loss_sum == pytest.approx(sum(p.loss_sum for p in progress if isinstance(p, Progress)))
    assert 0 < last.memory.anonymous < last.memory.peak


def test_start_passes_batches_over_and_depth_leaves_the_lower_layers(job: Train, tmp_path: Path) -> None:
    later, shallow = tmp_path / "later.f32", tmp_path / "shallow.f32"
    answers = ask(job, change(job, delta=str(later), start=1), change(job, delta=str(shallow), depth=1))
    assert [type(answer) for answer in answers if not isinstance(answer, Progress)] == [Trained] * 3
    plain, top = np.fromfile(job.delta, "<f4"), np.fromfile(shallow, "<f4")
    assert not np.array_equal(np.fromfile(later, "<f4"), plain)
    half = plain.size // 2  # of two layers
    assert plain[:half].any()
    assert not top[:half].any()
    assert top[half:].any()


def test_pins_are_kept_and_a_stamp_is_taken_back(job: Train) -> None:
    pins = {
        "manifest": hashlib.sha256((Path(job.bundle) / "manifest.json").read_bytes()).digest(),
        "adapter_sha256": hashlib.sha256(Path(job.adapter).read_bytes()).digest(),
    }
    first = ask(change(job, **pins))[-1]
    assert isinstance(first, Trained)
    second = ask(change(job, **pins, verified=first.verified))[-1]
    assert isinstance(second, Trained)
    assert second.verified == first.verified


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"manifest": bytes(32)}, "IntegrityError", "sha256"),
        ({"publisher": bytes(32)}, "IntegrityError", "publisher"),
        ({"adapter_sha256": bytes(32)}, "IntegrityError", "adapter_sha256"),
        ({"bundle": "/nowhere"}, "NoInputError", "folder"),
        ({"data": "/nowhere"}, "NoInputError", "path"),
        ({"adapter": "/nowhere"}, "NoInputError", "path"),
        ({"steps": 0}, "ConfigError", "steps"),
        ({"threads": 0}, "ConfigError", "threads"),
        ({"delta": "/nowhere/delta.f32"}, "StorageError", ""),
        (
            {"training": msgspec.structs.replace(TRAINING, window_tokens=4_096)},
            "ConfigError",
            "window_tokens",
        ),
        ({"training": msgspec.structs.replace(TRAINING, window_tokens=8)}, "DataError", "examples"),
    ],
)
def test_what_cannot_be_done_is_answered_by_name_and_leaves_nothing(
    job: Train, tmp_path: Path, fields: dict[str, object], error: str, field: str
) -> None:
    before = sorted(tmp_path.iterdir())
    last = ask(change(job, **fields))[-1]
    assert isinstance(last, Failed)
    assert (last.error, last.field) == (error, field)
    assert last.exit_code not in (0, 70)
    assert "secret" not in msgspec.json.encode(last).decode()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [b"", b"\x00" * 12, np.nan, np.inf])
def test_a_damaged_adapter_is_refused(job: Train, value: bytes | float) -> None:
    damaged = np.fromfile(job.adapter, "<f4")
    damaged[7] = value if isinstance(value, float) else 0
    Path(job.adapter).write_bytes(value if isinstance(value, bytes) else damaged.tobytes())
    last = ask(job)[-1]
    assert isinstance(last, Failed)
    assert last.error == "DataError"


# ---------------------------------------------------------------- evaluation
def test_evaluation_answers_for_every_row_in_the_order_of_the_file(job: Train) -> None:
    fields = {name: getattr(job, name) for name in ("bundle", "adapter", "data", "training")}
    last = ask(Evaluate(**fields))[-1]
    assert isinstance(last, Evaluated)
    lines = Path(job.data).read_text().splitlines()
    assert len(last.nll) == len(last.row_labels) == last.counts.kept == len(lines)
    assert last.loss_sum == pytest.approx(sum(last.nll))
    assert last.labels == sum(last.row_labels)
    Path(job.data).write_text("\n".join(reversed(lines)))
    other = ask(Evaluate(**fields))[-1]
    assert isinstance(other, Evaluated)
    assert other.row_labels == last.row_labels[::-1]
    assert other.nll == pytest.approx(last.nll[::-1], rel=1e-5)


# ---------------------------------------------------------------- gauging
def gauge_of(job: Train, **fields: object) -> Gauge:
    return msgspec.structs.replace(Gauge(bundle=job.bundle, training=TRAINING), **fields)


def test_a_gauge_times_a_step_and_leaves_the_next_training_as_it_is(job: Train, tmp_path: Path) -> None:
    gauged, *_, trained = ask(gauge_of(job), job)
    assert isinstance(gauged, Gauged)
    assert isinstance(trained, Trained)
    assert 0 < gauged.seconds < 60
    assert gauged.memory.peak > 0
    assert gauged.verified == trained.verified
    after_gauge = np.fromfile(job.delta, "<f4")
    ask(job)
    np.testing.assert_array_equal(after_gauge, np.fromfile(job.delta, "<f4"))


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"manifest": bytes(32)}, "IntegrityError", "sha256"),
        ({"publisher": bytes(32)}, "IntegrityError", "publisher"),
        ({"bundle": "/nowhere"}, "NoInputError", "folder"),
        ({"threads": 0}, "ConfigError", "threads"),
        (
            {"training": msgspec.structs.replace(TRAINING, window_tokens=4_096)},
            "ConfigError",
            "window_tokens",
        ),
    ],
)
def test_what_cannot_be_gauged_is_answered_by_name(
    job: Train, fields: dict[str, object], error: str, field: str
) -> None:
    last = ask(gauge_of(job, **fields))[-1]
    assert isinstance(last, Failed)
    assert (last.error, last.field) == (error, field)


# ---------------------------------------------------------------- the bundle's own probe (F09)
@pytest.mark.parametrize(("figure", "factor"), [("loss", 1.01), ("gradient_norm", 0.98)])
def test_a_bundle_that_computes_something_else_here_is_not_used(
    job: Train, tmp_path: Path, figure: str, factor: float
) -> None:
    """F09: it loads and runs, but what it gives is not what its maker's runtime gave."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in Path(job.bundle).iterdir():
        (folder / path.name).hardlink_to(path)
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    assert manifest.probe is not None
    wrong = msgspec.structs.replace(manifest.probe, **{figure: factor * getattr(manifest.probe, figure)})
    data = encode_manifest(msgspec.structs.replace(manifest, probe=wrong))
    for name, content in ((MANIFEST, data), (SIGNATURE, sign_manifest(data, tiny.PUBLISHER))):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    for asked in (change(job, bundle=str(folder)), gauge_of(job, bundle=str(folder))):
        last = ask(asked)[-1]
        assert isinstance(last, Failed)
        assert (last.error, last.field) == ("UnsupportedError", figure)
        assert "ONNX Runtime here is" in last.hint
    assert not Path(job.delta).exists()


# ---------------------------------------------------------------- the process
def test_a_line_that_is_no_job_is_answered_and_the_next_one_served(job: Train) -> None:
    answers = ask(b"nonsense", b'{"command": "dance"}', b'{"command": "train"}', b"[1]", job)
    refused = [answer for answer in answers if isinstance(answer, Failed)]
    assert [answer.error for answer in refused] == ["UsageError"] * 4
    assert [answer.field for answer in refused] == ["command", "command", "job", "command"]
    assert "train" in refused[1].hint
    assert isinstance(answers[-1], Trained)


def test_every_command_says_no_to_an_empty_job() -> None:
    names = [json.dumps({"command": name}).encode() for name in COMMANDS]
    assert [type(answer) for answer in ask(*names)] == [Failed] * len(COMMANDS)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with start() as process:
        yield process
        process.kill()


@pytest.mark.parametrize("done", [1, 3])
def test_a_killed_worker_leaves_no_file_under_the_final_name(
    job: Train, child: subprocess.Popen[bytes], done: int
) -> None:
    """Killed in the middle of a long job, after one step and after three."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(change(job, steps=10_000)) + b"\n")
    child.stdin.flush()
    for _ in range(done):
        assert json.loads(child.stdout.readline())["event"] == "progress"
    child.kill()
    child.wait()
    assert not Path(job.delta).exists()


@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_job_that_was_killed_goes_on_where_it_was_and_ends_with_the_same_bits(
    job: Train, tmp_path: Path, child: subprocess.Popen[bytes], done: int
) -> None:
    """Killed after a step was reported; whether its state was kept is open. Another job does not go on from it."""
    ask(change(job, steps=6))
    whole = np.fromfile(job.delta, "<f4")
    Path(job.delta).unlink()
    cut = change(job, steps=6, state=str(tmp_path / "round.state"), state_seconds=0.0)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(cut) + b"\n")
    child.stdin.flush()
    for _ in range(done):
        child.stdout.readline()
    child.kill()
    child.wait()
    durable.sweep(tmp_path)
    *progress, last = ask(cut)
    assert isinstance(last, Trained)
    assert (last.steps, last.rows) == (6, 12)
    numbers = [answer.done for answer in progress if isinstance(answer, Progress)]
    assert numbers == list(range(numbers[0], 7))
    assert numbers[0] >= done
    assert np.fromfile(job.delta, "<f4").tobytes() == whole.tobytes()
    assert not Path(cut.state).exists()


def test_a_state_of_other_data_is_not_gone_on_from(job: Train, tmp_path: Path) -> None:
    cut = change(job, state=str(tmp_path / "round.state"), state_seconds=0.0)
    ask(change(cut, steps=2, delta="/nowhere/delta.f32"))
    assert Path(cut.state).exists()
    Path(job.data).write_text('{"prompt": "how", "completion": "are you"}\n' * 4)
    answers = ask(cut)
    assert [answer.done for answer in answers if isinstance(answer, Progress)] == [1, 2, 3]


def test_a_delta_that_is_there_is_replaced_whole_or_not_at_all(
    job: Train, child: subprocess.Popen[bytes]
) -> None:
    Path(job.delta).write_bytes(b"the old delta")
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(change(job, steps=10_000)) + b"\n")
    child.stdin.flush()
    child.stdout.readline()
    child.kill()
    child.wait()
    assert Path(job.delta).read_bytes() == b"the old delta"


def test_the_worker_ends_when_nobody_listens(job: Train, child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(change(job, steps=10_000)) + b"\n")
    child.stdin.flush()
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(60) != 0
    assert not Path(job.delta).exists()


def test_the_worker_ends_when_its_agent_is_killed(job: Train, tmp_path: Path) -> None:
    """A stand-in agent starts a worker, gives it a long job, and dies."""
    code = (
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-m', 'edge_agent.worker'], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE)\n"
        "child.stdin.write(sys.argv[1].encode() + b'\\n'); child.stdin.flush(); child.stdout.readline()\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    text = msgspec.json.encode(change(job, steps=10_000)).decode()
    agent = subprocess.run([sys.executable, "-c", code, text], capture_output=True, check=False)
    worker = int(agent.stdout)
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_the_idle_agent_imports_of_this_is_small() -> None:
    code = "import sys, edge_agent.jobs, edge_agent.worker; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    heavy = {"numpy", "onnxruntime", "tokenizers", "torch", "transformers", "onnx"}
    assert heavy.isdisjoint(done.stdout.split())
