"""Five to eight devices and a hub, disturbed in every way that Hypothesis can think of; what it finds, it shrinks.

The shipped machines and real cryptography under the world's invariants, which judge every effect. Whatever happened,
a fleet that is left in peace afterwards brings its campaigns to their end.
"""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from playbook import PowerCut, campaign
from watched_fleet import WatchedFleet

from edge_agent.effects import Conditions
from edge_agent.effects import Save as DeviceSave
from fedge.messages import Facts
from hub.effects import CampaignAsked, CampaignRow
from hub.effects import Save as HubSave

SIDES = st.sampled_from(["before", "after"])
WHO = st.integers(0, 7)
REMEMBERED = 60  # delivered messages that may come again


class SmallFleet(RuleBasedStateMachine):
    """Rules are what an operator, an owner, a link and a power plug can do."""

    @initialize(devices=st.integers(5, 8), seed=st.integers(0, 7), rounds=st.integers(1, 3))
    def begin(self, devices: int, seed: int, rounds: int) -> None:
        self.fleet = WatchedFleet(devices, seed=seed)
        self.names = list(self.fleet.devices)
        self.rounds, self.campaigns = rounds, 1
        self.armed: dict[str, str] = {}  # who is cut on which side of its next Save
        self.past: deque[tuple[str, str, bytes]] = deque(maxlen=REMEMBERED)
        self.fleet.before_effect = lambda who, effect: self.cut(who, effect, "before")
        self.fleet.after_effect = lambda who, effect: self.cut(who, effect, "after")
        self.fleet.filter = self.remember
        self.fleet.begin(campaign(devices, rounds=rounds, bloc=devices))

    def cut(self, who: str, effect: object, side: str) -> None:
        if isinstance(effect, DeviceSave | HubSave) and self.armed.get(who) == side:
            del self.armed[who]
            raise PowerCut

    def remember(self, to: str, topic: str, payload: bytes) -> list[bytes]:
        self.past.append((to, topic, payload))
        return [payload]

    def name(self, number: int) -> str:
        return self.names[number % len(self.names)]

    # ---------------------------------------------------------------- the link
    @rule(messages=st.integers(1, 60))
    def deliver(self, messages: int) -> None:
        for _ in range(min(messages, len(self.fleet.queue))):
            self.fleet.step()

    @precondition(lambda self: self.fleet.queue)
    @rule(place=st.integers(0, 200))
    def drop(self, place: int) -> None:
        del self.fleet.queue[place % len(self.fleet.queue)]

    @precondition(lambda self: self.past)
    @rule(place=st.integers(0, REMEMBERED))
    def come_again(self, place: int) -> None:
        self.fleet.queue.append(self.past[place % len(self.past)])

    @precondition(lambda self: len(self.fleet.queue) > 1)
    @rule(place=st.integers(1, 200))
    def overtake(self, place: int) -> None:
        entry = self.fleet.queue[place % len(self.fleet.queue)]
        self.fleet.queue.remove(entry)
        self.fleet.queue.appendleft(entry)

    # ---------------------------------------------------------------- power
    @rule(number=WHO, side=SIDES)
    def cut_a_device_at_its_next_save(self, number: int, side: str) -> None:
        self.armed[self.name(number)] = side

    @rule(number=WHO)
    def restart_a_device(self, number: int) -> None:
        self.fleet.boot(self.name(number))

    @rule(side=SIDES)
    def cut_the_hub_at_its_next_transaction(self, side: str) -> None:
        self.armed["hub"] = side

    @rule()
    def restart_the_hub(self) -> None:
        self.fleet.start_hub()

    # ---------------------------------------------------------------- owners and time
    @rule(number=WHO, allowed=st.booleans(), quarter=st.integers(0, 4))
    def conditions_change(self, number: int, allowed: bool, quarter: int) -> None:
        facts = Facts(samples_bucket=9, charge_quarter=quarter, power="battery")
        stay = 3_600 if allowed else 0
        self.fleet.device_event(
            self.name(number), Conditions(allowed, stay, facts, "" if allowed else "metered")
        )

    @rule(names=st.sampled_from([(), ("ready",), ("receipt",), ("result",), ("fetch",)]))
    def time_passes(self, names: tuple[str, ...]) -> None:
        self.fleet.fire_timers(*names)

    @rule()
    def a_window_passes(self) -> None:
        self.fleet.now += 3_600
        self.fleet.fire_timers()

    def all_follow_the_newest(self) -> bool:
        """Devices that hear of two new campaigns at once may choose differently, and then neither has enough."""
        newest = f"c{self.campaigns}".encode()
        return all(newest in device.saved.announcement for device in self.fleet.devices.values())

    @precondition(lambda self: self.campaigns < 3 and self.all_follow_the_newest())
    @rule()
    def another_campaign(self) -> None:
        self.campaigns += 1
        row = campaign(len(self.names), rounds=self.rounds, bloc=len(self.names), name=f"c{self.campaigns}")
        self.fleet.hub_event(CampaignAsked(row))

    # ---------------------------------------------------------------- the end
    def teardown(self) -> None:
        """In peace again: every campaign ends, and every rule has held."""
        if not hasattr(self, "fleet"):
            return
        self.armed.clear()
        for name in self.names:
            self.fleet.device_event(name, Conditions(True, 86_400, Facts(samples_bucket=9), ""))
        self.fleet.settle()
        self.fleet.invariants.leases_end(self.fleet.now)
        self.fleet.invariants.leverage_holds()
        rows = [row for row in self.fleet.rows.values() if isinstance(row, CampaignRow)]
        assert len(rows) == self.campaigns
        assert self.fleet.invariants.looked["opened"] == self.rounds * self.campaigns


SmallFleet.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the sweeps of seeds explore; a suite that finds another thing each time helps nobody
    suppress_health_check=list(HealthCheck),
)
TestSmallFleets = SmallFleet.TestCase
