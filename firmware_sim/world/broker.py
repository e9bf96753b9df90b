"""The MQTT broker of a simulated fleet, and the links to it.

Sessions outlive connections (clean session off), a queue has a limit and drops what comes above it, last wills follow
a vanished client after one and a half keepalives or when it comes back, state topics and announcements are retained.
Messages of one connection keep their order. A restart may keep the broker's memory or lose all of it; what was under
way on a connection that broke is lost upwards (the machine says it again) and queued again downwards (the broker does).
"""

from __future__ import annotations

from array import array
from collections import deque
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

from edge_agent.effects import Connected, Received
from fedge import topics
from fedge.io.link import KEEPALIVE_SECONDS
from fedge.messages import Presence, encode
from firmware_sim.parts.link import LINKS
from firmware_sim.world.clock import BROKER_UP, FANS_OUT, TO_DEVICE, TO_HUB, WILL
from firmware_sim.world.clock import LINKS as LINK_UP
from firmware_sim.world.standins import HUB, name_of

if TYPE_CHECKING:
    from firmware_sim.world.devices import Device
    from firmware_sim.world.hubside import HubSide
    from firmware_sim.world.world import World

Message = tuple[str, bytes]

WILL_SECONDS: Final = 1.5 * KEEPALIVE_SECONDS
# That wait for one device; mosquitto drops what comes above its own limit, too.
SESSION_MESSAGES_MAX: Final = 100
HUB_MESSAGES_MAX: Final = 20_000
OVERHEAD_BYTES: Final = 70  # MQTT, TLS and TCP around one message, its topic aside
_SMALL_BYTES: Final = 2_048  # below this a message takes its latency and no transfer time
_FAN_DEVICES, _FAN_SECONDS = 512, 0.01  # how fast a broker hands one message to everybody
_BACK_OFF_SECONDS: Final = 30.0
_LATENCIES: Final = 1_024
_PLACES: Final = _LATENCIES - 1
_UNIT: Final = 2.0**-53


@lru_cache(maxsize=16)
def latencies(kind: str) -> tuple[float, ...]:
    """The quantiles of one way's latency on a kind of link: a draw of a place in them is a draw of a latency."""
    own = LINKS["wifi" if kind == "trace" else kind]
    normal = NormalDist(0.0, own.jitter or 1e-9)
    at = ((place + 0.5) / _LATENCIES for place in range(_LATENCIES))
    return tuple(own.latency * 2.718281828459045 ** normal.inv_cdf(share) for share in at)


