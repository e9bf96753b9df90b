"""Schedulers that ours is measured against, re-implemented from their papers and sources, without the bloc law.

`random`: Bonawitz et al. 2019 (arXiv 1902.01046), section 2.2. `oort`: Lai et al. 2021 (arXiv 2010.06081), as its
oort.py and FedScale code it. `choice`: Power-of-Choice, Cho et al. 2020 (arXiv 2010.01243), pi_pow-d, whose candidates
tell their losses here at no cost. All ask for 1.3 times what they need and keep the first that come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from firmware_sim.parts.draw import DeviceParts
from firmware_sim.scenario import Scenario
from firmware_sim.study.lawless import Lawless, LawlessRun, Policy, Transparent, Update
from firmware_sim.world.streams import Stream


class Random:
    """Everybody that is there, with the same chance."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def choose(self, online: Sequence[int], want: int, adapter: bytes) -> list[int]:
        return self._stream.shuffled(online)[:want]

    def learn(self, updates: Sequence[Update]) -> None:
        """Nothing is remembered."""


class PowerOfChoice:
    """Candidates by their share of the data, and of them those with the highest loss."""

    CANDIDATES: Final = 2.0  # as many as are wanted, times this

    def __init__(self, task: Transparent, stream: Stream) -> None:
        self._task, self._stream = task, stream

    def choose(self, online: Sequence[int], want: int, adapter: bytes) -> list[int]:
        sizes = [float(self._task.samples(number)) for number in online]
        candidates = weighted_sample(online, sizes, round(self.CANDIDATES * want), self._stream)
        losses = {number: float(self._task.losses(number, adapter).mean()) for number in candidates}
        return sorted(candidates, key=lambda number: -losses[number])[:want]

    def learn(self, updates: Sequence[Update]) -> None:
        """Losses are asked for anew each time."""


