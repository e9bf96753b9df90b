"""The worker process: `python -m edge_agent.worker`, a job a line on standard input, answers on standard output.

It exists so that the agent between rounds holds neither numpy nor the runtime, and so that the memory of a round
goes back to the system when the round is over. It may be killed at any instant: a result appears under its final
name whole and durable, or not at all. Another command is one more line in `COMMANDS`.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from edge_agent.jobs import (
    Answer,
    BundleJob,
    Evaluate,
    Evaluated,
    Failed,
    Gauge,
    Gauged,
    Memory,
    Personalise,
    Personalised,
    Progress,
    Seal,
    Sealed,
    Train,
    Trained,
)
from edge_agent.slots import slot
from edge_agent.warm import Warm, give_back_memory
from fedge.errors import ConfigError, DataError, FedgeError, IntegrityError, NoInputError, UsageError
from fedge.io import durable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_agent.dataset import Dataset
    from edge_agent.trainer import RoundOutcome, StepResult, Trainer

Emit = Callable[[Answer], None]
J = TypeVar("J", bound=msgspec.Struct)
W = TypeVar("W", bound=BundleJob)
_warm: Final = Warm()  # of this process: its jobs are about one bundle and one file


def train(job: Train, emit: Emit) -> Trained:
    """Carry out a Train job."""
    if job.steps < 1:
        raise ConfigError("a round has at least one step", field="steps", value=job.steps)
    bundle, dataset, trainer = _warm.open(job)
    began = time.monotonic()
    outcome = _round(job, trainer, dataset, bundle.manifest.pad_id, emit)
    seconds = time.monotonic() - began
    durable.write_bytes(Path(job.delta), outcome.delta.astype("<f4").tobytes())
    if job.state:
        durable.remove(Path(job.state))
    return Trained(
        loss_sum=outcome.loss_sum,
        labels=outcome.labels,
        samples=len(dataset.rows),
        rows=outcome.rows,
        steps=outcome.steps,
        skipped=outcome.skipped,
        not_finite=outcome.not_finite,
        seconds=seconds,
        counts=dataset.counts,
        verified=bundle.stamp,
        memory=memory_used(),
    )


def _round(job: Train, trainer: Trainer, dataset: Dataset, pad_id: int, emit: Emit) -> RoundOutcome:
    from edge_agent.dataset import batches
    from edge_agent.trainer.rules import train_by_rule
    from edge_agent.trainer.state import Keeper

    def after_step(done: int, step: StepResult) -> None:
        emit(_stepped(done, job.steps, step))

    training = job.training
    keeper = Keeper(Path(job.state), _run_of(job), job.state_seconds, time.monotonic) if job.state else None
    resumed = keeper.found() if keeper else None
    done = resumed.progress.cursor if resumed else 0
    endless = batches(
        dataset.rows, size=training.batch_rows, seed=job.data_seed, pad_id=pad_id, start=job.start + done
    )
    return train_by_rule(
        trainer,
        _floats(Path(job.adapter), job.adapter_sha256),
        islice(endless, job.steps - done),
        training,
        round_number=job.round,
        depth=job.depth,
        after_step=after_step,
        resume=resumed,
        keep=keeper.keep if keeper else None,
    )


def _stepped(done: int, of: int, step: StepResult) -> Progress:
    return Progress(done=done, of=of, loss_sum=step.loss_sum, labels=step.labels, memory=memory_used())


def _run_of(job: Train) -> bytes:
    """What must be the same for a job to go on where another was cut off: everything that decides its bits."""
    look = Path(job.data).stat()  # rows were read from it a moment ago
    same = msgspec.structs.replace(
        job, verified=None, delta="", state="", state_seconds=0, slots="", scratch=""
    )
    digest = hashlib.sha256(Path(job.adapter).read_bytes()).digest()
    return hashlib.sha256(
        msgspec.json.encode((same, look.st_ino, look.st_size, look.st_mtime_ns, digest))
    ).digest()


def evaluate(job: Evaluate, emit: Emit) -> Evaluated:
    """Carry out an Evaluate job."""
    from edge_agent.dataset import evaluation_batches
    from edge_agent.trainer.rules import campaign_rule

    bundle, dataset, trainer = _warm.open(job)
    state = _floats(Path(job.adapter), job.adapter_sha256)
    adapter = campaign_rule(trainer, job.training, state).held(state)
    total = len(dataset.rows)
    nll, labels, done = [0.0] * total, [0] * total, 0
    chooses = bundle.manifest.task != "generate"
    right = [False] * total if chooses else []
    size = job.training.batch_rows
    if bundle.manifest.task == "embed":  # a pair by itself would have no loss
        size = -(-total // max(1, total // size))
    for chosen, batch in evaluation_batches(dataset.rows, size=size, pad_id=bundle.manifest.pad_id):
        if chooses:
            answer = trainer.answers(batch, adapter)
            sums, counts = answer.nll.astype(float), answer.rows
            for i, hit in zip(chosen, answer.right.tolist(), strict=True):
                right[i] = hit
        else:
            sums, counts = trainer.row_losses(batch, adapter)
        for i, loss, count in zip(chosen, sums.tolist(), counts.tolist(), strict=True):
            nll[i], labels[i] = loss, count
        done += len(chosen)
        progress = Progress(
            done=done,
            of=total,
            loss_sum=float(sums.sum()),
            labels=int(counts.sum()),
            memory=memory_used(),
        )
        emit(progress)
    return Evaluated(
        loss_sum=sum(nll),
        labels=sum(labels),
        nll=nll,
        row_labels=labels,
        right=right,
        counts=dataset.counts,
        verified=bundle.stamp,
        memory=memory_used(),
    )


def personalise(job: Personalise, emit: Emit) -> Personalised:
    """Carry out a Personalise job."""
    from edge_agent import personal

    bundle, held_out, _ = _warm.open(msgspec.structs.replace(job, data=job.held_out))
    bundle, dataset, trainer = _warm.open(job)
    pad_id, state = bundle.manifest.pad_id, _floats(Path(job.adapter), job.adapter_sha256)
    total = job.steps[-1] + max(job.alone_steps, default=0)

    def after_step(done: int, step: StepResult) -> None:
        emit(_stepped(done, total, step))

    choice = personal.on_rows(trainer, state, dataset.rows, held_out.rows, job, pad_id, after_step)
    own = choice.kept.name != personal.FLEET
    if own:
        kept = personal.adapter_file(trainer, choice.kept.tensors)
        durable.write_bytes(Path(job.out), kept.astype("<f4").tobytes(), secret=True)
    return Personalised(
        kept=choice.kept.name,
        own=own,
        tried={name: loss for name, loss in choice.tried.items() if math.isfinite(loss)},
        held_out_rows=len(held_out.rows),
        samples=len(dataset.rows),
        verified=bundle.stamp,
        memory=memory_used(),
    )


def gauge(job: Gauge, emit: Emit) -> Gauged:
    """Carry out a Gauge job."""
    bundle, trainer = _warm.open_trainer(job)
    from edge_agent.gauge import step_seconds

    seconds = step_seconds(trainer, job.training)
    return Gauged(seconds=seconds, verified=bundle.stamp, memory=memory_used())


def seal(job: Seal, emit: Emit) -> Sealed:
    """Carry out a Seal job."""
    from edge_agent import sealing

    return sealing.seal(job)


def in_slot(run: Callable[[W, Emit], Answer]) -> Callable[[W, Emit], Answer]:
    """`run`, but only while a training slot is held."""

    def wait_and_run(job: W, emit: Emit) -> Answer:
        with slot(Path(job.slots), job.slot_count):
            return run(job, emit)

    return wait_and_run


def command(kind: type[J], run: Callable[[J, Emit], Answer]) -> Callable[[bytes, Emit], Answer]:
    """`run` for a line of JSON that holds a job of `kind`. Raises UsageError when it does not."""

    def carry_out(line: bytes, emit: Emit) -> Answer:
        try:
            job = msgspec.json.decode(line, type=kind)
        except msgspec.MsgspecError as error:
            raise UsageError(f"job cannot be read: {error}", field="job", value=kind.__name__) from error
        return run(job, emit)

    return carry_out


COMMANDS: Final[dict[str, Callable[[bytes, Emit], Answer]]] = {
    "train": command(Train, in_slot(train)),
    "evaluate": command(Evaluate, in_slot(evaluate)),
    "gauge": command(Gauge, in_slot(gauge)),
    "personalise": command(Personalise, in_slot(personalise)),
    "seal": command(Seal, seal),
}


def main() -> None:
    """Serve jobs until standard input ends, or the agent does."""
    _end_with_agent()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # read once, when the libraries load; a pool costs 8 MB a thread
    for line in sys.stdin.buffer:
        _emit(answer(line, _emit))
        give_back_memory()


def answer(line: bytes, emit: Emit) -> Answer:
    """The last answer to one line; whatever goes wrong becomes a Failed."""
    try:
        return _command_of(line)(line, emit)
    except FedgeError as error:
        return Failed(
            error=type(error).__name__,
            what=error.what,
            field=error.field,
            hint=error.hint,
            exit_code=error.exit_code,
        )
    except BrokenPipeError:
        raise  # nobody listens any more
    except Exception as error:
        traceback.print_exc()
        return Failed(error=type(error).__name__, what="the worker met an error it does not know")


class _Named(msgspec.Struct):
    command: str


def _command_of(line: bytes) -> Callable[[bytes, Emit], Answer]:
    try:
        name = msgspec.json.decode(line, type=_Named).command
    except msgspec.MsgspecError as error:
        raise UsageError(f"job cannot be read: {error}", field="command") from error
    if name not in COMMANDS:
        raise UsageError(
            "command is not known", field="command", value=name, hint=f"One of {', '.join(COMMANDS)}"
        )
    return COMMANDS[name]


def _emit(message: Answer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _floats(path: Path, sha256: bytes | None) -> NDArray[np.float32]:
    import numpy as np

    try:
        data = path.read_bytes()
    except OSError as error:
        raise NoInputError(f"cannot read {path}: {error.strerror}", field="path", value=str(path)) from error
    if sha256 is not None and hashlib.sha256(data).digest() != sha256:
        raise IntegrityError("adapter is not the one named", field="adapter_sha256", value=sha256.hex())
    if len(data) % 4:
        raise DataError(f"{path} is no whole number of floats", field="bytes", value=len(data))
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds a number that is not finite", field="path", value=str(path))
    return values


def memory_used() -> Memory:
    """From /proc/self/status; zeros where there is none."""
    found = {"VmHWM": 0, "RssAnon": 0}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return Memory()
    for line in lines:
        key, _, rest = line.partition(":")
        if key in found:
            found[key] = 1024 * int(rest.split()[0])
    return Memory(peak=found["VmHWM"], anonymous=found["RssAnon"])


def _end_with_agent() -> None:
    """A killed agent takes its worker along (prctl PR_SET_PDEATHSIG), so that no slot stays taken for nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
