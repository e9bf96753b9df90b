"""Training, sealing and gauging, as the driver sees them: effects become jobs of the worker, replies become events.

At most one job is wanted at a time. A reply to a job that is no longer wanted is dropped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from edge_agent import effects, jobs
from edge_agent.depth import ALL
from edge_agent.downloads import Downloads
from edge_agent.effects import Event
from edge_agent.pace import Pace
from edge_agent.planner import Plan, fits, plan
from edge_agent.resources import free_memory_mb, memory_of
from edge_agent.round_files import Rounds
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.worker_process import Reply, WorkerProcess
from fedge.errors import FedgeError, UnavailableError
from fedge.messages import Announcement, Training
from fedge.release import MANIFEST, SIGNATURE, open_manifest

MEMORY: Final = "memory"  # the name by which a round is declined for want of it
GAUGE_SECONDS_MAX: Final = 900.0  # with the wait for a slot; then the campaign goes on without a pace

_Subject = bytes | Announcement  # what a job is for: a round, by its transcript, or the pace in a campaign


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
        self._slots = str(settings.slots.resolve()) if settings.slots else ""
        self._slot_count = settings.slot_count if settings.slots else 0
        self._rounds = Rounds(settings.home)
        self._worker = WorkerProcess(on_reply, settings.linger_seconds)
        self._job: tuple[int, _Subject] | None = None
        self._began = 0.0
        self._verified: jobs.VerifiedStamp | None = None
        self._planned: tuple[tuple[bytes, Training], Plan] | None = None

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

    def hold_gauge(self, held: bool) -> None:
        """When held, a gauge under way is given up."""
        if held and self._job is not None and isinstance(self._job[1], Announcement):
            self.stop()

    def keep_to(self, used_mb: int) -> Event | Pace | None:
        """End the worker when agent and worker use more than the owner allows, or a gauge never ends; what tells."""
        if self._job is None:
            return None
        subject = self._job[1]
        if 0 < self._memory_mb_max < used_mb:
            self.stop()
            reason = f"{used_mb} MB are in use, the owner allows {self._memory_mb_max} MB"
            return _failure(subject, reason, MEMORY)
        if isinstance(subject, Announcement) and time.monotonic() - self._began > GAUGE_SECONDS_MAX:
            self.stop()
            return _failure(subject, f"no step was done within {GAUGE_SECONDS_MAX:.0f} s")
        return None

    def gauge(self, announced: Announcement) -> Pace | None:
        """Begin to time a step on the bundle of a campaign; a Pace when that is not possible. Once is enough."""
        manifest, wanted = announced.manifest.sha256, self._job[1] if self._job is not None else b""
        if isinstance(wanted, Announcement) and wanted.manifest == announced.manifest:
            return None
        chosen, reason = self._plan(manifest, announced.publisher, announced.training)
        job = jobs.Gauge(
            bundle=str(self._downloads.bundle(manifest)),
            training=announced.training,
            manifest=manifest,
            publisher=announced.publisher,
            verified=self._verified,
            threads=self._threads,
            slots=self._slots,
            slot_count=self._slot_count,
            plan=chosen,
            scratch=str(self._settings.home.rounds.resolve()),
        )
        reason = reason or self._submit(announced, job)
        return Pace(manifest, reason=reason) if reason else None

    def train(self, effect: effects.Train) -> Event | None:
        """Begin to train; the event that it failed when there is no room for it, or no worker can be had."""
        chosen, reason = self._plan(effect.manifest, effect.publisher, effect.training, depth=effect.depth)
        if reason:
            return effects.WorkFailed(effect.transcript, reason, MEMORY)
        settings, home = self._settings, self._settings.home
        job = jobs.Train(
            bundle=str(self._downloads.bundle(effect.manifest)),
            adapter=str(self._downloads.blob(effect.adapter)),
            data=str(settings.data.resolve()),
            reading=settings.reading,
            training=effect.training,
            manifest=effect.manifest,
            publisher=effect.publisher,
            verified=self._verified,
            adapter_sha256=effect.adapter,
            threads=self._threads,
            slots=self._slots,
            slot_count=self._slot_count,
            plan=chosen,
            scratch=str(self._settings.home.rounds.resolve()),
            delta=str(home.delta(effect.transcript)),
            steps=effect.steps,
            data_seed=effect.data_seed,
            depth=effect.depth,
            round=effect.round,
            state=str(home.state_of(effect.transcript)),
        )
        return self._begin(effect.transcript, job)

    def _plan(
        self, sha256: bytes, publisher: bytes, training: Training, *, gauged: bool = False, depth: int = ALL
    ) -> tuple[Plan, str]:
        """How a step is to be carried out here, or why this board should not even begin.

        What cannot be read here is for the worker to tell. A plan that still fits is kept: its sessions may be warm.
        """
        folder = self._downloads.bundle(sha256)
        try:
            data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
            manifest = open_manifest(data, signature, publisher=publisher, sha256=sha256)
        except (OSError, FedgeError):
            return Plan(), ""
        left = (free_memory_mb() << 20) + 1_024 * memory_of(self.pid).anonymous_kb
        allowed = self._memory_mb_max * 10**6 - 1_024 * memory_of(os.getpid()).resident_kb
        room, whose = left, f"this board has {left // 10**6} MB left"
        if self._memory_mb_max > 0 and allowed < left:
            room, whose = max(allowed, 0), f"the owner allows {self._memory_mb_max} MB"
        key = sha256, training
        try:
            if (
                self._planned is not None
                and self._planned[0] == key
                and fits(manifest, training, self._planned[1], room, gauged=gauged, depth=depth)
            ):
                return self._planned[1], ""
            chosen = plan(manifest, training, room, gauged=gauged, depth=depth)
        except UnavailableError as error:
            return Plan(), f"{error.what}: {whose}. {error.hint}"
        self._planned = key, chosen
        return chosen, ""

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
        return self._begin(effect.transcript, job)

    def _begin(self, transcript: bytes, job: jobs.Train | jobs.Seal) -> Event | None:
        reason = self._submit(transcript, job)
        return effects.WorkFailed(transcript, reason) if reason else None

    def _submit(self, subject: _Subject, job: jobs.BundleJob | jobs.Seal) -> str:
        """Why no worker can be had, or nothing."""
        if self.busy:
            self.stop()  # whatever it was, something else is wanted now
        try:
            self._job, self._began = (self._worker.submit(job), subject), time.monotonic()
        except UnavailableError as error:
            return str(error)
        return ""

    def said(self, number: int, reply: Reply) -> Event | Pace | None:
        """What a reply means to the machine, if anything; the Pace is the driver's."""
        if self._job is None or number != self._job[0]:
            return None
        subject = self._job[1]
        if isinstance(reply, jobs.Progress):
            self._stats.worker_said(reply.memory)
            return None
        self._job = None
        if isinstance(reply, jobs.Failed):
            return _failure(subject, f"{reply.what}. {reply.hint}".rstrip(". "))
        if isinstance(subject, Announcement):
            assert isinstance(reply, jobs.Gauged)
            return self._gauged(subject, reply)
        if isinstance(reply, jobs.Trained):
            self._verified = reply.verified
            self._stats.worker_said(reply.memory)
            self._stats.round_trained(
                reply.loss_sum / max(reply.labels, 1), reply.seconds / max(reply.steps, 1)
            )
            return effects.Trained(
                subject, reply.loss_sum, reply.labels, reply.samples, reply.steps, reply.seconds
            )
        assert isinstance(reply, jobs.Sealed), "the machine never asks for an evaluation"
        return effects.Sealed(subject, reply.digest, reply.size)

    def _gauged(self, announced: Announcement, reply: jobs.Gauged) -> Pace:
        """Its sessions stay warm for the first training, where there is room to read the data beside them."""
        self._verified = reply.verified
        self._stats.worker_said(reply.memory)
        manifest = announced.manifest.sha256
        if self._plan(manifest, announced.publisher, announced.training, gauged=True)[1]:
            self._worker.stop()
        return Pace(manifest, reply.seconds)


def _failure(subject: _Subject, reason: str, name: str = "work-failed") -> Event | Pace:
    if isinstance(subject, Announcement):
        return Pace(subject.manifest.sha256, reason=reason)
    return effects.WorkFailed(subject, reason, name)
