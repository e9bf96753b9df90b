"""Training and sealing, as the driver sees them: effects become jobs of the worker, its replies become events.

At most one job is wanted at a time. A reply to a job that is no longer wanted is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from edge_agent import effects, jobs
from edge_agent.downloads import Downloads
from edge_agent.effects import Event
from edge_agent.foresight import worker_bytes
from edge_agent.resources import free_memory_mb, memory_of
from edge_agent.round_files import Rounds
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.worker_process import Reply, WorkerProcess
from fedge.errors import FedgeError, UnavailableError
from fedge.release import MANIFEST, SIGNATURE, open_manifest

MEMORY: Final = "memory"  # the name by which a round is declined for want of it


class Work:
    """The worker, and the job that it is on."""

    def __init__(
        self,
        settings: Settings,
        downloads: Downloads,
        stats: Stats,
        threads: int,
        on_reply: Callable[[int, Reply], None],
        memory_mb_max: int = 0,
    ) -> None:
        self._memory_mb_max = memory_mb_max
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

    def keep_to(self, used_mb: int) -> Event | None:
        """End the worker and its job when agent and worker use more than the owner allows; the event that tells."""
        if self._job is None or not 0 < self._memory_mb_max < used_mb:
            return None
        transcript = self._job[1]
        self.stop()
        return effects.WorkFailed(
            transcript, f"{used_mb} MB are in use, the owner allows {self._memory_mb_max} MB", MEMORY
        )

    def train(self, effect: effects.Train) -> Event | None:
        """Begin to train; the event that it failed when there is no room for it, or no worker can be had."""
        if reason := self._too_large(effect):
            return effects.WorkFailed(effect.transcript, reason, MEMORY)
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

    def _too_large(self, effect: effects.Train) -> str:
        """Why this board should not even begin; what cannot be read here is for the worker to tell."""
        folder = self._downloads.bundle(effect.manifest)
        try:
            data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
            manifest = open_manifest(data, signature, publisher=effect.publisher, sha256=effect.manifest)
        except (OSError, FedgeError):
            return ""
        need = worker_bytes(manifest, effect.training)
        with_agent = round((need + 1_024 * memory_of(os.getpid()).resident_kb) / 1e6)
        if 0 < self._memory_mb_max < with_agent:
            return f"a round would take about {with_agent} MB, the owner allows {self._memory_mb_max} MB"
        left = (free_memory_mb() << 20) + 1_024 * memory_of(self.pid).anonymous_kb
        if left < need:
            return f"a round would take about {need // 10**6} MB, this board has {left // 10**6} MB left"
        return ""

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
