"""The whole fleet in one process: the shipped agents and the shipped hub on virtual time, from one seed.

The same scenario, devices, days and seed give the same events, on any machine. What can be done to a world (by faults,
by a test, by an owner) is the control surface below; `watch` sees every effect that is carried out.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from edge_agent.policy import Policy
from edge_agent.resources import free_memory_mb
from fedge.errors import ConfigError
from fedge.identity import Signer, Verifier
from fedge.lora import LoraConfig
from fedge.messages import BlobRef, Training
from firmware_sim.parts.draw import TraceSource, draw
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.scenario import Scenario
from firmware_sim.world import clock as kinds
from firmware_sim.world.broker import Broker
from firmware_sim.world.clock import Clock, Handler
from firmware_sim.world.devices import GONE, Device, Fleet
from firmware_sim.world.hubside import HubSide
from firmware_sim.world.outcome import WorldResult
from firmware_sim.world.recorder import Recorder
from firmware_sim.world.standins import HUB, REAL_DEVICES_MAX, identities
from firmware_sim.world.streams import Stream
from firmware_sim.world.surroundings import Surroundings
from firmware_sim.world.task import Task
from firmware_sim.world.work import Work
from hub.effects import CampaignRow

CAMPAIGN: Final = "c1"
BYTES_AT_REST: Final = 120 * 2**20  # interpreter, numpy and the tasks' tables
BYTES_FOR_A_DEVICE: Final = 5 * 1024
_PROGRESS_STEPS: Final = 200

Watcher = Callable[["World", int, Any], None]
Progress = Callable[[float], None]


class WorldFaults(Protocol):
    """What a world asks of firmware_sim.faults.strikes."""

    counts: dict[str, int]

    def arm(self, world: Any) -> None: ...
    def on_save(self, world: Any, number: int) -> str: ...
    def on_message(
        self, world: Any, to: int, topic: str, payload: bytes
    ) -> list[tuple[float, bytes]] | None: ...
    def on_blob(self, world: Any, number: int, data: bytes) -> bytes: ...


class World(Clock):
    """One run. Device numbers are 0 … devices - 1; the hub's is -1. Times are seconds since the world's start."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        devices: int,
        days: float,
        seed: int,
        crypto: Literal["auto", "real", "hashed"] = "auto",
        task: Task | None = None,
        traces: TraceSource | None = None,
        faults: WorldFaults | None = None,
    ) -> None:
        """ConfigError for what cannot be, and when the machine has less memory than the fleet needs."""
        super().__init__(days * DAY)
        _require_memory(devices)
        self.scenario, self.days, self.seed, self.faults = scenario, days, seed, faults
        self.traces_name = traces.name if traces is not None else "models"
        self._resident = _resident_bytes()
        real = crypto == "real" or (crypto == "auto" and devices <= REAL_DEVICES_MAX)
        self.identities = identities("real" if real else "hashed", seed)
        self.verifier: Verifier = self.identities.verifier(frozenset())
        self.devices = [
            Device(number, parts, seed) for number, parts in enumerate(draw(scenario, devices, seed, traces))
        ]
        self.task: Task = task if task is not None else self._make_task()
        self.bundle_bytes = int(scenario.campaign.bundle_mb * 1e6)
        self._slow: dict[int, float] = {}
        self.recorder = Recorder(self)
        self.fleet = Fleet(self)
        self.work = Work(self)
        self.surroundings = Surroundings(self)
        self.hub = HubSide(self)
        self.broker = Broker(self, self.hub)
        self._handlers = self._table()
        self._begun = False

    def _make_task(self) -> Task:
        from firmware_sim.world.tasks import SLOW_BOARDS, make_task

        name = self.scenario.campaign.task
        if name == "real":
            raise ConfigError(
                "training for real needs a bundle and data",
                field="task",
                value=name,
                hint="Add --real-training, or choose bowl or mlp",
            )
        parts = [device.parts for device in self.devices]
        return make_task(
            name,
            len(parts),
            self.seed,
            slow=lambda number: parts[number].board.name in SLOW_BOARDS,
            samples=lambda number: parts[number].samples,
        )

    def _table(self) -> list[Handler]:
        """The handler of each kind of event, by its number."""
        handlers: dict[int, Handler] = {
            kinds.TIMER: self.fleet.fires,
            kinds.TO_HUB: self.broker.to_hub,
            kinds.TO_DEVICE: self.broker.arrives,
            kinds.WORKED: self.work.done,
            kinds.FLIPS: self.surroundings.flips,
            kinds.LOOK: self.surroundings.look,
            kinds.LINKS: self.broker.connects,
            kinds.WILL: self.broker.will,
            kinds.HUB_TIMER: self.hub.fires,
            kinds.ACTION: lambda number, action, generation, sequence: action(self),
            kinds.BOOTS: self.fleet.boots,
            kinds.FANS_OUT: self.broker.fan_out,
            kinds.FETCHED: self.work.fetched,
            kinds.RETURNS: self.surroundings.returns,
            kinds.OWNER: self.surroundings.acts,
            kinds.RECOVERS: self.fleet.recovers,
            kinds.SAMPLE: self.recorder.sample,
            kinds.HUB_UP: self.hub.comes_up,
            kinds.BROKER_UP: self.broker.comes_up,
        }
        return [handlers[kind] for kind in range(kinds.KINDS)]

    # ------------------------------------------------------------ the run
    def run(self, progress: Progress | None = None) -> WorldResult:
        """Lets all the days pass. `progress` is told the share that is over."""
        cpu, wall = time.process_time(), time.monotonic()
        self.begin()
        collecting = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            for step in range(1, _PROGRESS_STEPS + 1):
                self.advance(self.end * step / _PROGRESS_STEPS, self._handlers)
                if progress is not None:
                    progress(step / _PROGRESS_STEPS)
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
        used = max(0, _resident_bytes() - self._resident) / len(self.devices)
        return self.recorder.result(time.process_time() - cpu, time.monotonic() - wall, used)

    def begin(self) -> None:
        """The hub starts, devices are on or off as they are, and faults are armed. Once."""
        if self._begun:
            return
        self._begun = True
        self.hub.start()
        self.at(
            self.scenario.campaign.start_hour * HOUR, lambda world: world.hub.campaign(world.campaign_row())
        )
        for device in self.devices:
            self.surroundings.begin(device)
        self.recorder.begin()
        if self.faults is not None:
            self.faults.arm(self)

    def until(self, seconds: float) -> None:
        """Lets time pass up to `seconds`; for tests, which look in between."""
        self.begin()
        self.advance(seconds, self._handlers)

    def campaign_row(self) -> CampaignRow:
        """The scenario's campaign, as an operator asks for it."""
        wish, first = self.scenario.campaign, self.task.first()
        ref = BlobRef(hashlib.sha256(first).digest(), len(first))
        self.hub.blobs[ref.sha256] = first
        devices = len(self.devices)
        return CampaignRow(
            id=CAMPAIGN,
            manifest=BlobRef(hashlib.sha256(self.scenario.name.encode()).digest(), 4_096),
            manifest_signature=bytes(64),
            publisher=bytes(32),
            url="https://hub.world",
            lora=LoraConfig(),
            training=Training(rate=getattr(self.task, "rate", 0.016), data_seed=self.seed & (2**62 - 1)),
            numbers=self.task.numbers,
            rounds=wish.rounds,
            steps=wish.steps,
            bloc_devices=wish.bloc,
            form_at_devices=max(wish.bloc, round(wish.form_at_share * devices)),
            window_seconds=wish.window_seconds,
            seed=self.seed,
            adapter=ref,
            beacon_secret=Stream(self.seed, HUB, "beacons").bytes(32),
            work_seconds=wish.work_seconds,
            training_devices_max=_at_once(wish.training_share, devices, wish.bloc),
            rest_seconds=wish.rest_seconds,
            quota=wish.quota,
            form_seconds=wish.form_seconds,
            server_rate=wish.server_rate,
            normalise_steps=wish.normalise_steps,
        )

    # ------------------------------------------------------------ what parts ask
    @property
    def hub_signer(self) -> Signer:
        """The hub's identity: what an attacker has who owns the hub."""
        return self.hub.signer

    def entropy(self, number: int) -> Callable[[int], bytes]:
        """The randomness of one device's machine, another at each boot."""
        boot = self.devices[number].disk.state.boot
        return Stream(self.seed, number, "entropy", boot, int(self.now * 1e3))

    def samples(self, number: int) -> int:
        """How many samples a device has."""
        return self.task.samples(number)

    def slowness(self, number: int) -> float:
        """By which factor a device works and sends slower than it should."""
        return self._slow.get(number, 1.0) if self._slow else 1.0

    # ------------------------------------------------------------ control surface
    def watch(self, kind: type, callback: Watcher) -> None:
        """`callback(world, number, effect)` after every effect of this type, of devices or (-1) the hub."""
        if kind in self.fleet.carry_out:
            carry_out = self.fleet.carry_out[kind]

            def on_device(device: Device, effect: Any) -> None:
                carry_out(device, effect)
                callback(self, device.number, effect)

            self.fleet.carry_out[kind] = on_device
        if kind in self.hub.carry_out:
            on_hub = self.hub.carry_out[kind]

            def at_hub(effect: Any) -> None:
                on_hub(effect)
                callback(self, HUB, effect)

            self.hub.carry_out[kind] = at_hub

    def at(self, seconds: float, action: Callable[[World], None]) -> None:
        """Does `action(world)` at that time."""
        self.ask(max(seconds, self.now), HUB, kinds.ACTION, action, 0)

    def power_cut(self, number: int) -> None:
        """The device is off from now on, until `power_on`."""
        self.surroundings.force_off(self.devices[number], None)

    def power_on(self, number: int) -> None:
        """Ends a power cut; a device that its own time, battery or owner keeps off stays off."""
        self.surroundings.force_on(self.devices[number])

    def power_off(self, number: int, seconds: float) -> None:
        """Off for so long."""
        self.surroundings.force_off(self.devices[number], seconds)

    def link_down(self, number: int, seconds: float) -> None:
        """No link for so long."""
        device = self.devices[number]
        device.cut_until = max(device.cut_until, self.now + seconds)
        if device.connected:
            self.broker.disconnect(device)
            self.broker.try_connect(device, seconds)

    def partition(self, numbers: Sequence[int], seconds: float) -> None:
        """No link for all of these."""
        for number in numbers:
            self.link_down(number, seconds)

    def crash_hub(self, seconds: float) -> None:
        """The hub's process dies, and starts again after so long."""
        self.hub.crash(seconds)

    def restart_broker(self, seconds: float, with_memory: bool) -> None:
        """The broker is away for so long; without memory it has forgotten sessions and retained messages."""
        self.broker.restart(seconds, with_memory=with_memory)

    def set_clock_offset(self, number: int, seconds: float) -> None:
        """A clock is wrong by so much (-1: the hub's)."""
        if number == HUB:
            self.hub.set_clock_offset(seconds)
        else:
            self.fleet.set_clock_offset(self.devices[number], seconds)

    def fill_disk(self, number: int, seconds: float) -> None:
        """No write succeeds for so long (-1: the hub's)."""
        if number == HUB:
            self.hub.fill_disk(seconds)
            return
        disk = self.devices[number].disk
        disk.full = True
        self.at(self.now + seconds, lambda world: setattr(disk, "full", False))

    def set_metered(self, number: int, metered: bool) -> None:
        """The device's network counts every byte, or no longer does."""
        self.surroundings.set_metered(self.devices[number], metered)

    def heat(self, number: int, celsius: float, seconds: float) -> None:
        """So much hotter around the board, for so long."""
        device = self.devices[number]
        self.surroundings.set_heat(device, celsius)
        self.at(self.now + seconds, lambda world: world.surroundings.set_heat(device, -celsius))

    def slow(self, number: int, factor: float) -> None:
        """The device works and sends so much slower from now on; 1 ends it."""
        if factor == 1.0:
            self._slow.pop(number, None)
        else:
            self._slow[number] = factor

    def set_policy(self, number: int, policy: Policy) -> None:
        """The owner edits the policy."""
        self.surroundings.set_policy(self.devices[number], policy)

    def revoke(self, number: int) -> None:
        """The operator revokes the device's certificate: the hub believes nothing that it signs."""
        self.hub.revoke(number)

    def leave(self, number: int) -> None:
        """The device is gone for good."""
        self.surroundings.switch_off(self.devices[number], GONE)

    @staticmethod
    def memory_needed(devices: int) -> int:
        """Bytes that a world of so many devices takes."""
        return BYTES_AT_REST + devices * BYTES_FOR_A_DEVICE


def _at_once(share: float, devices: int, bloc: int) -> int:
    """Devices that train at once: this share of all, and at least one bloc; 0 = no bound."""
    return max(bloc, round(share * devices)) if share else 0


def _require_memory(devices: int) -> None:
    needed, free = World.memory_needed(devices), free_memory_mb() * 2**20
    if needed > free:
        raise ConfigError(
            f"a world of {devices:,} devices needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            field="devices",
            value=devices,
            hint=f"At most {max(0, (free - BYTES_AT_REST) // BYTES_FOR_A_DEVICE):,} devices fit",
        )


def _resident_bytes() -> int:
    """What this process has in memory now."""
    fields = Path("/proc/self/statm").read_text("ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
