"""What happens around a device: power and presence, heat and sun, and what its owner does.

Every part is settled when something asks and never in between. A device looks at its conditions when an answer can
have changed (a level of its battery, an hour of its owner's policy, a step of its stay, a board that has cooled), and
tells its machine only what is new.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from edge_agent.conditions import BATTERY_SECONDS, STAY_STEPS, Reading, judge
from edge_agent.effects import Conditions, Train
from edge_agent.policy import Policy
from fedge.formation import bucket
from firmware_sim.parts.hours import DAY, HOUR, until
from firmware_sim.parts.owner import absence_seconds, actions, edited
from firmware_sim.scenario import Presence
from firmware_sim.world.clock import FLIPS, LOOK, OWNER, RETURNS, START
from firmware_sim.world.devices import EMPTY, FORCED, FREE_MEMORY, GONE, SCHEDULE, first_facts
from firmware_sim.world.streams import Stream

if TYPE_CHECKING:
    from firmware_sim.world.devices import Device
    from firmware_sim.world.world import World

AGAIN_CHARGE: Final = 0.10  # an empty battery switches its device on again from here
_QUARTERS: Final = (
    0.1875,
    0.4375,
    0.6875,
    0.3125,
    0.5625,
    0.8125,
)  # where `judge` says another one, down and up
HISTORY_SECONDS: Final = 7 * DAY
_SOON: Final = 1.0  # a look falls this much behind what it looks for, so that rounding cannot put it before


class Surroundings:
    """Power, presence, heat and owners of all devices."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._metered: dict[int, bool] = {}
        self._heat: dict[int, float] = {}
        # Share of the last days that a device was on, and when that was last brought up to date.
        shares = (long_run_share(device.parts.group.presence) for device in world.devices)
        self._on_share = array("f", shares)
        self._on_since = array("f", bytes(4 * len(world.devices)))
        self._owners: dict[int, tuple[Iterator[tuple[float, str]], Stream]] = {}
        self._forced: dict[
            int, int
        ] = {}  # the newest of what switched a device off, so that older ends are void

    # ------------------------------------------------------------ presence
    def begin(self, device: Device) -> None:
        """The world begins for this device."""
        world, parts = self.world, device.parts
        on = parts.presence.first(0.0)
        world.ask(parts.presence.next(0.0, on), device.number, FLIPS, not on, 0)
        self._ask_owner(device)
        if on:
            self.switch_on(device, SCHEDULE)
        else:
            self.look_later(device)

    def flips(self, number: int, on: bool, _generation: int, _sequence: int) -> None:
        """A device's own time of being on begins or ends."""
        device = self.world.devices[number]
        seconds = device.parts.presence.next(self.world.now, on)
        if math.isfinite(seconds):
            self.world.ask(self.world.now + seconds, number, FLIPS, not on, 0)
        self.switch_on(device, SCHEDULE) if on else self.switch_off(device, SCHEDULE)

    def switch_off(self, device: Device, reason: int) -> None:
        """The device has no power, for one more reason."""
        was_on = device.on
        if was_on:
            self._settle(device)
            self._remember(device, on=True)
            self.world.recorder.goes_off(device)
        device.off |= reason
        if was_on:
            self.world.fleet.power_off(device)
            self.look_later(device)

    def switch_on(self, device: Device, reason: int) -> None:
        """One reason less to be off; it boots when none is left."""
        if not device.off & reason:
            return
        if device.off == reason:
            self._settle(device)
            self._remember(device, on=False)
        device.off &= ~reason
        if device.on:
            self.world.fleet.power_on(device)
            self.look_later(device)

    def force_off(self, device: Device, seconds: float | None) -> None:
        """Off, and on again after `seconds`; None: until somebody switches it on."""
        self.switch_off(device, FORCED)
        self._forced[device.number] = sequence = self.world.sequence + 1
        if seconds is not None:
            self.world.ask(self.world.now + seconds, device.number, RETURNS, None, sequence)

    def returns(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """Whatever forced a device off is over."""
        if self._forced.get(number) == generation:
            self.force_on(self.world.devices[number])

    def force_on(self, device: Device) -> None:
        """Nothing forces it off any more."""
        self._forced.pop(device.number, None)
        self.switch_on(device, FORCED)

    def share_on(self, device: Device) -> float:
        """Of the last seven days: at the world's start the long run's, then fading into what happened."""
        return self._faded(device.number, on=device.on)

    def _remember(self, device: Device, *, on: bool) -> None:
        self._on_share[device.number] = self._faded(device.number, on=on)
        self._on_since[device.number] = self.world.now

    def _faded(self, number: int, *, on: bool) -> float:
        keep = math.exp(-(self.world.now - self._on_since[number]) / HISTORY_SECONDS)
        return keep * self._on_share[number] + (1.0 - keep) * float(on)

    # ------------------------------------------------------------ conditions
    def judge(self, device: Device) -> Conditions:
        """What the board can do now, judged by its owner's policy."""
        self._settle(device)
        return self._judged(device)

    def _judged(self, device: Device) -> Conditions:
        world, parts, number = self.world, device.parts, device.number
        hour = parts.local_hour(world.now)
        thermal = parts.thermal
        reading = Reading(
            power=parts.battery.power(hour),
            charge=parts.battery.charge,
            celsius=thermal.celsius,
            hot=thermal.hot,
            metered=self._metered.get(number, parts.group.link.metered),
            free_memory_mb=int(parts.board.memory_mb * FREE_MEMORY),
            up_seconds=world.now - device.up_since,
            share_on=self.share_on(device),
            upload_kbit=parts.link.upload_kbit,
        )
        facts = (
            device.told.facts
            if device.told is not None
            else first_facts(parts, world.samples(number), world.task.step_tokens)
        )
        found = judge(
            parts.policy,
            reading,
            facts,
            START + world.now,
            bytes_today=world.recorder.bytes_today(number) if parts.policy.bytes_per_day_max else 0,
            rounds_spent=device.disk.state.rounds_opened,
            local_hour=hour,
        )
        return world.fleet.shared(found)

    def look(self, number: int, _argument: object, generation: int, _sequence: int) -> None:
        """Something may have changed."""
        device = self.world.devices[number]
        if device.look == generation:
            self.look_now(device)

    def look_now(self, device: Device) -> None:
        """Tells the machine what is new, and switches off what is empty."""
        self._settle(device)
        battery = device.parts.battery
        if battery.supply.kind != "mains":
            if battery.empty and device.on:
                self.switch_off(device, EMPTY)
                return
            if device.off & EMPTY and battery.charge >= AGAIN_CHARGE:
                self.switch_on(device, EMPTY)
                return
        if device.agent is not None:
            found = self._judged(device)
            if found != device.told:
                device.told = found
                self.world.fleet.handle(device, found)
        self.look_later(device)

    def look_later(self, device: Device) -> None:
        """Asks for the next look: when the first of all that can change does."""
        device.look += 1
        seconds = min(self._changes(device), default=math.inf)
        if seconds < math.inf:
            at = self.world.now + max(seconds, 0.0) + _SOON
            self.world.ask(at, device.number, LOOK, None, device.look)

    def _changes(self, device: Device) -> Iterator[float]:
        """Seconds until each thing that a look could find."""
        world, parts = self.world, device.parts
        hour = parts.local_hour(world.now)
        if parts.battery.supply.kind != "mains":
            levels = _levels(parts.policy.battery_min)
            yield parts.battery.next_change(world.now, hour, self._watts(device), levels)
        if device.agent is None or device.told is None:
            return
        up = world.now - device.up_since
        step = bucket(max(up, device.told.stay_seconds), STAY_STEPS)
        if step < len(STAY_STEPS):
            yield STAY_STEPS[step] - up
        if parts.policy.hours:
            yield from self._policy_changes(parts.policy, hour)
        if parts.policy.bytes_per_day_max:
            yield DAY - (START + world.now) % DAY
        if device.told.facts.hot and device.job is None:
            yield self._cooling_seconds(device)
        if parts.policy.celsius_max and self._works(device):
            yield self._heating_seconds(device, parts.policy.celsius_max)

    def _policy_changes(self, policy: Policy, hour: float) -> Iterator[float]:
        opens, closes = (int(edge[:2]) + int(edge[3:]) / 60 for edge in policy.hours.split("-"))
        yield until(hour, opens) * HOUR
        left = until(hour, closes) * HOUR
        yield left
        yield from (left - step for step in STAY_STEPS if step < left)

    # ------------------------------------------------------------ heat and current
    def ambient(self, device: Device) -> float:
        """Air around the board, with whatever heats it besides."""
        return device.parts.ambient(self.world.now) + self._heat.get(device.number, 0.0)

    def _works(self, device: Device) -> bool:
        return device.job is not None and isinstance(device.job.effect, Train)

    def _watts(self, device: Device) -> float:
        if not device.on:
            return 0.0
        board = device.parts.board
        return board.load_watts if self._works(device) else board.idle_watts

    def _settle(self, device: Device) -> None:
        world, parts = self.world, device.parts
        if parts.battery.supply.kind != "mains":
            parts.battery.settle(world.now, parts.local_hour(world.now), self._watts(device))
        load = 1.0 if self._works(device) else 0.0
        parts.thermal.settle(world.now, self.ambient(device), load)

    def load_changed(self, device: Device) -> None:
        """Training began or ended: what follows from the current and the heat is worked out anew."""
        battery = device.parts.battery
        if battery.supply.kind != "mains":
            trained = self._works(device)  # until now it drew the other current
            board = device.parts.board
            hour = device.parts.local_hour(self.world.now)
            battery.settle(self.world.now, hour, board.idle_watts if trained else board.load_watts)
        if device.on and (device.agent is not None):
            self.look_later(device)

    def _cooling_seconds(self, device: Device) -> float:
        """Until an idle board is below its limit, from the exponential."""
        thermal = device.parts.thermal
        rest, limit = self.ambient(device) + thermal.idle, thermal.throttle_celsius
        if thermal.celsius < limit or rest >= limit:
            return 0.0 if thermal.celsius < limit else HOUR
        return thermal.tau * math.log(max(1.0, (thermal.celsius - rest) / (limit - rest)))

    def _heating_seconds(self, device: Device, celsius: float) -> float:
        """Until a working board passes its owner's bound, found by halving the way to where it tends."""
        now, ambient = self.world.now, self.ambient(device)

        def reached(seconds: float) -> bool:
            later = copy.copy(device.parts.thermal)
            return later.settle(now + seconds, ambient, 1.0) > celsius

        low, high = 0.0, 20.0 * device.parts.thermal.tau
        if not reached(high):
            return math.inf
        while high - low > 1.0:
            middle = (low + high) / 2.0
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    # ------------------------------------------------------------ what is done to a device
    def set_metered(self, device: Device, metered: bool) -> None:
        """The network counts every byte, or no longer does."""
        self._metered[device.number] = metered
        self._changed(device)

    def set_heat(self, device: Device, celsius: float) -> None:
        """So much hotter around the board from now on; 0 ends it."""
        self._settle(device)
        if celsius:
            self._heat[device.number] = self._heat.get(device.number, 0.0) + celsius
        else:
            self._heat.pop(device.number, None)
        self._changed(device)

    def set_policy(self, device: Device, policy: Policy) -> None:
        """The owner edits the policy; a running agent reads it at once."""
        device.parts.policy = policy
        if device.agent is not None:
            device.agent.policy = policy
        self._changed(device)

    def _changed(self, device: Device) -> None:
        if device.on and device.agent is not None:
            self.look_now(device)

    # ------------------------------------------------------------ owners
    def _ask_owner(self, device: Device) -> None:
        owner = device.parts.group.owner
        if owner.unplugs or owner.travels or owner.revokes or owner.policy_edits:
            stream = Stream(self.world.seed, device.number, "owner")
            self._owners[device.number] = actions(owner, stream, self.world.days), stream
            self._next_action(device.number)

    def _next_action(self, number: int) -> None:
        found = next(self._owners[number][0], None)
        if found is None:
            del self._owners[number]
        else:
            self.world.ask(found[0], number, OWNER, found[1], 0)

    def acts(self, number: int, action: str, _generation: int, _sequence: int) -> None:
        """An owner does something."""
        world, device = self.world, self.world.devices[number]
        draws = Stream(world.seed, number, "act", int(world.now))
        if action == "revoke":
            world.leave(number)
            return
        if action == "policy":
            self.set_policy(device, edited(device.parts.policy, draws))
        elif not device.off & GONE:
            self.force_off(device, absence_seconds(action, draws))
        self._next_action(number)


@lru_cache(maxsize=64)
def _levels(battery_min: float) -> tuple[float, ...]:
    """Charges at which a device is empty, has enough again, or has something else to say of itself."""
    stays = (battery_min + step / BATTERY_SECONDS for step in STAY_STEPS)
    return 0.0, AGAIN_CHARGE, battery_min, *_QUARTERS, *(level for level in stays if level < 1.0)


def long_run_share(plan: Presence) -> float:
    """Share of the time that a device with this plan is on, roughly: what it knows of itself when a world begins."""
    if plan.kind in ("always", "trace"):
        return 1.0 if plan.kind == "always" else 0.6
    sessions = plan.keep * plan.on_hours / (plan.on_hours + plan.off_hours)
    if plan.kind == "sessions":
        return sessions
    window = ((plan.to_hour - plan.from_hour) % 24.0) / 24.0
    return plan.keep * window + (sessions * (1.0 - window) if plan.kind == "night" else 0.0)
