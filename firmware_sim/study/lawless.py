"""Rounds as lawless federated learning runs them: a few devices at a time, the first K updates count, nobody masks.

The same devices as in a world (`firmware_sim.parts.draw`), the same task, the same work on them; only the law is
missing: a round may drop whoever it likes, and its scheduler may see each device's loss. What it costs less of, it is
not charged for: no messages but the adapter both ways, no keys, no masks, no check-ins, no bundle.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from firmware_sim.parts.draw import DeviceParts
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.scenario import Scenario
from firmware_sim.world.outcome import Point, Rounds
from firmware_sim.world.streams import Stream
from firmware_sim.world.task import Task, Vector

K: Final = 24  # updates of a round
K_MIN: Final = 18  # with fewer the round failed
OVER_SELECTION: Final = 1.3  # Bonawitz et al. 2019, section 2.2; FedScale
DEADLINE_SECONDS: Final = 3_600.0
OVERHEAD_SECONDS: Final = 20.0  # of a round: configuration and commit
WAIT_SECONDS: Final = 300.0  # when too few devices are there
WEIGHT_SAMPLES_MAX: Final = 200  # of a device in the mean
RADIO_WATTS: Final = 0.5
_LITTLE: Final = np.dtype("<f4")


class Transparent(Task, Protocol):
    """A task whose single losses can be seen, as the papers' schedulers need it and ours may not."""

    def losses(self, number: int, adapter: bytes) -> Vector:
        """The loss of each sample of one device."""


@dataclass(frozen=True, slots=True)
class Update:
    """One device's finished part in a round, as its scheduler sees it."""

    number: int
    seconds: float
    squared_loss: float  # mean square of its samples' losses before training


class Policy(Protocol):
    """Who is asked. `choose` gives `want` different devices of those `online`; `learn` hears of the updates used."""

    def choose(self, online: Sequence[int], want: int, adapter: bytes) -> list[int]: ...
    def learn(self, updates: Sequence[Update]) -> None: ...


@dataclass(slots=True)
class _Device:
    """Parts and what the horizon holds for them: the moments at which presence flips, and power cuts."""

    parts: DeviceParts
    on_first: bool
    flips: list[float]
    cuts: list[float]
    settled: float = 0.0

    def left(self, now: float) -> float:
        """Seconds until it goes off; 0 when it is off."""
        index = bisect_right(self.flips, now)
        if self.on_first != (index % 2 == 0):
            return 0.0
        return self.flips[index] - now if index < len(self.flips) else math.inf

    def cut_within(self, now: float, seconds: float) -> float:
        """Seconds until the power is cut for a moment; infinite when not within `seconds`."""
        index = bisect_right(self.cuts, now)
        after = self.cuts[index] - now if index < len(self.cuts) else math.inf
        return after if after < seconds else math.inf

    def settle(self, now: float, watts: float) -> None:
        """Draws `watts` from the battery since it was last settled, while switched on."""
        if self.parts.battery.supply.kind == "mains":
            return
        edges = [edge for edge in self.flips if self.settled < edge < now] + [now]
        for edge in edges:
            on = self.left(self.settled) > 0
            self.parts.battery.settle(edge, self.parts.local_hour(edge), watts if on else 0.0)
            self.settled = edge

    def allowed(self, now: float) -> bool:
        """On, and its owner's policy lets it work: charged enough, or charging."""
        if self.left(now) <= 0.0:
            return False
        self.settle(now, self.parts.board.idle_watts)
        battery, hour = self.parts.battery, self.parts.local_hour(now)
        return battery.power(hour) != "battery" or battery.charge >= self.parts.policy.battery_min


@dataclass(frozen=True, slots=True)
class _Attempt:
    number: int
    seconds: float  # it takes, or would take
    spent: float  # until it was done or interrupted
    training_share: float
    finished: bool


@dataclass(slots=True)
class LawlessRun:
    """A run's figures, as a world has them."""

    policy: str
    loss: list[Point]
    boards: list[str]
    served: list[int]  # updates that were used, by device
    started: int = 0
    finished: int = 0
    tried: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)
    joules_used: float = 0.0
    joules_wasted: float = 0.0

    @property
    def joules(self) -> float:
        return self.joules_used + self.joules_wasted

    @property
    def rounds(self) -> Rounds:
        """The figures under the names that a world gives them."""
        used = sum(self.served)
        return Rounds(
            tried=self.tried,
            opened=self.tried - self.failed,
            sat_out=self.failed,
            updates_started=self.started,
            updates_finished=self.finished,
            updates_opened=used,
            yield_=used / self.finished if self.finished else None,
            drop=(self.started - self.finished) / self.started if self.started else None,
            waste=self.joules_wasted / self.joules if self.joules else None,
            jain=jain(self.served),
            never_served=self.served.count(0) / len(self.served),
            seconds_median=float(np.median(self.seconds)) if self.seconds else None,
        )

    def participation(self, board: str) -> float:
        """Mean updates of a board's devices over the mean of all."""
        mean = sum(self.served) / len(self.served)
        own = [count for count, name in zip(self.served, self.boards, strict=True) if name == board]
        return sum(own) / len(own) / mean if mean and own else 0.0


