"""Training alone: does it work on this board with this data, and what adapter comes of it? No network, no fleet.

Every fifth conversation (or record, where none are named) is held out. Its loss before and after the steps says
whether anything was learnt. Everything is done by the same worker as in a fleet, in a temporary folder; what stays is
the adapter's file, when one is asked for, and that appears whole when all is done.
"""

from __future__ import annotations

import queue
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent import jobs
from edge_agent.alone import OwnAdapter, numbered
from edge_agent.dataset import Reading, Record, normal_form, read_records
from edge_agent.depth import ALL, HEAD_ONLY
from edge_agent.planner import Plan, plan
from edge_agent.resources import free_memory_mb, threads_allowed
from edge_agent.worker_process import Reply, WorkerProcess
from fedge import errors
from fedge.errors import DataError, FedgeError, NoInputError, UnavailableError, UsageError
from fedge.io import durable
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, open_manifest

HELD_OUT_EVERY: Final = 5
HELD_OUT_MAX: Final = 24
UNITS: Final = {"generate": "token", "classify": "row", "embed": "pair"}  # what one label is, by task

OnProgress = Callable[[str, int, int], None]


def on_terminal(what: str, done: int, of: int) -> None:
    """Progress as one line that is written over, on standard error, if somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done}/{of}\033[K", end="\n" if done == of else "", file=sys.stderr, flush=True)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedge agent train-once` found. Losses: nats per label (a token, a classified row, or a pair) of held-out
    rows.
    """

    model: str
    task: str
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
    adapter: str = ""  # the file that was written
    # Of a classifier: share of held-out rows whose class is its first choice; of pairs: whose own text in the batch is.
    accuracy_before: float | None = None
    accuracy_after: float | None = None


def text(trial: Trial) -> str:
    """The same for people."""
    left_out = f", {trial.left_out_rows} left out (too long or empty)" if trial.left_out_rows else ""
    kept = f"\nadapter: {trial.adapter}" if trial.adapter else ""
    accuracy, tokens = "", f" ({trial.held_out_tokens} tokens)"
    if trial.accuracy_before is not None and trial.accuracy_after is not None:
        what = "own text found in the batch" if trial.task == "embed" else "accuracy"
        accuracy = f", {what} {trial.accuracy_before:.1%} -> {trial.accuracy_after:.1%}"
        tokens = ""
    return (
        f"{trial.model}: held-out loss {trial.loss_before:.3f} -> {trial.loss_after:.3f} nats per "
        f"{UNITS[trial.task]}{accuracy}\n"
        f"over {trial.held_out_rows} rows{tokens} after {trial.steps} steps on "
        f"{trial.training_rows} rows{left_out}\n"
        f"{trial.seconds_per_step:.2f} s a step on {trial.threads} threads, peak memory {trial.peak_rss_mb:g} MB{kept}"
    )