class Oort:
    """Statistical utility, |B| sqrt(mean loss^2), over system speed; explores less and less.

    A device's score is its utility, scaled between the lowest and a clipped highest, plus a bonus for staleness, times
    (T / t)^2 when its round takes t > T. T is a percentile of all durations that the pacer moves.
    """

    EXPLORE: Final = (0.9, 0.98, 0.3)  # at first, its decay each round, at least
    PERCENTILE: Final = 30.0  # of durations: the preferred round
    PACER_ROUNDS: Final = 20
    PACER_STEP: Final = 5.0
    CUT_OFF: Final = 0.95
    CLIP: Final = 0.9
    PENALTY: Final = 2.0
    POOL: Final = 5  # unexplored ones are drawn from the best of so many times what is wanted

    def __init__(self, sizes: Sequence[float], seconds: Sequence[float], stream: Stream) -> None:
        """`sizes`: samples that a round uses; `seconds`: a round's estimate, both of every device."""
        self._sizes, self._seconds, self._utility = list(sizes), list(seconds), list(sizes)
        self._stream = stream
        self._last: dict[int, int] = {}  # device -> the round of its last update
        self._explore, self._percentile, self._round = self.EXPLORE[0], self.PERCENTILE, 0
        self._history: list[float] = []
        self._exploited: list[int] = []
        self._succeeded: set[int] = set()

    def choose(self, online: Sequence[int], want: int, adapter: bytes) -> list[int]:
        self._round += 1
        self._pace()
        self._explore = max(self._explore * self.EXPLORE[1], self.EXPLORE[2])
        preferred = self._preferred()
        scores = self._scores([number for number in online if number in self._last], preferred)
        self._exploited = self._exploit(scores, int(want * (1 - self._explore)))
        chosen = self._exploited + self._unexplored(online, want - len(self._exploited), preferred)
        rest = sorted(set(online) - set(chosen))
        return (chosen + self._stream.shuffled(rest))[:want]

    def learn(self, updates: Sequence[Update]) -> None:
        for update in updates:
            self._utility[update.number] = self._sizes[update.number] * math.sqrt(update.squared_loss)
            self._seconds[update.number] = update.seconds
            self._last[update.number] = self._round
            self._succeeded.add(update.number)

    def _pace(self) -> None:
        """Moves the preferred duration when the utility that was gathered stands still, or jumps."""
        gained = [self._utility[number] for number in self._exploited if number in self._succeeded]
        self._history.append(sum(gained) / (1e-4 + len(gained)))
        self._succeeded = set()
        rounds = self.PACER_ROUNDS
        if self._round < 2 * rounds or self._round % rounds:
            return
        before, after = sum(self._history[-2 * rounds : -rounds]), sum(self._history[-rounds:])
        if abs(after - before) <= 0.1 * abs(before):
            self._percentile = min(100.0, self._percentile + self.PACER_STEP)
        elif abs(after - before) >= 5 * abs(before):
            self._percentile = max(self.PACER_STEP, self._percentile - self.PACER_STEP)

    def _preferred(self) -> float:
        if self._percentile >= 100:
            return math.inf
        place = min(int(len(self._seconds) * self._percentile / 100), len(self._seconds) - 1)
        return sorted(self._seconds)[place]

    def _speed(self, number: int, preferred: float) -> float:
        seconds = self._seconds[number]
        return (preferred / seconds) ** self.PENALTY if seconds > preferred else 1.0

    def _scores(self, known: Sequence[int], preferred: float) -> dict[int, float]:
        if not known:
            return {}
        utilities = sorted(self._utility[number] for number in known)
        clip = utilities[min(int(len(utilities) * self.CLIP), len(utilities) - 1)]
        lowest = utilities[0] * 0.999
        span = max(utilities[-1] - lowest, 1e-4)

        def score(number: int) -> float:
            stale = math.sqrt(0.1 * math.log(max(self._round, 2)) / max(self._last[number], 1))
            useful = (min(self._utility[number], clip) - lowest) / span
            return (useful + stale) * self._speed(number, preferred)

        return {number: score(number) for number in known}

    def _exploit(self, scores: dict[int, float], want: int) -> list[int]:
        want = min(want, len(scores))
        if want <= 0:
            return []
        order = sorted(scores, key=lambda number: -scores[number])
        cut = self.CUT_OFF * scores[order[min(want, len(order) - 1)]]
        pool = [number for number in order if scores[number] >= cut]
        return weighted_sample(pool, [scores[number] + 1e-9 for number in pool], want, self._stream)

    def _unexplored(self, online: Sequence[int], want: int, preferred: float) -> list[int]:
        new = [number for number in online if number not in self._last]
        merit = {number: self._sizes[number] * self._speed(number, preferred) for number in new}
        best = sorted(new, key=lambda number: -merit[number])[: self.POOL * want]
        return weighted_sample(best, [merit[number] + 1e-9 for number in best], want, self._stream)


def weighted_sample(items: Sequence[int], weights: Sequence[float], count: int, stream: Stream) -> list[int]:
    """At most `count` different items, drawn one after the other by weight (Efraimidis and Spirakis 2006)."""
    keys = [stream.exponential(1.0) / weight for weight in weights]
    order = sorted(range(len(items)), key=keys.__getitem__)
    return [items[place] for place in order[:count]]


# ---------------------------------------------------------------- runs
_NAMES: Final[dict[str, float]] = {"random": 1.0, "random-rate-2": 2.0, "oort": 1.0, "choice": 1.0}
BASELINES: Final = tuple(_NAMES)


def run_baseline(
    name: str, scenario: Scenario, fleet: Callable[[], Sequence[DeviceParts]], seed: int, task: Transparent
) -> LawlessRun:
    """The scenario's fleet under one of BASELINES; `random-rate-2` is `random` with a server rate of 2.

    `fleet` draws anew, because parts have a state.
    """
    devices = fleet()
    policy = _policy(name, devices, scenario.campaign.steps, task, Stream(seed, name))
    return Lawless(scenario, devices, seed, task, _NAMES[name]).run(name, policy)


def _policy(name: str, fleet: Sequence[DeviceParts], steps: int, task: Transparent, stream: Stream) -> Policy:
    if name == "choice":
        return PowerOfChoice(task, stream)
    if name == "oort":
        batch = task.train(0, task.first(), 1, 0, 0).labels
        sizes = [float(min(task.samples(number), steps * batch)) for number in range(len(fleet))]
        seconds = [steps * task.step_tokens / parts.tokens_per_second for parts in fleet]
        return Oort(sizes, seconds, stream)
    return Random(stream)
