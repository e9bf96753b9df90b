"""Who, when, how much: pure functions of public facts. The state that they are applied to is in `hub.admission`.

The rules, each measured against its alternatives on traces of real availability:

- *Whole-bloc gate.* A bloc is opened when all its members are READY, here, and expect to stay 1.25 times as long as
  their work takes. The gate, not a long window, makes the yield: 0.999 of finished work is opened, 0.66 without it.
- *Short work.* Each member gets as many steps as fit `work_seconds`, at least a floor of them; where even the floor
  takes longer, it adapts fewer layers from the top. Short rounds finish before a device leaves.
- *Rest and quota.* A bloc rests between rounds, and no bloc is opened much more often than the mean, so that the
  devices that are always on do not become the model.
- *Longest unserved first*, while no more than a bounded number of devices train. Ties go by a hash of the bloc's
  name under the announced beacon.

Nobody can be aimed at: an order depends on facts that devices say in public, on when a bloc was last served, and on a
beacon that was fixed before. No loss, gradient, label or exact count of one device is looked at. The bias that is left
is bounded: a hub may leave a READY out or delay an OPEN, but whatever it opens is a whole bloc of the announced
partition, and in it no member has more than twice its even share of the work (`balance`; every device checks it).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import msgspec

from fedge import limits
from fedge.formation import transfer_seconds
from fedge.messages import Ready

WORK_FLOOR: Final = 0.15  # of the planned steps, so that no slow board is idled out of the sum
DEPTH_FLOOR: Final = 0.25  # of the layers; fewer save little time, since the forward pass stays whole
STAY_MARGIN: Final = 1.25  # a stay must be this many times the planned seconds
QUOTA_SLACK: Final = 2  # rounds above quota x mean, so that a young campaign can move
RETRY_SECONDS: Final = 30.0  # rest of a bloc whose last two rounds came to nothing; then doubled
RETRY_SECONDS_MAX: Final = 3_600.0
LIVE_SECONDS: Final = 2 * 3_600.0  # a bloc that was opened within these is live
LIVE_SHARE_MIN: Final = 0.25  # with fewer live blocs nothing is opened: the few would become the model
STARVE_AFTER_SECONDS: Final = 2 * 3_600.0  # from the first formation; before, nobody had a turn yet
CHECKIN_SECONDS: Final = 60  # of a waiting device in a small fleet
CHECKIN_SECONDS_CALM: Final = 960  # four READYs an hour are 2 KB: nothing on a metered link
CHECKINS_PER_SECOND: Final = 1  # up to there; a fleet that is larger still takes up to
CHECKINS_PER_SECOND_MAX: Final = 200  # from all devices, however many
PRESENT_CHECKINS: Final = 3  # a waiting device is here while it was heard within so many check-ins


# ---------------------------------------------------------------- how much work
class Work(msgspec.Struct, frozen=True, gc=False):
    """One member's part of a round: local steps, and adapted layers from the top (0 = all)."""

    steps: int
    depth: int = 0


def plan_work(ready: Ready, *, steps: int, work_seconds: float, layers: int, adapter_bytes: int) -> Work:
    """As many of `steps` as fit `work_seconds` with the transfer both ways, never below the floor.

    Where the floor does not fit either, fewer layers are adapted; `layers` 0 says that their number is not known.
    """
    pace = ready.facts.seconds_per_step
    if pace <= 0:
        return Work(steps)
    least = max(1, math.ceil(WORK_FLOOR * steps))
    left = max(0.0, work_seconds - transfer_seconds(ready, 2 * adapter_bytes))
    if left >= least * pace or not layers:
        return Work(max(least, int(min(steps, left / pace))))  # a tiny pace divides to infinity
    # A step at depth d takes pace x (1/3 + 2/3 d/layers): the forward pass is a third of it.
    depth = int(layers * (left / (least * pace) - 1 / 3) * 3 / 2)
    return Work(least, max(depth, math.ceil(DEPTH_FLOOR * layers)) % layers)


def planned_seconds(ready: Ready, work: Work, *, layers: int, adapter_bytes: int) -> float:
    """How long a member's work takes, transfer included, as far as its facts tell."""
    part = work.depth / layers if work.depth and layers else 1.0
    training = work.steps * ready.facts.seconds_per_step * (1 / 3 + 2 / 3 * part)
    return training + transfer_seconds(ready, 2 * adapter_bytes)


