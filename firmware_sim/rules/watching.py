"""The invariants over a world: every effect is judged as it is carried out, the whole fleet every ten minutes.

Judging asks for no event and draws nothing: a world has the same check-sum with and without.
"""

from __future__ import annotations

from typing import Final

from edge_agent import effects as device_effects
from firmware_sim.rules.hub_rules import LEASE_SECONDS
from firmware_sim.rules.invariants import Invariants
from firmware_sim.world.clock import START
from firmware_sim.world.devices import Device
from firmware_sim.world.standins import HUB, name_of
from firmware_sim.world.task import Vector
from firmware_sim.world.world import World
from hub import effects as hub_effects
from hub.hub import Hub

LOOK_SECONDS: Final = 600.0
# Beyond the window: a device asks every eight minutes, and some of that is lost.
STUCK_SECONDS: Final = 2_400.0
SILENT_CHECKINS: Final = 6  # twice what a hub allows: its check-in time may have changed meanwhile
_DEVICE_EFFECTS: Final = (
    device_effects.Save,
    device_effects.Publish,
    device_effects.SendChunk,
    device_effects.Seal,
    device_effects.KeepCarry,
    device_effects.DropCarry,
)
_HUB_EFFECTS: Final = (hub_effects.Save, hub_effects.Publish)


class WatchedWorld:
    """Judges a world while it runs. Call `finish` when it is over; InvariantBroken comes out of the run itself."""

    def __init__(self, world: World, *, exact_every: int = 1, replay: str = "") -> None:
        self.world = world
        self.invariants = Invariants(
            lambda: (world.now, world.events),
            sent=self._sent,
            blob=lambda sha256: world.hub.blobs[sha256],
            floor=lambda name: world.devices[number_of(name)].parts.policy.bloc_devices_min,
            exact_every=exact_every,
            seed=world.seed,
            replay=replay,
        )
        self._look_at = LOOK_SECONDS
        self._up = (0, 0.0)  # the hub's epoch, and since when it was seen running
        self._suspects: dict[
            int, tuple[int, bytes]
        ] = {}  # device -> its connection and round at the last look
        self._names = [name_of(device.number) for device in world.devices]
        for kind in (*_DEVICE_EFFECTS, *_HUB_EFFECTS):
            world.watch(kind, self._carried_out)

    def _carried_out(self, world: World, number: int, effect: object) -> None:
        if number == HUB:
            self.invariants.hub(effect)
        else:
            self.invariants.device(self._names[number], effect)
        if world.now >= self._look_at:
            self._look_at = world.now + LOOK_SECONDS
            self._look()

    def _sent(self, name: str, transcript: bytes) -> Vector | None:
        files = self.world.devices[number_of(name)].disk.round
        return files.sent if files is not None and files.transcript == transcript else None

    def finish(self) -> None:
        """At the end of the run: the last look, and the audit over every sum ever opened."""
        self._look()
        self.invariants.leverage_holds()

    # ------------------------------------------------------------ the whole fleet
    def _look(self) -> None:
        world, hub = self.world, self.world.hub
        if hub.machine is None or not hub.linked:
            self._up = (0, world.now)
        elif self._up[0] != hub.epoch:
            self._up = (hub.epoch, world.now)
        elif self._up[1] + LEASE_SECONDS < world.now:
            self.invariants.leases_end(START + world.now)
        if hub.machine is not None:
            self._is_bounded(hub.machine)
            self._counts_who_is_there(hub.machine)
        for device in world.devices:
            self._is_not_stuck(device)

    def _is_bounded(self, machine: Hub) -> None:
        """What the hub keeps in memory grows with devices and blocs, never with time; its counts are right."""
        fail, blocs = self.invariants.fail, 0
        for campaign in machine.campaigns.values():
            blocs += len(campaign.blocs)
            training = 0
            for bloc in campaign.blocs.values():
                contacts = [machine.contacts[name] for name in bloc.row.members if name in machine.contacts]
                training += sum(contact.training for contact in contacts)
                ready = sum(contact.counted for contact in contacts)
                if bloc.ready != ready:
                    fail("counts", f"the hub counts {bloc.ready} ready members of {bloc.row.id}, not {ready}")
            if campaign.training != training:
                fail("counts", f"the hub counts {campaign.training} devices in training, not {training}")
        if len(machine.rounds) > blocs:
            fail("bounded", f"the hub keeps {len(machine.rounds)} rounds of {blocs} blocs")
        if len(machine.contacts) > len(self.world.devices):
            fail("bounded", f"the hub knows more devices than the {len(self.world.devices)} that there are")
        for state in machine.rounds.values():
            if not state.incoming.keys() <= set(state.missing):
                fail("bounded", f"the hub keeps half a report that it cannot use, for {state.bloc.row.id}")

    def _counts_who_is_there(self, machine: Hub) -> None:
        """A bloc counts members whose READY is good, who are here, and who were heard not long ago."""
        for contact in machine.contacts.values():
            if not contact.counted:
                continue
            every = contact.campaign.row.checkin_seconds if contact.campaign else 0
            silent = START + self.world.now - contact.heard_at
            if not (contact.envelope and contact.here) or contact.why:
                self.invariants.fail(
                    "counts", f"the hub counts {contact.device}, which is not ready or not here"
                )
            if silent > SILENT_CHECKINS * every + LOOK_SECONDS and self._hub_was_up():
                self.invariants.fail("counts", f"the hub counts {contact.device}, silent for {silent:.0f} s")

    def _is_not_stuck(self, device: Device) -> None:
        """A device that is on, linked and allowed to work ends its round soon after the window, or has ended it."""
        memory = self.invariants.device_rules.devices.get(name_of(device.number))
        if memory is None or not memory.transcript or not self._is_healthy(device):
            self._suspects.pop(device.number, None)
            return
        suspect = device.link, memory.transcript
        late = memory.since + self.world.scenario.campaign.window_seconds + STUCK_SECONDS < self.world.now
        if late and self._suspects.get(device.number) == suspect and self._hub_was_up():
            self.invariants.fail("stuck", f"{name_of(device.number)} is in a round long after its window")
        self._suspects[device.number] = suspect

    def _is_healthy(self, device: Device) -> bool:
        return (
            device.connected and device.agent is not None and device.told is not None and device.told.allowed
        )

    def _hub_was_up(self) -> bool:
        return self._up[0] == self.world.hub.epoch and self._up[1] + LEASE_SECONDS < self.world.now


def number_of(name: str) -> int:
    """The number of the device of this name."""
    return int(name[1:])
