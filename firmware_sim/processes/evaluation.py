"""Held-out loss of many people under one adapter, measured by the very worker that a device runs.

Children of `python -m edge_agent.worker` share the people out among them; the first job of each verifies the
bundle, the others rely on its stamp. Sums of nats and label counts come back, so that a group's figure is its loss
per token and no short message weighs more than its tokens. The spread over people stands beside every mean.
"""

from __future__ import annotations

import math
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

import edge_agent
from edge_agent.jobs import Evaluate, Failed, VerifiedStamp
from fedge import errors
from fedge.errors import ConfigError, FedgeError, ProtocolError, UnavailableError
from fedge.messages import Training

BATCH_ROWS: Final = 12  # rows of like length together; forward alone needs little memory
Told = Callable[[int, int], None]  # people done, people in all


@dataclass(frozen=True, slots=True)
class PersonLoss:
    """`nll` in nats, summed over `labels` tokens. Not finite when the adapter made the model diverge."""

    nll: float
    labels: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nll / self.labels


@dataclass(frozen=True, slots=True)
class Spread:
    """How the drop of loss (before minus after, nats per token) differs from person to person."""

    people: int
    mean: float
    sd: float  # of a sample: n - 1 below; 0 for one person
    smallest: float
    improved: int


def pooled(losses: Iterable[PersonLoss]) -> float:
    """Loss per token over a group, each token weighing the same. Raises ConfigError for nobody."""
    group = list(losses)
    labels = sum(loss.labels for loss in group)
    if not labels:
        raise ConfigError("a group without a token has no loss", field="people", value=len(group))
    return sum(loss.nll for loss in group) / labels


def spread(pairs: Iterable[tuple[float, float]]) -> Spread:
    """Over each person's (before, after). Raises ConfigError for nobody and for what is not finite."""
    drops = [before - after for before, after in pairs]
    if not drops or not all(map(math.isfinite, drops)):
        raise ConfigError("spread needs people, and figures that are finite", field="drops", value=drops)
    return Spread(
        people=len(drops),
        mean=statistics.fmean(drops),
        sd=statistics.stdev(drops) if len(drops) > 1 else 0.0,
        smallest=min(drops),
        improved=sum(drop > 0 for drop in drops),
    )


def evaluate_people(
    bundle: Path,
    people: Mapping[str, Path],
    adapter: Path,
    training: Training,
    *,
    processes: int,
    progress: Told | None = None,
) -> dict[str, PersonLoss]:
    """The loss of each person's data file (by name, in the order of `people`) under the adapter file.

    At most `processes` children (1 or more) run at a time, each on one thread. Raises what a worker's job raises,
    UnavailableError when a worker ends too early. No child outlives the call.
    """
    training = msgspec.structs.replace(training, batch_rows=BATCH_ROWS)
    jobs = {
        person: Evaluate(bundle=str(bundle), adapter=str(adapter), data=str(data), training=training)
        for person, data in people.items()
    }
    with ExitStack() as stack:
        crew = [stack.enter_context(_Worker()) for _ in range(min(processes, len(jobs)))]
        return _share_out(crew, jobs, progress)


def _share_out(
    crew: Sequence[_Worker], jobs: Mapping[str, Evaluate], progress: Told | None
) -> dict[str, PersonLoss]:
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def measure(job: Evaluate) -> PersonLoss:
        worker = idle.get()
        try:
            return worker.evaluate(job)
        finally:
            idle.put(worker)

    found: dict[str, PersonLoss] = {}
    with ThreadPoolExecutor(max(1, len(crew))) as pool:
        waiting = {pool.submit(measure, job): person for person, job in jobs.items()}
        try:
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                if progress is not None:
                    progress(len(found), len(jobs))
        finally:  # after an error or Ctrl-C, too: a thread that waits for a child then sees its output end
            for future in waiting:
                future.cancel()
            for worker in crew:
                worker.kill()
    return {person: found[person] for person in jobs}


class _Evaluated(msgspec.Struct, frozen=True, tag_field="event", tag="evaluated"):
    """Of the worker's answer what is needed here; a sum that is not finite comes as null."""

    loss_sum: float | None
    labels: int
    verified: VerifiedStamp


class _Progress(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """Batch after batch; the whole person is awaited."""


class _Worker:
    """One child, serving one job after the other. It holds nothing worth saving, so it is killed in the end."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "edge_agent.worker"]
        self._child = subprocess.Popen(  # noqa: S603 - our own module; its own session: Ctrl-C is for the parent
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=_same_packages(),
        )
        self._verified: VerifiedStamp | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        with suppress(OSError):  # what was not yet written to a dead child
            self._child.__exit__(None, None, None)

    def kill(self) -> None:
        self._child.kill()

    def evaluate(self, job: Evaluate) -> PersonLoss:
        answer = self._ask(msgspec.structs.replace(job, verified=self._verified))
        self._verified = answer.verified
        nll = math.nan if answer.loss_sum is None else answer.loss_sum
        return PersonLoss(nll, answer.labels)

    def _ask(self, job: Evaluate) -> _Evaluated:
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(OSError):  # it has ended: the loop below finds no answer and says so
            stdin.write(msgspec.json.encode(job) + b"\n")
            stdin.flush()
        for line in stdout:
            answer = msgspec.json.decode(line, type=_Evaluated | _Progress | Failed)
            if isinstance(answer, Failed):
                raise _as_error(answer)
            if isinstance(answer, _Evaluated):
                return answer
        raise UnavailableError(
            "evaluation worker ended too early",
            field="data",
            value=job.data,
            hint="It may have been killed for memory: try with fewer processes",
        )


def _same_packages() -> dict[str, str]:
    """Our environment, in which a child finds the packages that we found, even in a checkout nobody installed."""
    path = [str(Path(edge_agent.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _as_error(failed: Failed) -> Exception:
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, FedgeError) and kind is not ProtocolError:
        return kind(failed.what, field=failed.field, hint=failed.hint)
    return RuntimeError(f"{failed.error} in the evaluation worker: {failed.what}")