def train_once(
    bundle: Path,
    data: Path,
    *,
    steps: int,
    training: Training,
    threads: int = 0,
    progress: OnProgress = lambda what, done, of: None,
    adapter_out: Path | None = None,
    start: Path | None = None,
    reading: Reading | None = None,
    head_only: bool = False,
) -> Trial:
    """Evaluate, train by `training.rule`, evaluate; from zero, or from the adapter at `start`. The adapter goes to
    `adapter_out`. `reading` is what the owner says about the file `data`. With `head_only`, a classifier's head trains
    alone, and every row is encoded once.

    Raises whatever the worker's jobs raise (NoInputError, DataError, IntegrityError), the refusals of
    `fedge.io.adapter_source.adapter_for`, UnavailableError when no way through a step fits the memory that is free,
    UsageError when `adapter_out` would replace something else.
    """
    manifest = open_bundle_manifest(bundle)
    check_target(adapter_out)
    if head_only:
        _check_head(manifest, training)
    own = OwnAdapter.of(manifest, training, start, bundle / WEIGHTS)
    rounds, depth = own.rounds(steps), HEAD_ONLY if head_only else ALL
    way = planned(manifest, own.training, depth)
    folder = Path(tempfile.mkdtemp(prefix="fedge-trial-"))  # 0700
    try:
        parts = write_halves(folder, data, reading)
        bench = _Bench(bundle.resolve(), folder, own.training, threads_allowed(threads), progress, parts, way)
        try:
            before = bench.evaluate(own, "loss before")
            own, trained = bench.train(own, rounds, depth)
            after = bench.evaluate(own, "loss after")
        finally:
            bench.stop()
        if adapter_out is not None:
            own.keep(adapter_out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _trial(manifest, (before, after), trained, bench.threads, adapter_out)


def _trial(
    manifest: Manifest,
    measured: tuple[jobs.Evaluated, jobs.Evaluated],
    trained: jobs.Trained,
    threads: int,
    adapter_out: Path | None,
) -> Trial:
    before, after = measured
    return Trial(
        model=manifest.model,
        task=manifest.task,
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
        threads=threads,
        adapter=str(adapter_out or ""),
        accuracy_before=_accuracy(before),
        accuracy_after=_accuracy(after),
    )


def _accuracy(found: jobs.Evaluated) -> float | None:
    return sum(found.right) / len(found.right) if found.right else None


def _check_head(manifest: Manifest, training: Training) -> None:
    """Before any work: the head can train alone."""
    if not manifest.dense:
        raise UsageError(
            "this bundle has no head that trains",
            field="head-only",
            value=manifest.task,
            hint="Give the bundle of a classifier",
        )
    if training.rule == "core":
        raise UsageError(
            "the rule core begins by looking for its basis in the layers",
            field="head-only",
            value=training.rule,
            hint="Take another rule: for a head alone they are all the same",
        )


def check_target(path: Path | None) -> None:
    """Before any work: the adapter's file can be written, and replaces nothing but another adapter."""
    if path is None:
        return
    from fedge.io.adapter_file import is_adapter_file

    if path.exists() and not is_adapter_file(path):
        raise UsageError(
            "the adapter would replace something else",
            field="adapter-out",
            value=str(path),
            hint="Name another file",
        )
    durable.ensure_space(path.absolute().parent, 0)


def split(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Training and held-out records: every fifth conversation in order of appearance is held out."""
    order: dict[str, int] = {}
    parts: tuple[list[Record], list[Record]] = ([], [])
    for number, record in enumerate(records):
        place = order.setdefault(record.conversation or f"\0{number}", len(order))
        parts[place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(record)
    return parts


def by_turns(records: Iterable[Record]) -> list[Record]:
    """One of each conversation, then the next of each: however few are taken, they are of many."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Record]] = []
    for record in records:
        turns.append((seen[record.conversation] if record.conversation else 0, record))
        seen[record.conversation] += 1
    return [record for _, record in sorted(turns, key=lambda turn: turn[0])]  # stable


def write_halves(folder: Path, data: Path, reading: Reading | None) -> Reading:
    """`train.jsonl` and `held_out.jsonl` in `folder`, the second of at most `HELD_OUT_MAX` examples.

    Returns how to read them: recordings stay where they are. Raises DataError when one of them would be empty, and what
    `read_records` raises.
    """
    how = reading or Reading()
    train, held_out = split(read_records(data, how))
    if not train or not held_out:
        raise DataError(
            f"too little data: one in {HELD_OUT_EVERY} conversations is held out, the others are trained on",
            field="path",
            value=str(data),
            hint=f"give at least {HELD_OUT_EVERY} lines",
        )
    write_records(folder / "train.jsonl", train)
    write_records(folder / "held_out.jsonl", by_turns(held_out), HELD_OUT_MAX)
    return Reading(folder=str(how.root(data).resolve()))


def planned(manifest: Manifest, training: Training, depth: int = ALL) -> Plan:
    """How a step is carried out in the memory that is free now. Raises UnavailableError, which says what would fit."""
    left = free_memory_mb() << 20
    try:
        return plan(manifest, training, left, depth=depth)
    except UnavailableError as error:
        raise UnavailableError(f"{error.what}: {left // 10**6} MB are free here", hint=error.hint) from error


class _Bench:
    """One worker and the jobs of a trial."""

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        training: Training,
        threads: int,
        progress: OnProgress,
        reading: Reading | None = None,
        way: Plan | None = None,
    ) -> None:
        self._bundle, self._folder, self._training = bundle, folder, training
        self._way = way or Plan()
        self._reading = reading or Reading()
        self.threads, self._progress = threads, progress
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._verified: jobs.VerifiedStamp | None = None
        self._worker = WorkerProcess(lambda _, reply: self._replies.put(reply), linger_seconds=60)

    def evaluate(self, own: OwnAdapter, what: str) -> jobs.Evaluated:
        """The loss of the held-out rows with these numbers."""
        job = jobs.Evaluate(
            bundle=str(self._bundle),
            adapter=self._saved(own),
            data=str(self._folder / "held_out.jsonl"),
            training=self._training,
            verified=self._verified,
            threads=self.threads,
            plan=self._way,
            scratch=str(self._folder),
            reading=self._reading,
        )
        reply = self.do(job, what)
        assert isinstance(reply, jobs.Evaluated)
        self._verified = reply.verified
        return reply

    def train(self, own: OwnAdapter, rounds: list[int], depth: int = ALL) -> tuple[OwnAdapter, jobs.Trained]:
        """These rounds; the adapter after them, and their sums in one answer."""
        delta, total = self._folder / "delta.f32", sum(rounds)
        answers: list[jobs.Trained] = []
        for number, done, steps in numbered(rounds):
            job = jobs.Train(
                bundle=str(self._bundle),
                adapter=self._saved(own),
                data=str(self._folder / "train.jsonl"),
                training=self._training,
                verified=self._verified,
                threads=self.threads,
                plan=self._way,
                scratch=str(self._folder),
                reading=self._reading,
                delta=str(delta),
                steps=steps,
                start=done,
                depth=depth,
                round=number,
                data_seed=self._training.data_seed,
            )
            reply = self.do(job, "training", done, total)
            assert isinstance(reply, jobs.Trained)
            answers.append(reply)
            own = own.after(number, delta, reply.steps)
        return own, _summed(answers)

    def _saved(self, own: OwnAdapter) -> str:
        path = self._folder / "adapter.f32"
        durable.write_bytes(path, own.state.astype("<f4").tobytes())
        return str(path)

    def stop(self) -> None:
        """End the worker."""
        self._worker.stop()

    def do(self, job: jobs.Job, what: str, before: int = 0, of: int = 0) -> Reply:
        """The job's last answer; it has `before` of `of` steps behind it. Raises what the job raises."""
        self._worker.submit(job)
        while isinstance(reply := self._replies.get(), jobs.Progress):
            self._progress(what, before + reply.done, of or reply.of)
        if isinstance(reply, jobs.Failed):
            raise _raised(reply)
        return reply


def _summed(rounds: list[jobs.Trained]) -> jobs.Trained:
    """Sums over rounds on the same rows; what is no sum is the last one's."""

    def total(name: str) -> int:
        found: int = sum(getattr(one, name) for one in rounds)
        return found

    return msgspec.structs.replace(
        rounds[-1],
        loss_sum=sum(one.loss_sum for one in rounds),
        seconds=sum(one.seconds for one in rounds),
        **{name: total(name) for name in ("labels", "rows", "steps", "skipped", "not_finite")},
    )


def one_job(job: jobs.Job, what: str, progress: OnProgress) -> Reply:
    """The last answer of a worker that does this one job. Raises what the job raises."""
    bench = _Bench(Path(job.bundle), Path(), job.training, job.threads, progress)
    try:
        return bench.do(job, what)
    finally:
        bench.stop()


def _raised(failed: jobs.Failed) -> FedgeError:
    """The worker's error as the class that it was, so that the exit code is the same."""
    kind = getattr(errors, failed.error, FedgeError)
    if isinstance(kind, type) and issubclass(kind, FedgeError) and kind is not errors.ProtocolError:
        return kind(failed.what, hint=failed.hint)
    return FedgeError(failed.what, hint=failed.hint)


def open_bundle_manifest(bundle: Path) -> Manifest:
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


def write_records(path: Path, records: list[Record], examples_max: int | None = None) -> None:
    """Records in their normal form, one a line; none is begun once there are `examples_max` examples."""
    lines: list[bytes] = []
    samples = 0
    for record in records:
        if examples_max is None or samples < examples_max:
            lines.append(msgspec.json.encode(normal_form(record)))
            samples += record.samples
    durable.write_bytes(path, b"\n".join(lines) + b"\n", secret=True)
