"""The simulated driver of the hub: the shipped machine, its store and its blobs.

The order is that of hub.driver: blobs first, then all rows of one event in one transaction, then everything else, and
only then is the message acknowledged. A crash before the transaction leaves the message with the broker, which says it
again at the next start; a crash after it leaves rows that nobody has heard of yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from fedge import topics
from fedge.messages import HubState, encode
from firmware_sim.world.clock import HUB_TIMER, HUB_UP, START
from firmware_sim.world.devices import PowerFailed
from firmware_sim.world.rows import SMALL_DEVICES_MAX, Store
from firmware_sim.world.standins import HUB, name_of, serial_of
from firmware_sim.world.streams import Stream
from hub import effects, standing
from hub.effects import CampaignRow, Effect, Event
from hub.hub import Hub

if TYPE_CHECKING:
    from firmware_sim.world.broker import Message
    from firmware_sim.world.world import World

CRASH_SECONDS: Final = 20.0  # median, of a crash that a fault at a transaction begins
WAITING_MAX: Final = 20_000  # hub.driver: messages kept for a broker that is away


class HubSide:
    """The hub's process. `running`: it lives; `linked`: it and the broker hear each other."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = Store(small=len(world.devices) <= SMALL_DEVICES_MAX)
        self.blobs: dict[bytes, bytes] = {}
        self.machine: Hub | None = None
        self.linked = False
        self.epoch = self._generation = 0
        self.signer = world.identities.signer(HUB)
        self.revoked: frozenset[int] = frozenset()
        self._timers: dict[str, int] = {}
        self._retained: dict[str, bytes] = {}
        self._waiting: deque[effects.Publish] = deque()
        self._offset = self._latest = 0.0
        self._full = False
        self._old_blobs: deque[tuple[float, bytes]] = deque()
        self._newest_blob = b""
        self.carry_out: dict[type[Effect], Callable[[Any], None]] = {
            effects.StoreBlob: self._store_blob,
            effects.Save: lambda effect: None,
            effects.Publish: self._publish,
            effects.SetTimer: self._set_timer,
            effects.Tell: self._tell,
        }

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self.machine is not None

    # ------------------------------------------------------------ process
    def start(self) -> None:
        """Starts the hub from its rows, under a new epoch."""
        world = self.world
        self.epoch += 1
        self._retained.clear()
        self._waiting.clear()
        self.machine = Hub(
            name_of(HUB),
            self.signer,
            world.identities.verifier(self.revoked),
            self.store.rows(),
            lambda ref: self.blobs[ref.sha256],
            Stream(world.seed, HUB, "entropy", self.epoch).bytes,
        )
        self._event(effects.Started(self.epoch))
        self.link_up()

    def crash(self, seconds: float) -> None:
        """The process dies here and now; a new one starts after `seconds`. The broker sends its will at once."""
        if self.machine is not None:
            self.machine = None
            self._timers.clear()
            self.linked = False
            down = HubState(hub=name_of(HUB), up=False, epoch=self.epoch)
            if self.world.broker.up:
                self.world.broker.from_hub(topics.HUB_STATE, encode(down), True)
        self._generation += 1
        self.world.ask(self.world.now + seconds, HUB, HUB_UP, None, self._generation)

    def comes_up(self, _number: int, _argument: object, generation: int, _sequence: int) -> None:
        """The process starts again."""
        if generation == self._generation and self.machine is None:
            self.start()

    def link_down(self) -> None:
        """The broker is away."""
        self.linked = False

    def link_up(self) -> None:
        """The broker is there: what is retained is said again, then what waited, then the hub listens."""
        if self.machine is None or not self.world.broker.up or self.linked:
            return
        self.linked = True
        for topic, payload in self._retained.items():
            self.world.broker.from_hub(topic, payload, True)
        waiting, self._waiting = self._waiting, deque()
        for effect in waiting:
            self.world.broker.from_hub(effect.topic, effect.payload, effect.retain)
        self.world.broker.hub_subscribes()

    def fill_disk(self, seconds: float) -> None:
        """No transaction succeeds: the process ends at the next one and is started again when there is room."""
        self._full = True
        self.world.at(self.world.now + seconds, lambda world: setattr(self, "_full", False))

    def set_clock_offset(self, seconds: float) -> None:
        """The server's clock is so far off; within a process it never goes back."""
        self._latest = max(self._latest, START + self.world.now + self._offset)
        self._offset = seconds

    def revoke(self, number: int) -> None:
        """The certificate of this device is believed no more."""
        self.revoked |= {serial_of(number)}
        if self.machine is not None:
            self.machine.verifier = self.world.identities.verifier(self.revoked)

    # ------------------------------------------------------------ events
    def arrived(self, message: Message) -> None:
        """A message from the broker; acknowledged unless the process dies before its rows are safe."""
        assert self.machine is not None
        wanted = self.machine.handle(self._now(), effects.Received(*message))
        if wanted:
            try:
                self._carry_out(wanted)
            except PowerFailed as failed:
                if failed.args:  # never acknowledged
                    self.world.broker.for_hub.appendleft(message)

    def campaign(self, row: CampaignRow) -> None:
        """The operator starts a campaign; one that a crash meets is asked for again."""
        if self.machine is None:
            self.world.at(self.world.now + 1.0, lambda world: self.campaign(row))
            return
        self._event(effects.CampaignAsked(row))
        if row.id not in self.store.campaigns:
            self.world.at(self.world.now + 1.0, lambda world: self.campaign(row))

    def fires(self, _number: int, name: str, _generation: int, sequence: int) -> None:
        """A timer runs out."""
        if self._timers.get(name) == sequence:
            del self._timers[name]
            self._event(effects.TimerFired(name))

    def _event(self, event: Event) -> None:
        assert self.machine is not None
        wanted = self.machine.handle(self._now(), event)
        with suppress(PowerFailed):
            self._carry_out(wanted)

    def _now(self) -> float:
        now = START + self.world.now + self._offset
        return now if now > self._latest else self._latest

    def _carry_out(self, wanted: list[Effect]) -> None:
        saves = [effect for effect in wanted if type(effect) is effects.Save]
        if saves:
            self._transaction(wanted, saves)
        carry_out = self.carry_out
        for effect in wanted:
            kind = type(effect)
            if kind is not effects.Save:  # carried out with its transaction
                carry_out[kind](effect)

    def _transaction(self, wanted: list[Effect], saves: list[effects.Save]) -> None:
        for effect in wanted:
            if type(effect) is effects.StoreBlob:
                self._keep_blob(effect)
        world = self.world
        where = world.faults.on_save(world, HUB) if world.faults is not None else ""
        if self._full or (where and where != "after"):  # SQLite rolls a torn transaction back
            self._die("before")
        self.store.commit(saves)
        row, told = world.recorder.row, self.carry_out[effects.Save]
        for save in saves:
            row(save.row)
            told(save)
        if where:
            self._die()

    def _die(self, *unacknowledged: str) -> None:
        draws = Stream(self.world.seed, HUB, "crash", self.epoch)
        self.crash(draws.lognormal(CRASH_SECONDS, 1.0))
        raise PowerFailed(*unacknowledged)

    def _keep_blob(self, effect: effects.StoreBlob) -> None:
        """Old adapters go when no round that is open can need them any more."""
        now = self.world.now
        self.blobs[effect.ref.sha256] = effect.data
        if self._newest_blob:
            self._old_blobs.append((now, self._newest_blob))
        self._newest_blob = effect.ref.sha256
        keep = self.world.scenario.campaign.window_seconds + 600.0
        while self._old_blobs and self._old_blobs[0][0] < now - keep:
            _, old = self._old_blobs.popleft()
            if old != self._newest_blob:
                self.blobs.pop(old, None)

    def _store_blob(self, effect: effects.StoreBlob) -> None:
        if effect.ref.sha256 not in self.blobs:  # of an event without rows
            self._keep_blob(effect)

    def _publish(self, effect: effects.Publish) -> None:
        if effect.retain:
            self._retained[effect.topic] = effect.payload
        if self.linked:
            self.world.broker.from_hub(effect.topic, effect.payload, effect.retain)
        elif not effect.retain and len(self._waiting) < WAITING_MAX:
            self._waiting.append(effect)

    def _set_timer(self, effect: effects.SetTimer) -> None:
        world = self.world
        self._timers[effect.name] = world.ask(world.now + effect.seconds, HUB, HUB_TIMER, effect.name, 0)

    def _tell(self, effect: effects.Tell) -> None:
        if effect.refusal:
            self.world.recorder.refusals[effect.refusal] += 1

    def why_not(self, number: int) -> str:
        """Why the hub has not opened a round for a device, as it tells its operator."""
        if self.machine is None:
            return "hub away"
        return standing.why_not(self.machine, self._now(), name_of(number))