class Broker:
    """Between all devices and the hub. `up`: the broker itself runs."""

    def __init__(self, world: World, hub: HubSide) -> None:
        self.world, self.hub, self.devices = world, hub, world.devices
        self.up = True
        self.dropped = self.lost = 0
        self.retained: dict[str, bytes] = {}  # of the hub; the states of devices are on them
        self.for_hub: deque[Message] = deque()  # while the hub is away
        self._generation = 0
        # When the last message of each connection arrives: the next one does not overtake it.
        self._up_until, self._down_until = (array("d", bytes(8 * len(world.devices))) for _ in range(2))

    # ------------------------------------------------------------ device -> hub
    def from_device(self, device: Device, topic: str, payload: bytes) -> None:
        """A message of a connected device sets out."""
        world = self.world
        number, size = device.number, len(payload)
        world.recorder.up_bytes[number] += size + OVERHEAD_BYTES
        delay = self._delay(device, size, up=True)
        if delay < 0.0:
            return
        if world.faults is not None:
            copies = world.faults.on_message(world, HUB, topic, payload)
            if copies is not None:
                for extra, copy in copies:
                    world.ask(world.now + delay + extra, number, TO_HUB, (topic, copy), device.link)
                return
        arrives = world.now + delay
        if arrives < self._up_until[number]:
            arrives = self._up_until[number]
        self._up_until[number] = arrives
        world.ask(arrives, number, TO_HUB, (topic, payload), device.link)

    def _delay(self, device: Device, size: int, *, up: bool) -> float:
        """Seconds that a message takes, or -1 for one that is lost."""
        link = device.parts.link
        word = device.draws.word()
        if (word >> 11) * _UNIT < link.loss:
            self.lost += 1
            return -1.0
        delay = latencies(link.kind)[word & _PLACES]
        if size >= _SMALL_BYTES:
            seconds = link.transfer_seconds(self.world.now, size, up)
            delay += seconds * self.world.slowness(device.number)
            self.world.recorder.sent(device.number, seconds)
        return delay

    def to_hub(self, number: int, message: Message, generation: int, _sequence: int) -> None:
        """A message of a device is at the broker."""
        if self.devices[number].link != generation or not self.up:
            return
        if self.hub.linked:
            self.hub.arrived(message)
        else:
            self.keep_for_hub(message)

    def give_hub(self, message: Message) -> None:
        """To the hub, or into its queue."""
        if self.hub.linked:
            self.hub.arrived(message)
        else:
            self.keep_for_hub(message)

    def keep_for_hub(self, message: Message) -> None:
        """Into the hub's queue, while there is room."""
        if len(self.for_hub) < HUB_MESSAGES_MAX:
            self.for_hub.append(message)
        else:
            self.dropped += 1

    # ------------------------------------------------------------ hub -> devices
    def from_hub(self, topic: str, payload: bytes, retain: bool) -> None:
        """A message of the hub: to one device, or to everybody."""
        if retain:
            self.retained[topic] = payload
        if topic.startswith(_DEVICE_TOPICS):
            self.to_device(self.devices[number_of(topic)], topic, payload)
        else:
            self.world.ask(self.world.now, 0, FANS_OUT, (topic, payload), self._generation)

    def fan_out(self, first: int, message: Message, generation: int, _sequence: int) -> None:
        """One message to the next few hundred devices."""
        if generation != self._generation:
            return
        world = self.world
        event = Received(*message)
        for device in world.devices[first : first + _FAN_DEVICES]:
            if not device.connected:
                continue
            if world.faults is not None:
                self.to_device(device, *message)
            else:
                world.events += 1
                world.recorder.down_bytes[device.number] += len(message[1]) + OVERHEAD_BYTES
                world.fleet.handle(device, event)
        if first + _FAN_DEVICES < len(world.devices):
            world.ask(world.now + _FAN_SECONDS, first + _FAN_DEVICES, FANS_OUT, message, generation)

    def to_device(self, device: Device, topic: str, payload: bytes) -> None:
        """To a device that is connected, or into its session."""
        if not device.connected:
            self._queue(device, (topic, payload))
            return
        world = self.world
        delay = self._delay(device, len(payload), up=False)
        if delay < 0.0:
            return
        if world.faults is not None:
            copies = world.faults.on_message(world, device.number, topic, payload)
            if copies is not None:
                for extra, copy in copies:
                    at = world.now + delay + extra
                    world.ask(at, device.number, TO_DEVICE, (topic, copy), device.link)
                return
        arrives = world.now + delay
        if arrives < self._down_until[device.number]:
            arrives = self._down_until[device.number]
        self._down_until[device.number] = arrives
        world.ask(arrives, device.number, TO_DEVICE, (topic, payload), device.link)

    def arrives(self, number: int, message: Message, generation: int, _sequence: int) -> None:
        """A message is at its device; when the connection broke meanwhile, the broker still has it."""
        device = self.devices[number]
        if device.link != generation:
            self._queue(device, message)
            return
        self.world.recorder.down_bytes[number] += len(message[1]) + OVERHEAD_BYTES
        self.world.fleet.handle(device, Received(*message))

    def _queue(self, device: Device, message: Message) -> None:
        if device.session is None:
            device.session = []
        if len(device.session) < SESSION_MESSAGES_MAX:
            device.session.append(message)
        else:
            self.dropped += 1

    # ------------------------------------------------------------ connections
    def try_connect(self, device: Device, after: float) -> None:
        """The device's link tries to connect `after` so many seconds; its power's generation must hold till then."""
        self.world.ask(self.world.now + after, device.number, LINK_UP, None, device.power)

    def connects(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """A device's link comes up: its presence first, then all that waited for it."""
        world, device = self.world, self.devices[number]
        if device.power != generation or device.connected or device.agent is None:
            return
        if not self.up or world.now < device.cut_until:
            until = max(device.cut_until, world.now)
            self.try_connect(device, until - world.now + device.draws.uniform(0.0, _BACK_OFF_SECONDS))
            return
        if device.present:  # taken over: the will of the connection that it still knows
            self._says_state(device, up=False)
        device.link += 1
        device.connected = True
        world.recorder.joined[number] = 1
        device.said_boot = device.disk.state.boot
        self._says_state(device, up=True)
        waiting, device.session = device.session, None
        world.fleet.handle(device, CONNECTED)
        for topic, payload in self.retained.items():
            self.to_device(device, topic, payload)
        for topic, payload in waiting or ():
            self.to_device(device, topic, payload)
        world.work.resume(device)

    def greets_again(self, device: Device) -> None:
        """A new machine on a link that stayed up: it says its presence, and nothing retained comes anew."""
        device.said_boot = device.disk.state.boot
        self._says_state(device, up=True)
        self.world.fleet.handle(device, CONNECTED)

    def disconnect(self, device: Device, *, will: bool = True) -> None:
        """The connection breaks. A broker's restart ends wills."""
        if not device.connected:
            return
        device.connected = False
        device.link += 1
        self._up_until[device.number] = self._down_until[device.number] = 0.0
        self.world.work.pause(device)
        if will:
            self.world.ask(self.world.now + WILL_SECONDS, device.number, WILL, None, device.link)

    def will(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """A client has been silent for too long."""
        device = self.devices[number]
        if self.up and device.link == generation and device.present:
            self._says_state(device, up=False)

    def _says_state(self, device: Device, *, up: bool) -> None:
        """The retained state of a device, said by itself or by its will."""
        device.present = up
        self.give_hub(self._state(device))

    def _state(self, device: Device) -> Message:
        name = name_of(device.number)
        presence = Presence(device=name, up=bool(device.present), boot=device.said_boot)
        return topics.state(name), encode(presence)

    def hub_subscribes(self) -> None:
        """The hub's link is up: what waited for it, then the retained states of all devices."""
        waiting, self.for_hub = self.for_hub, deque()
        while waiting:
            if not self.hub.linked:  # it crashed on the way: what is left waits on
                self.for_hub.extendleft(reversed(waiting))
                return
            self.hub.arrived(waiting.popleft())
        for device in self.devices:
            if not self.hub.linked:
                return
            if device.present is not None:
                self.world.events += 1
                self.hub.arrived(self._state(device))

    # ------------------------------------------------------------ restart
    def restart(self, seconds: float, *, with_memory: bool) -> None:
        """Down for so long. Without memory, sessions, queues and everything retained are gone."""
        self.up = False
        self._generation += 1
        self.hub.link_down()
        if not with_memory:
            self.retained.clear()
            self.for_hub.clear()
        for device in self.devices:
            if not with_memory:
                device.session, device.present = None, None
            if device.connected:
                self.disconnect(device, will=False)
                self.try_connect(device, device.draws.uniform(0.0, _BACK_OFF_SECONDS))
        self.world.ask(self.world.now + seconds, HUB, BROKER_UP, None, self._generation)

    def comes_up(self, _number: int, _argument: object, generation: int, _sequence: int) -> None:
        """The broker runs again."""
        if generation == self._generation:
            self.up = True
            self.hub.link_up()


_DEVICE_TOPICS: Final = f"{topics.ROOT}/d/d"
_DIGITS: Final = len(_DEVICE_TOPICS)
CONNECTED: Final = Connected()


def number_of(topic: str) -> int:
    """The number of the device whose topic this is."""
    return int(topic[_DIGITS : topic.index("/", _DIGITS)])