class Lawless:
    """One fleet under one policy. `server_rate` multiplies each round's mean change."""

    def __init__(
        self,
        scenario: Scenario,
        fleet: Sequence[DeviceParts],
        seed: int,
        task: Transparent,
        server_rate: float = 1.0,
    ) -> None:
        self._task, self._steps, self._rate, self._seed = task, scenario.campaign.steps, server_rate, seed
        self._ends = scenario.days * DAY
        cuts = scenario.faults.get("power-cut", 0.0)
        self._devices = [_foreseen(fleet[number], self._ends, seed, cuts) for number in range(len(fleet))]
        self._adapter = task.first()

    def run(self, name: str, policy: Policy) -> LawlessRun:
        """Rounds until the scenario's time is over."""
        run = LawlessRun(name, [], [device.parts.board.name for device in self._devices], [])
        run.served = [0] * len(self._devices)
        now = 0.0
        while now < self._ends:
            online = [number for number, device in enumerate(self._devices) if device.allowed(now)]
            if len(online) < K_MIN:
                now += WAIT_SECONDS
                continue
            chosen = policy.choose(online, min(len(online), round(K * OVER_SELECTION)), self._adapter)
            now += self._round(now, chosen, policy, run) + OVERHEAD_SECONDS
            figures = self._task.evaluate(self._adapter)
            run.loss.append(Point(now / HOUR, run.joules / 1e3, run.tried - run.failed, figures))
        return run

    def _round(self, now: float, chosen: Sequence[int], policy: Policy, run: LawlessRun) -> float:
        """Asks the chosen ones and applies the first K updates. Returns how long that took."""
        attempts = sorted((self._attempt(number, now) for number in chosen), key=lambda one: one.seconds)
        done = [attempt for attempt in attempts if attempt.finished]
        used = done[:K]
        if len(used) == K:
            ends = used[-1].seconds
        else:
            ends = max((one.spent for one in attempts), default=0.0)  # all are in, or the deadline is over
            ends = ends if len(done) == len(attempts) else DEADLINE_SECONDS
        success = len(used) >= K_MIN
        self._account(now, attempts, {one.number for one in used} if success else set(), ends, run)
        run.tried, run.failed = run.tried + 1, run.failed + (not success)
        run.started, run.finished = run.started + len(attempts), run.finished + len(done)
        run.seconds.append(ends)
        if success:
            self._learn(used, policy, run)
        return ends

    def _attempt(self, number: int, now: float) -> _Attempt:
        """The adapter down, the steps, the update up: how long, and what comes between."""
        parts, size = self._devices[number].parts, self._task.numbers * _LITTLE.itemsize
        down = parts.link.latency() + parts.link.transfer_seconds(now, size, up=False)
        work = self._steps * self._task.step_tokens / parts.tokens_per_second
        training = parts.thermal.work(now + down, parts.ambient(now), work)[0]
        up = parts.link.latency() + parts.link.transfer_seconds(now + down + training, size, up=True)
        whole = down + training + up
        ended = min(self._devices[number].left(now), self._devices[number].cut_within(now, whole))
        finished = whole <= min(ended, DEADLINE_SECONDS)
        return _Attempt(number, whole, min(whole, ended, DEADLINE_SECONDS), training / whole, finished)

    def _account(
        self, now: float, attempts: Sequence[_Attempt], used: set[int], ends: float, run: LawlessRun
    ) -> None:
        """Energy beyond idling. Work that is not used is waste, also what a late device did until the round ended."""
        for attempt in attempts:
            device = self._devices[attempt.number]
            board, spent = device.parts.board, min(attempt.spent, ends)
            training = spent * attempt.training_share
            joules = (board.load_watts - board.idle_watts) * training + RADIO_WATTS * (spent - training)
            device.parts.thermal.settle(now + spent, device.parts.ambient(now), attempt.training_share)
            device.settle(now + spent, board.idle_watts + joules / max(spent, 1e-9))
            if attempt.number in used:
                run.joules_used += joules
            else:
                run.joules_wasted += joules

    def _learn(self, used: Sequence[_Attempt], policy: Policy, run: LawlessRun) -> None:
        total, weights = np.zeros(self._task.numbers), 0.0
        updates = []
        for attempt in used:
            number = attempt.number
            losses = self._task.losses(number, self._adapter)
            learned = self._task.train(number, self._adapter, self._steps, run.tried, 0)
            weight = min(self._task.samples(number), WEIGHT_SAMPLES_MAX)
            total, weights = total + weight * learned.delta.astype(np.float64), weights + weight
            run.served[number] += 1
            updates.append(Update(number, attempt.seconds, float(np.mean(np.square(losses)))))
        change = (self._rate / weights * total).astype(np.float32)
        self._adapter = (np.frombuffer(self._adapter, _LITTLE) + change).astype(_LITTLE).tobytes()
        policy.learn(updates)


def _foreseen(parts: DeviceParts, ends: float, seed: int, cuts_a_day: float) -> _Device:
    on = first = parts.presence.first(0.0)
    flips, now = [], 0.0
    while now < ends:
        now += parts.presence.next(now, on)
        flips.append(now)
        on = not on
    cuts, stream, at = [], Stream(seed, parts.number, "power-cut"), 0.0
    while cuts_a_day > 0 and at < ends:
        at += stream.exponential(DAY / cuts_a_day)
        cuts.append(at)
    return _Device(parts, first, flips, cuts)


def jain(served: Sequence[int]) -> float:
    """Jain's index of fairness (1984): 1 when all are served alike, 1/n when one is; 0 when nobody is."""
    squares = sum(count * count for count in served)
    return sum(served) ** 2 / (len(served) * squares) if squares else 0.0
