"""A first local check: does training on this data with this bundle work on this board? No network, no fleet.

Every fifth conversation (or record, where none are named) is held out. Its loss before and after a few steps says
whether anything was learnt. Everything is done by the same worker as in a fleet, in a temporary folder.
"""

from __future__ import annotations

import queue
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent import jobs
from edge_agent.records import Record, read_records
from edge_agent.resources import threads_allowed
from edge_agent.worker_process import Reply, WorkerProcess
from fedge import errors
from fedge.errors import DataError, FedgeError, NoInputError
from fedge.io import durable
from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, Manifest, open_manifest

HELD_OUT_EVERY: Final = 5
HELD_OUT_MAX: Final = 24

OnProgress = Callable[[str, int, int], None]


def on_terminal(what: str, done: int, of: int) -> None:
    """Progress as one line that is written over, on standard error, if somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{of}\033[K", end="\n" if done == of else "", file=sys.stderr, flush=True)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedge agent train-once` found. Losses are nats per token on held-out rows."""

    model: str
    loss_before: float
    loss_after: float
    held_out_rows: int
    held_out_tokens: int
    steps: int
    training_rows: int
    training_loss: float
    seconds_per_step: float
    peak_rss_mb: float  # of the worker, 10^6 bytes
    left_out_rows: int  # of the training file: too long for the window, or empty
    threads: int


def text(trial: Trial) -> str:
    """The same for people."""
    left_out = f", {trial.left_out_rows} left out (too long or empty)" if trial.left_out_rows else ""
    return (
        f"{trial.model}: held-out loss {trial.loss_before:.3f} -> {trial.loss_after:.3f} nats per token\n"
        f"over {trial.held_out_rows} rows ({trial.held_out_tokens} tokens) after {trial.steps} steps on "
        f"{trial.training_rows} rows{left_out}\n"
        f"{trial.seconds_per_step:.2f} s a step on {trial.threads} threads, peak memory {trial.peak_rss_mb:g} MB"
    )


def train_once(
    bundle: Path,
    data: Path,
    *,
    steps: int,
    training: Training,
    threads: int = 0,
    progress: OnProgress = lambda what, done, of: None,
) -> Trial:
    """Evaluate, train, evaluate. Raises whatever the worker's jobs raise: NoInputError, DataError, IntegrityError."""
    manifest = _open(bundle)
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r)
    folder = Path(tempfile.mkdtemp(prefix="fedge-trial-"))  # 0700
    try:
        train, held_out = split(read_records(data))
        if not train or not held_out:
            raise DataError(
                f"too little data: one in {HELD_OUT_EVERY} conversations is held out, the others are trained on",
                field="path",
                value=str(data),
                hint=f"give at least {HELD_OUT_EVERY} lines",
            )
        _write(folder / "train.jsonl", train)
        _write(folder / "held_out.jsonl", held_out, HELD_OUT_MAX)
        durable.write_bytes(folder / "start.f32", bytes(4 * layout.numbers))
        bench = _Bench(bundle.resolve(), folder, training, threads_allowed(threads), progress)
        try:
            before = bench.evaluate("start.f32", "loss before")
            trained = bench.train(steps)
            after = bench.evaluate("delta.f32", "loss after")
        finally:
            bench.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Trial(
        model=manifest.model,
        loss_before=before.loss_sum / max(before.labels, 1),
        loss_after=after.loss_sum / max(after.labels, 1),
        held_out_rows=len(before.nll),
        held_out_tokens=before.labels,
        steps=trained.steps,
        training_rows=trained.samples,
        training_loss=trained.loss_sum / max(trained.labels, 1),
        seconds_per_step=trained.seconds / max(trained.steps, 1),
        peak_rss_mb=round(max(trained.memory.peak, after.memory.peak) / 1e6, 1),
        left_out_rows=trained.counts.too_long + trained.counts.empty,
        threads=bench.threads,
    )


def split(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Training and held-out records: every fifth conversation in order of appearance is held out."""
    order: dict[str, int] = {}
    parts: tuple[list[Record], list[Record]] = ([], [])
    for number, record in enumerate(records):
        place = order.setdefault(record.conversation or f"\0{number}", len(order))
        parts[place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(record)
    return parts


class _Bench:
    """One worker and the jobs of a trial."""

    def __init__(
        self, bundle: Path, folder: Path, training: Training, threads: int, progress: OnProgress
    ) -> None:
        self._bundle, self._folder, self._training = bundle, folder, training
        self.threads, self._progress = threads, progress
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._verified: jobs.VerifiedStamp | None = None
        self._worker = WorkerProcess(lambda _, reply: self._replies.put(reply), linger_seconds=60)

    def evaluate(self, adapter: str, what: str) -> jobs.Evaluated:
        """The loss of the held-out rows with the numbers in the file `adapter`."""
        job = jobs.Evaluate(
            bundle=str(self._bundle),
            adapter=str(self._folder / adapter),
            data=str(self._folder / "held_out.jsonl"),
            training=self._training,
            verified=self._verified,
            threads=self.threads,
        )
        reply = self._do(job, what)
        assert isinstance(reply, jobs.Evaluated)
        self._verified = reply.verified
        return reply

    def train(self, steps: int) -> jobs.Trained:
        """`steps` steps from zero; the delta, which is then the adapter, goes to `delta.f32`."""
        job = jobs.Train(
            bundle=str(self._bundle),
            adapter=str(self._folder / "start.f32"),
            data=str(self._folder / "train.jsonl"),
            training=self._training,
            verified=self._verified,
            threads=self.threads,
            delta=str(self._folder / "delta.f32"),
            steps=steps,
            data_seed=self._training.data_seed,
        )
        reply = self._do(job, "training")
        assert isinstance(reply, jobs.Trained)
        return reply

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()

    def _do(self, job: jobs.Job, what: str) -> Reply:
        self._worker.submit(job)
        while isinstance(reply := self._replies.get(), jobs.Progress):
            self._progress(what, reply.done, reply.of)
        if isinstance(reply, jobs.Failed):
            raise _raised(reply)
        return reply


def _raised(failed: jobs.Failed) -> FedgeError:
    """The worker's error as the class that it was, so that the exit code is the same."""
    kind = getattr(errors, failed.error, FedgeError)
    if isinstance(kind, type) and issubclass(kind, FedgeError) and kind is not errors.ProtocolError:
        return kind(failed.what, hint=failed.hint)
    return FedgeError(failed.what, hint=failed.hint)


def _open(bundle: Path) -> Manifest:
    """The bundle's manifest; its signature is checked, whoever the publisher is. The worker checks every file."""
    try:
        return open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoInputError(
            "no bundle here",
            field="path",
            value=str(bundle),
            hint="`fedge quantize MODEL --out DIR` makes one",
        ) from error


def _write(path: Path, records: list[Record], examples_max: int | None = None) -> None:
    lines = [
        msgspec.json.encode(
            {"prompt": example.prompt, "completion": example.completion, "conversation": record.conversation}
        )
        for record in records
        for example in record.examples
    ]
    durable.write_bytes(path, b"\n".join(lines[:examples_max]) + b"\n", secret=True)
