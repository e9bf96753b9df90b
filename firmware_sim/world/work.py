"""What takes a device time: training, sealing, downloads. Each is an effect that is answered when its time is over.

Training takes steps * tokens / (the board's pace), for fewer layers less, and longer where the board throttles; at its
end the task gives the real delta. Sealing uses the shipped codec and masks. A download needs the link: it pauses while
that is away and goes on where it was, but a power cut takes what was not yet on the disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edge_agent import effects
from edge_agent.effects import Event, FetchBlob, FetchBundle, Fetched, FetchFailed, Seal, StopWork, Train
from fedge.errors import FedgeError, StorageError
from fedge.secagg.masks import Member
from fedge.update.report import build_report
from firmware_sim.world.clock import FETCHED, WORKED

if TYPE_CHECKING:
    from firmware_sim.world.devices import Device
    from firmware_sim.world.world import World

SEAL_SECONDS: Final = 1.0  # on a board of SEAL_PACE tokens a second
SEAL_PACE: Final = 40.0
FORWARD_SHARE: Final = 1 / 3  # of a step that passes through all layers, however few are trained
UNSYNCED_SECONDS: Final = 30.0  # of a download that the kernel has not written yet
RADIO_WATTS: Final = 0.5  # while a device transfers
_HTTP_BYTES: Final = 600  # of a request and an answer's head


@dataclass(slots=True, eq=False)
class Job:
    """Training or sealing under way. `seconds` of wall time in all, `throttled` of them."""

    effect: Train | Seal
    begun: float
    seconds: float
    throttled: float


@dataclass(slots=True, eq=False)
class Download:
    """A file under way; `begun` is 0 while it waits for the link."""

    effect: FetchBundle | FetchBlob
    sha256: bytes
    size: int
    left: int
    begun: float = 0.0
    seconds: float = 0.0


class Work:
    """Jobs and downloads of all devices: one of each at a time for each device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._downloads: dict[int, Download] = {}
        world.fleet.carry_out |= {
            Train: self._train,
            Seal: self._seal,
            StopWork: self._stop,
            FetchBundle: self._fetch_bundle,
            FetchBlob: self._fetch_blob,
            effects.SendChunk: self._send_chunk,
        }

    # ------------------------------------------------------------ training and sealing
    def _train(self, device: Device, effect: Train) -> None:
        world, parts, task = self.world, device.parts, self.world.task
        share = 1.0
        if effect.depth and task.layers:
            share = FORWARD_SHARE + (1 - FORWARD_SHARE) * min(1.0, effect.depth / task.layers)
        seconds = effect.steps * task.step_tokens * share / parts.tokens_per_second
        ambient = world.surroundings.ambient(device)
        seconds *= world.slowness(device.number)
        wall, throttled = parts.thermal.work(world.now, ambient, seconds)
        self._begin(device, Job(effect, world.now, wall, throttled))
        world.recorder.begun(device)
        world.surroundings.load_changed(device)

    def _seal(self, device: Device, effect: Seal) -> None:
        seconds = SEAL_SECONDS * SEAL_PACE / device.parts.tokens_per_second
        self._begin(device, Job(effect, self.world.now, seconds * self.world.slowness(device.number), 0.0))

    def _begin(self, device: Device, job: Job) -> None:
        device.job = job
        self.world.ask(job.begun + job.seconds, device.number, WORKED, job, device.power)

    def done(self, number: int, job: Job, generation: int, _sequence: int) -> None:
        """A job's time is over."""
        device = self.world.devices[number]
        if device.power != generation or device.job is not job:
            return
        if isinstance(job.effect, Train):
            self._end_training(device, job, whole=True)
            event = self._trained(device, job.effect, job)
        else:
            device.job = None
            event = self._sealed(device, job.effect)
        self.world.fleet.handle(device, event)

    def _trained(self, device: Device, effect: Train, job: Job) -> Event:
        world = self.world
        learned = world.task.train(
            device.number, device.disk.adapter, effect.steps, effect.data_seed, effect.depth
        )
        try:
            device.disk.write_delta(effect.transcript, learned.delta)
        except StorageError as error:
            return effects.WorkFailed(effect.transcript, str(error))
        device.disk.sync()
        return effects.Trained(
            effect.transcript,
            learned.loss_sum,
            learned.labels,
            world.samples(device.number),
            effect.steps,
            job.seconds,
        )

    def _sealed(self, device: Device, effect: Seal) -> Event:
        """As edge_agent.sealing does it with files."""
        disk = device.disk
        delta = disk.delta(effect.transcript)
        if delta is None:
            return effects.WorkFailed(effect.transcript, "a round's file is gone")
        carry = disk.carry if disk.carry is not None and disk.carry.size == delta.size else None
        try:
            built = build_report(
                delta,
                carry=carry,
                loss_sum=effect.loss_sum,
                labels=effect.labels,
                samples=effect.samples,
                steps=effect.steps,
                codec=effect.codec,
                h=effect.transcript,
                position=effect.position,
                roster=[Member(prekey=prekey, aes=aes) for prekey, aes in effect.roster],
                prekey_secret=effect.prekey,
                entropy=effect.entropy,
                agreement=self.world.identities.agreement,
            )
            disk.write_report(effect.transcript, built.sent, built.body)
        except FedgeError as error:
            return effects.WorkFailed(effect.transcript, str(error))
        disk.sync()
        return effects.Sealed(effect.transcript, built.digest, len(built.body))

    def _stop(self, device: Device, effect: StopWork) -> None:
        if device.job is not None and device.job.effect.transcript == effect.transcript:
            self._drop_job(device)

    def _drop_job(self, device: Device) -> None:
        job = device.job
        if job is not None and isinstance(job.effect, Train):
            self._end_training(device, job, whole=False)
        device.job = None

    def _end_training(self, device: Device, job: Job, *, whole: bool) -> None:
        """Heat and energy of what was trained, to the end or not."""
        world, seconds = self.world, self.world.now - job.begun
        ambient = world.surroundings.ambient(device)
        throttled = job.throttled * seconds / job.seconds if job.seconds else 0.0
        device.parts.thermal.settle(world.now, ambient, 1.0)
        world.recorder.trained(device, seconds, throttled, whole=whole)
        device.job = None
        world.surroundings.load_changed(device)

    def abandon(self, device: Device, *, powered: bool) -> None:
        """The machine is gone: nothing that it asked for is wanted. What was downloaded and synced stays."""
        if device.job is not None:
            self._drop_job(device)
        download = self._downloads.pop(device.number, None)
        if download is not None and isinstance(download.effect, FetchBundle):
            got = self._got(download)
            unsynced = 0.0 if powered or not download.seconds else UNSYNCED_SECONDS / download.seconds
            self._count(device, download, got)
            device.disk.bundle_bytes = max(
                0, download.size - download.left + got - int(unsynced * download.left)
            )

    # ------------------------------------------------------------ downloads
    def _fetch_bundle(self, device: Device, effect: FetchBundle) -> None:
        sha256 = effect.announcement.manifest.sha256
        size = self.world.bundle_bytes
        if device.disk.bundle == sha256:
            self._answer(device, Download(effect, sha256, size, 0))
        else:
            left = max(1, size - device.disk.bundle_bytes)
            self._want(device, Download(effect, sha256, size, left))

    def _fetch_blob(self, device: Device, effect: FetchBlob) -> None:
        sha256, size = effect.ref.sha256, effect.ref.size + _HTTP_BYTES
        if device.disk.blob == sha256:
            self._answer(device, Download(effect, sha256, size, 0))
        else:
            self._want(device, Download(effect, sha256, size, size))

    def _want(self, device: Device, download: Download) -> None:
        self._downloads[device.number] = download
        self.resume(device)

    def resume(self, device: Device) -> None:
        """The link is up: a download that waits for it goes on."""
        download = self._downloads.get(device.number)
        if download is None or download.begun or not device.connected:
            return
        world = self.world
        seconds = device.parts.link.transfer_seconds(world.now, download.left, False)
        download.begun, download.seconds = world.now, seconds * world.slowness(device.number)
        world.ask(world.now + download.seconds, device.number, FETCHED, download, device.link)

    def pause(self, device: Device) -> None:
        """The link is down."""
        download = self._downloads.get(device.number)
        if download is not None and download.begun:
            got = self._got(download)
            self._count(device, download, got)
            download.left -= got
            download.begun = 0.0

    def _got(self, download: Download) -> int:
        if not download.begun or not download.seconds:
            return 0
        share = (self.world.now - download.begun) / download.seconds
        return min(download.left - 1, int(download.left * share))

    def _count(self, device: Device, download: Download, size: int) -> None:
        recorder = self.world.recorder
        recorder.down_bytes[device.number] += size
        recorder.sent(device.number, self.world.now - download.begun if download.begun else 0.0)

    def _answer(self, device: Device, download: Download) -> None:
        """What is here already: told at once, as an event of its own."""
        self._downloads[device.number] = download
        download.begun = self.world.now
        self.world.ask(self.world.now, device.number, FETCHED, download, device.link)

    def fetched(self, number: int, download: Download, generation: int, _sequence: int) -> None:
        """A download's time is over."""
        device = self.world.devices[number]
        if self._downloads.get(number) is not download or not download.begun:
            return
        if download.left and device.link != generation:
            return
        del self._downloads[number]
        self.world.fleet.handle(device, self._outcome(device, download))

    def _outcome(self, device: Device, download: Download) -> Event:
        world, disk, sha256 = self.world, device.disk, download.sha256
        if not download.left:
            return Fetched(sha256)
        self._count(device, download, download.left)
        if not world.hub.running:
            return FetchFailed(sha256, "the hub does not answer")
        if disk.full:
            return FetchFailed(sha256, "no space left on the device")
        if isinstance(download.effect, FetchBundle):
            disk.bundle, disk.bundle_bytes = sha256, 0
            return Fetched(sha256)
        data = world.hub.blobs.get(sha256)
        if data is None:
            return FetchFailed(sha256, "the hub does not have this file")
        if world.faults is not None:
            data = world.faults.on_blob(world, device.number, data)
            if hashlib.sha256(data).digest() != sha256:  # edge_agent.downloads: of no use for good
                return FetchFailed(sha256, "a download is not the announced file", True)
        disk.blob, disk.adapter = sha256, data
        return Fetched(sha256)

    # ------------------------------------------------------------ reports
    def _send_chunk(self, device: Device, effect: effects.SendChunk) -> None:
        if not device.connected:
            return
        try:
            frame = device.disk.frame(effect.transcript, effect.digest, effect.index)
        except StorageError:
            return  # as the real driver: told, and the machine's timer asks again
        self.world.broker.from_device(device, effect.topic, frame)
