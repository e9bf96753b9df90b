"""The simulated driver of all devices: it carries out what the shipped agents ask, in the order in which they ask.

A `Save` is durable before the next effect is touched; one that fails ends the machine like a power cut would, and a
new one starts from the disk as soon as that takes the state (edge_agent.driver). Timers are never taken out of the
clock: each name has a generation, and a power-off begins a new one for all.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from edge_agent import effects
from edge_agent.agent import Agent
from edge_agent.effects import Conditions, Effect, Event
from fedge.errors import StorageError
from fedge.limits import CLOCK_SKEW_SECONDS_MAX
from fedge.messages import Facts
from firmware_sim.parts.draw import DeviceParts
from firmware_sim.world.clock import BOOTS, RECOVERS, START, TIMER
from firmware_sim.world.disk import Disk
from firmware_sim.world.standins import name_of
from firmware_sim.world.streams import Stream

if TYPE_CHECKING:
    from firmware_sim.world.broker import Message
    from firmware_sim.world.work import Job
    from firmware_sim.world.world import World

BOOT_SECONDS: Final = (15.0, 45.0)  # from power to a running agent
CONNECT_SECONDS: Final = (0.2, 3.0)
RECOVER_SECONDS: Final = (5.0, 300.0)  # edge_agent.driver: between two tries of a disk that refuses
CUT_SECONDS: Final = 60.0  # median of an outage that a fault at a Save begins
_STARTED: Final = effects.Started()
_STALE_MIN, _STALE_SHARE = 1_000, 0.25
_SHARED_MAX: Final = 4_096

# ---- why a device is off
SCHEDULE, EMPTY, FORCED, GONE = 1, 2, 4, 8


class PowerFailed(Exception):
    """The power of a device, or the hub's process, ended between two effects."""


class Device:
    """One device of the world: its parts, its disk, and (while it runs) its machine."""

    __slots__ = (
        "agent",
        "connected",
        "cut_until",
        "disk",
        "draws",
        "job",
        "link",
        "look",
        "number",
        "off",
        "parts",
        "power",
        "present",
        "recover",
        "said_boot",
        "session",
        "told",
        "up_since",
        "waits",
    )

    def __init__(self, number: int, parts: DeviceParts, seed: int) -> None:
        self.number, self.parts, self.disk = number, parts, Disk()
        self.agent: Agent | None = None
        self.draws = Stream(seed, number, "driver")
        self.off = SCHEDULE  # why it is off: a sum of the reasons above
        self.power = self.link = self.look = self.said_boot = 0  # generations
        self.connected = self.waits = False  # `waits`: booted, and the clock is not right yet
        self.present: bool | None = None  # what its retained state says
        self.up_since = self.cut_until = 0.0
        self.recover = RECOVER_SECONDS[0]
        self.session: list[Message] | None = None
        self.told: Conditions | None = None
        self.job: Job | None = None

    @property
    def on(self) -> bool:
        """Whether it has power."""
        return not self.off


