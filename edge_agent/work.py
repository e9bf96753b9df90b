"""Training and sealing, as the driver sees them: effects become jobs of the worker, its replies become events.

At most one job is wanted at a time. A reply to a job that is no longer wanted is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_agent import effects, jobs
from edge_agent.downloads import Downloads
from edge_agent.effects import Event
from edge_agent.round_files import Rounds
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.worker_process import Reply, WorkerProcess
from fedge.errors import UnavailableError


class Work:
    """The worker, and the job that it is on."""

    def __init__(
        self,
        settings: Settings,
        downloads: Downloads,
        stats: Stats,
        threads: int,
        on_reply: Callable[[int, Reply], None],
    ) -> None:
        self._settings, self._downloads, self._stats, self._threads = settings, downloads, stats, threads
        self._rounds = Rounds(settings.home)
        self._worker = WorkerProcess(on_reply, settings.linger_seconds)
        self._job: tuple[int, bytes] | None = None
        self._verified: jobs.VerifiedStamp | None = None

    @property
    def pid(self) -> int:
        """The worker's process number, 0 when there is none."""
        return self._worker.pid

    @property
    def busy(self) -> bool:
        """Whether a job is under way and wanted."""
        return self._job is not None

    def tend(self) -> None:
        """End a worker that has had nothing to do for long enough."""
        self._worker.tend()

    def stop(self) -> None:
        """End the worker; its job is not wanted any more."""
        self._job = None
        self._worker.stop()

    def stop_for(self, transcript: bytes) -> None:
        """The same, when it works on this round."""
        if self._job is not None and self._job[1] == transcript:
            self.stop()

    def fail(self, reason: str) -> Event:
        """End the worker and its job for `reason`."""
        assert self._job is not None
        transcript = self._job[1]
        self.stop()
        return effects.WorkFailed(transcript, reason)

    def train(self, effect: effects.Train) -> Event | None:
        """Begin to train; the event that it failed when no worker can be had."""
        settings, home = self._settings, self._settings.home
        job = jobs.Train(
            bundle=str(self._downloads.bundle(effect.manifest)),
            adapter=str(self._downloads.blob(effect.adapter)),
            data=str(settings.data.resolve()),
            training=effect.training,
            manifest=effect.manifest,
            publisher=effect.publisher,
            verified=self._verified,
            adapter_sha256=effect.adapter,
            threads=self._threads,
            slots=str(settings.slots.resolve()) if settings.slots else "",
            slot_count=settings.slot_count if settings.slots else 0,
            delta=str(home.delta(effect.transcript)),
            steps=effect.steps,
            data_seed=effect.data_seed,
            depth=effect.depth,
        )
        return self._submit(effect.transcript, job)

    def seal(self, effect: effects.Seal) -> Event | None:
        """Begin to seal; the event that it failed when no worker can be had."""
        home = self._settings.home
        job = jobs.Seal(
            transcript=effect.transcript,
            delta=str(home.delta(effect.transcript)),
            carry=self._rounds.carry(),
            sent=str(home.sent(effect.transcript)),
            report=str(home.report(effect.transcript)),
            codec=effect.codec,
            position=effect.position,
            roster=effect.roster,
            prekey=effect.prekey,
            entropy=effect.entropy,
            loss_sum=effect.loss_sum,
            labels=effect.labels,
            samples=effect.samples,
            steps=effect.steps,
        )
        return self._submit(effect.transcript, job)

    def _submit(self, transcript: bytes, job: jobs.Train | jobs.Seal) -> Event | None:
        try:
            self._job = self._worker.submit(job), transcript
        except UnavailableError as error:
            return effects.WorkFailed(transcript, str(error))
        return None

    def said(self, number: int, reply: Reply) -> Event | None:
        """What a reply means to the machine, if anything."""
        if self._job is None or number != self._job[0]:
            return None
        transcript = self._job[1]
        if isinstance(reply, jobs.Progress):
            self._stats.worker_said(reply.memory)
            return None
        self._job = None
        if isinstance(reply, jobs.Trained):
            self._verified = reply.verified
            self._stats.worker_said(reply.memory)
            self._stats.round_trained(
                reply.loss_sum / max(reply.labels, 1), reply.seconds / max(reply.steps, 1)
            )
            return effects.Trained(
                transcript, reply.loss_sum, reply.labels, reply.samples, reply.steps, reply.seconds
            )
        if isinstance(reply, jobs.Sealed):
            return effects.Sealed(transcript, reply.digest, reply.size)
        assert isinstance(reply, jobs.Failed), "the machine never asks for an evaluation"
        return effects.WorkFailed(transcript, f"{reply.what}. {reply.hint}".rstrip(". "))
