"""A failing run made small: fewer kinds of faults, less time, fewer devices, as long as the same rule breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from firmware_sim.parts.hours import DAY
from firmware_sim.rules.cases import Case, Verdict, judge

TRIES_MAX: Final = 60  # runs that making a failure small may take
_DEVICES_MIN: Final = 8
_AFTERMATH: Final = 1.01  # of the time of the failure: how long the shrunk run is


def shrink(case: Case, verdict: Verdict, judged: Callable[[Case], Verdict] | None = None) -> Case:
    """The smallest run found in which the same rule breaks: fewer kinds of faults, less time, fewer devices.

    `judged` runs a case (default: `judge`, every sum exactly). At most TRIES_MAX runs.
    """
    tries = _Tries(case, verdict, judged or (lambda case: judge(case, exact_every=1)))
    tries.offer(days=_days_until(verdict, case))
    _fewer_faults(tries)
    _fewer_devices(tries)
    tries.offer(days=_days_until(tries.verdict, tries.best))
    best, found = tries.best, tries.verdict
    return msgspec.structs.replace(best, invariant=found.invariant, found=found.found)


class _Tries:
    """The smallest failing case so far."""

    def __init__(self, case: Case, verdict: Verdict, judged: Callable[[Case], Verdict]) -> None:
        self.best, self.verdict, self._judged, self.left = case, verdict, judged, TRIES_MAX

    def offer(self, **changes: object) -> bool:
        """Whether the best case still fails in the same way with `changes`; then it is the best."""
        case = msgspec.structs.replace(self.best, **changes)
        if not self.left or case == self.best:
            return False
        self.left -= 1
        verdict = self._judged(case)
        if verdict.invariant != self.verdict.invariant:
            return False
        self.best, self.verdict = case, verdict
        return True

    def without(self, names: list[str]) -> bool:
        """Whether it fails without these faults."""
        faults = {name: rate for name, rate in self.best.scenario.faults.items() if name not in names}
        return self.offer(scenario=msgspec.structs.replace(self.best.scenario, faults=faults))


def _days_until(verdict: Verdict, case: Case) -> float:
    return min(case.days, _AFTERMATH * verdict.at / DAY) if verdict.at else case.days


def _fewer_faults(tries: _Tries) -> None:
    """Halves, then quarters, then single kinds are left out (Zeller and Hildebrandt 2002, without the subsets)."""
    size = len(tries.best.scenario.faults)
    while size := size // 2:
        names = sorted(tries.best.scenario.faults)
        for start in range(0, len(names), size):
            tries.without(names[start : start + size])
    for name in sorted(tries.best.scenario.faults):
        tries.without([name])


def _fewer_devices(tries: _Tries) -> None:
    """Bisection: the fleet's first devices are the same in a smaller fleet."""
    low, high = _DEVICES_MIN, tries.best.devices
    while low < high and tries.left:
        middle = (low + high) // 2
        if tries.offer(devices=middle):
            high = middle
        else:
            low = middle + 1