class Fleet:
    """Everything that devices do by themselves: boot, run their machines, keep time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._timers: dict[str, array[int]] = defaultdict(lambda: array("q", bytes(8 * len(world.devices))))
        self._fired: dict[str, effects.TimerFired] = {}
        self._stale = 0  # timers in the clock that are void
        self._conditions: dict[Conditions, Conditions] = {}
        self._offsets: dict[int, float] = {}  # of clocks that are wrong
        self._latest: dict[int, float] = {}  # the latest time told by such a clock: it never goes back
        self.carry_out: dict[type[Effect], Callable[[Device, Any], None]] = {
            effects.Save: self._save,
            effects.Publish: self._publish,
            effects.SetTimer: self._set_timer,
            effects.CancelTimer: self._cancel_timer,
            effects.Tell: self._tell,
            effects.KeepCarry: self._keep_carry,
            effects.DropCarry: self._drop_carry,
        }

    def shared(self, found: Conditions) -> Conditions:
        """One object for most devices of which the same may be said."""
        if len(self._conditions) >= _SHARED_MAX:
            self._conditions.clear()  # what is said no more would take more room than all that is
        return self._conditions.setdefault(found, found)

    # ------------------------------------------------------------ life
    def power_on(self, device: Device) -> None:
        """The device has power from now on: it boots."""
        device.up_since = self.world.now
        boot = device.draws.uniform(*BOOT_SECONDS)
        self.world.ask(self.world.now + boot, device.number, BOOTS, None, device.power)

    def power_off(self, device: Device) -> None:
        """From now on it has none: machine, timers and all that is not durable are gone."""
        device.power += 1
        device.agent, device.waits, device.told = None, False, None
        device.recover = RECOVER_SECONDS[0]
        device.disk.lose()
        self._forget_timers(device)
        self._latest.pop(device.number, None)
        self.world.work.abandon(device, powered=False)
        self.world.broker.disconnect(device)

    def boots(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """The system is up: the agent starts, unless the clock is known to be wrong."""
        device = self.world.devices[number]
        if device.power == generation:
            self.start(device)

    def start(self, device: Device) -> None:
        """Starts the machine from the disk; a board that woke up in 1970 waits for the right time first."""
        if self._offsets.get(device.number, 0.0) < -CLOCK_SKEW_SECONDS_MAX:
            device.waits = True
            return
        device.waits = False
        self._make_machine(device)
        if device.agent is not None:
            self.world.broker.try_connect(device, device.draws.uniform(*CONNECT_SECONDS))

    def _make_machine(self, device: Device) -> None:
        world = self.world
        device.told = told = world.surroundings.judge(device)
        device.agent = Agent(
            name_of(device.number),
            world.identities.signer(device.number),
            world.verifier,
            device.parts.policy,
            told.facts,
            device.disk.state,
            world.entropy(device.number),
            world.identities.agreement,
        )
        device.disk.sweep(device.agent.transcript)
        self.handle(device, told)
        self.handle(device, _STARTED)
        world.surroundings.look_later(device)

    def handle(self, device: Device, event: Event) -> None:
        """One event for the machine, if it runs, and everything that follows from it."""
        agent = device.agent
        if agent is None:
            return
        carry_out = self.carry_out
        now = self._unix(device.number) if self._latest or self._offsets else START + self.world.now
        try:
            for effect in agent.handle(now, event):
                carry_out[type(effect)](device, effect)
        except PowerFailed:
            pass
        except StorageError:
            self._forget(device)

    def _unix(self, number: int) -> float:
        now = START + self.world.now + self._offsets.get(number, 0.0)
        if number in self._latest:
            self._latest[number] = now = max(now, self._latest[number])
        return now

    def set_clock_offset(self, device: Device, seconds: float) -> None:
        """The clock is so far off from now on; a running machine's never goes back."""
        self._latest[device.number] = self._unix(device.number)
        if seconds:
            self._offsets[device.number] = seconds
        else:
            self._offsets.pop(device.number, None)
        if device.waits and device.on:
            self.start(device)

    def _forget(self, device: Device) -> None:
        """The disk did not take the state: forget this machine; the next one starts from what is saved."""
        device.agent = None
        self._forget_timers(device)
        self.world.work.abandon(device, powered=True)
        self.world.ask(self.world.now + device.recover, device.number, RECOVERS, None, device.power)
        device.recover = min(2 * device.recover, RECOVER_SECONDS[1])

    def recovers(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """Another try after the disk refused."""
        device = self.world.devices[number]
        if device.power != generation or device.agent is not None or device.waits:
            return
        self._make_machine(device)
        if device.agent is not None and device.connected:
            self.world.broker.greets_again(device)
        elif device.agent is not None:
            self.world.broker.try_connect(device, device.draws.uniform(*CONNECT_SECONDS))

    # ------------------------------------------------------------ timers
    def fires(self, number: int, name: str, _generation: int, sequence: int) -> None:
        """A timer runs out, unless it was set anew or cancelled since."""
        timers = self._timers[name]
        if timers[number] == sequence:
            timers[number] = 0
            self.handle(self.world.devices[number], self._fired[name])
        else:
            self._stale -= 1

    def _set_timer(self, device: Device, effect: effects.SetTimer) -> None:
        world, name, number = self.world, effect.name, device.number
        if name not in self._fired:
            self._fired[name] = effects.TimerFired(name)
        timers = self._timers[name]
        if timers[number]:
            self._outdated()
        timers[number] = world.ask(world.now + effect.seconds, number, TIMER, name, 0)

    def _cancel_timer(self, device: Device, effect: effects.CancelTimer) -> None:
        if effect.name in self._timers and self._timers[effect.name][device.number]:
            self._timers[effect.name][device.number] = 0
            self._outdated()

    def _forget_timers(self, device: Device) -> None:
        for timers in self._timers.values():
            if timers[device.number]:
                timers[device.number] = 0
                self._outdated()

    def _outdated(self) -> None:
        """One more timer in the clock is void; when too many are, they go: some are hours ahead."""
        self._stale += 1
        if self._stale > _STALE_MIN and self._stale > _STALE_SHARE * len(self.world.entries):
            timers = self._timers
            self.world.keep(lambda entry: entry[3] != TIMER or timers[entry[4]][entry[2]] == entry[1])
            self._stale = 0

    # ------------------------------------------------------------ effects
    def _save(self, device: Device, effect: effects.Save) -> None:
        world = self.world
        where = world.faults.on_save(world, device.number) if world.faults is not None else ""
        if (
            where != "after" and where
        ):  # not begun, or torn: its check-sum fails, and the state before it stands
            self._cut(device)
        device.disk.save(effect.state)
        device.recover = RECOVER_SECONDS[0]
        world.recorder.saved(device, effect.state)
        if where:
            self._cut(device)

    def _cut(self, device: Device) -> None:
        self.world.power_off(device.number, device.draws.lognormal(CUT_SECONDS, 1.0))
        raise PowerFailed

    def _publish(self, device: Device, effect: effects.Publish) -> None:
        if device.connected:  # else the machine says everything again once the link is up
            self.world.broker.from_device(device, effect.topic, effect.payload)

    def _tell(self, device: Device, effect: effects.Tell) -> None:
        if effect.refusal:
            self.world.recorder.refusals[effect.refusal] += 1

    def _keep_carry(self, device: Device, effect: effects.KeepCarry) -> None:
        device.disk.keep_carry(effect.transcript)
        self.world.recorder.round_ended(device, opened=False)

    def _drop_carry(self, device: Device, effect: effects.DropCarry) -> None:
        device.disk.drop_carry(effect.transcript)
        self.world.recorder.round_ended(device, opened=True)


def samples_bucket(samples: int) -> int:
    """As edge_agent.resources gives it: the bit length of the number of examples."""
    return samples.bit_length()


def first_facts(parts: DeviceParts, samples: int, step_tokens: int) -> Facts:
    """What a device measures of itself at its start. Its pace is a short test's, until a round has measured it."""
    free = int(parts.board.memory_mb * FREE_MEMORY)
    error = Stream(parts.number, "gauge").lognormal(1.0, GAUGE_SPREAD)
    return Facts(
        board=parts.board.label,
        memory_mb_step=free // 256 * 256,
        seconds_per_step=float(f"{error * step_tokens / parts.tokens_per_second:.2g}"),
        samples_bucket=samples_bucket(samples),
        aes=parts.board.aes,
    )


GAUGE_SPREAD: Final = 0.2  # sigma of the logarithm of a short test's error
FREE_MEMORY: Final = 0.6  # of a board's memory, beside system and owner's things