def balance(works: Sequence[Work], layers: int) -> tuple[Work, ...]:
    """Cuts plans down until nobody has more than 2/k of the steps, of the depth, or of both multiplied."""
    full = max(layers, 1)
    depths = _capped([work.depth or full for work in works])
    steps = [work.steps for work in works]
    while True:
        steps = _capped(steps)
        products = [count * depth for count, depth in zip(steps, depths, strict=True)]
        most = int(limits.PLAN_SHARE_MAX * sum(products) / len(products))
        if max(products) <= most:
            break
        steps = [max(1, min(count, most // depth)) for count, depth in zip(steps, depths, strict=True)]
    return tuple(Work(count, depth % full) for count, depth in zip(steps, depths, strict=True))


def _capped(values: list[int]) -> list[int]:
    """The values cut at the largest cap under which none is above its allowed share of the sum."""
    low, high = min(values), max(values)
    while low < high:
        cap = (low + high + 1) // 2
        total = sum(min(value, cap) for value in values)
        low, high = (cap, high) if cap * len(values) <= limits.PLAN_SHARE_MAX * total else (low, cap - 1)
    return [min(value, low) for value in values]


# ---------------------------------------------------------------- who may
def why_not(ready: Ready, seconds: float) -> str:
    """Why this READY gives its bloc no member, in the words that people read; empty when it does."""
    facts, stay = ready.facts, ready.stay_seconds
    if not facts.samples_bucket:
        return "no data"
    if not facts.rounds_left:
        return "rounds spent"
    if stay <= 0:
        return _not_now(ready)
    return "short stay" if stay <= STAY_MARGIN * seconds else ""


def _not_now(ready: Ready) -> str:
    facts = ready.facts
    if facts.hot:
        return "hot"
    if facts.power == "battery" and facts.charge_quarter <= 1:
        return "low battery"
    return "metered" if facts.metered else "not now"


def rest(rest_seconds: float, sat_out: int) -> float:
    """Seconds until a bloc may be opened again: longer and longer when nothing comes of its rounds."""
    if sat_out < 2:
        return rest_seconds
    return max(rest_seconds, min(RETRY_SECONDS * 2.0 ** min(sat_out - 2, 30), RETRY_SECONDS_MAX))


def within_quota(opened: int, mean: float, quota: float) -> bool:
    """Whether a bloc that was opened so often may be opened again; `quota` 0 is no bound."""
    return not quota or opened <= quota * mean + QUOTA_SLACK


def quota_mean(opened: int, quota: float) -> float:
    """The mean at which a bloc that has its quota may be opened again."""
    return (opened - QUOTA_SLACK) / quota


# ---------------------------------------------------------------- in which order, how many
def place(beacon: bytes, bloc: str) -> bytes:
    """What breaks ties between blocs: public once the beacon is, and nobody's choice."""
    return hashlib.sha256(beacon + bloc.encode()).digest()[:8]


def order(ended_at: float, tie: bytes) -> tuple[float, bytes]:
    """Sorts blocs that are ready: longest unserved first, then by `place`."""
    return ended_at, tie


def has_room(training: int, most: int) -> bool:
    """Whether one more bloc may train: while fewer than `most` devices do (0 = no bound).

    So the last bloc may pass the bound by k - 1. Asking for room for all k would leave k / 2 places idle on average.
    """
    return not most or training < most


def side_by_side(blocs: int, devices_max: int, k: int) -> int:
    """How many of the blocs can train at one time, at least 1: what an opened sum is divided by (ADR 6)."""
    return min(blocs, max(1, devices_max // k)) if devices_max else max(1, blocs)


def is_starving(live: int, unfinished: int) -> bool:
    """Whether too few of the blocs that have rounds left are live."""
    return live < LIVE_SHARE_MIN * unfinished


def checkin_seconds(devices: int, now: int) -> int:
    """How often a waiting device should say READY: 60 x a power of two, so that the fleet says a few a second.

    A lost device shows by its last will within seconds; check-ins only find what hangs. `now` is the figure in force,
    kept while halving it would come close to the bound again.
    """
    wanted = CHECKIN_SECONDS
    while devices > _checkins_per_second(wanted) * wanted:
        wanted *= 2
    nearly = devices > 0.75 * _checkins_per_second(wanted) * wanted
    return now if nearly and now == 2 * wanted else wanted


def _checkins_per_second(every: int) -> int:
    return CHECKINS_PER_SECOND if every < CHECKIN_SECONDS_CALM else CHECKINS_PER_SECOND_MAX
