"""What the board can do now, judged by its owner's policy: coarse public facts, how long it will stay, and why not.

Pure: the real driver reads a board, the simulated one its model, and both ask here. What leaves the device is coarse
(steps, quarters, powers of two) and holds its value while a reading wavers around an edge, because every change is
one more signed message. The reason why a device may not work is its owner's alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal

import msgspec

from edge_agent.effects import Conditions
from edge_agent.policy import Policy
from fedge.formation import bucket
from fedge.messages import Facts

STAY_SECONDS_MAX: Final = 86_400  # nobody promises more than a day
STAY_STEPS: Final = (
    60,
    300,
    600,
    1_200,
    3_600,
    14_400,
    STAY_SECONDS_MAX,
)  # a stay is rounded down to one of them
MEMORY_STEP_MB: Final = 256
HISTORY_SHARES: Final = (0.50, 0.70, 0.85, 0.95)

# A device stays about as long again as it has been up; one that was nearly always on is trusted from the start.
_STAY_BY_HISTORY: Final = (600, 600, 3_600, 14_400, STAY_SECONDS_MAX)
BATTERY_SECONDS: Final = 14_400.0  # a full battery under training, roughly; coarse is enough for whole steps
_COOLER: Final = 5.0  # kelvin below the owner's bound before a board that was above it counts as cool
_SLACK: Final = 0.25  # of a step: how far a reading may leave its step before another step is said
_DAY_SECONDS: Final = 86_400
_NEVER: Final = float("inf")


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One look at the board. `share_on` is of the last 7 days; `upload_kbit` 0 = not known yet."""

    power: Literal["mains", "charging", "battery"] = "mains"
    charge: float = 1.0
    celsius: float = 0.0  # 0 = no sensor
    hot: bool = False  # the board throttles itself now
    metered: bool = False
    free_memory_mb: int = 0
    up_seconds: float = 0.0
    share_on: float = 0.0
    upload_kbit: float = 0.0


def judge(
    policy: Policy,
    reading: Reading,
    facts: Facts,
    now: float,
    *,
    bytes_today: int = 0,
    rounds_spent: int = 0,
    local_hour: float,
) -> Conditions:
    """Whether the owner lets the device work at Unix time `now`, and what may be known of it.

    `facts` are those last said, or as first measured; what no reading tells is kept. `local_hour` is 0 to 24.
    """
    left = not 0 < policy.rounds_max <= rounds_spent
    too_warm = _over(policy.celsius_max, reading.celsius, was=facts.hot)
    known = _coarse(reading, facts, hot=reading.hot or too_warm, rounds_left=left)
    opens, closes = _hours(policy.hours)
    until_closed = _NEVER if opens == closes else _until(closes, local_hour)
    reason = ""
    if not left:
        reason = f"all {policy.rounds_max} rounds that the owner allows are spent"
    elif _until(opens, local_hour) < until_closed < _NEVER:
        reason = f"outside the owner's hours {policy.hours}"
    elif reading.power == "battery" and reading.charge < policy.battery_min:
        reason = f"the battery is below {policy.battery_min:.0%}"
    elif reading.metered and not policy.metered:
        reason = "the network is metered"
    elif too_warm:
        reason = f"the board is above {policy.celsius_max:g} °C"
    elif 0 < policy.bytes_per_day_max <= bytes_today:
        hours = -(-(_DAY_SECONDS - now % _DAY_SECONDS) // 3_600)
        reason = f"all {policy.bytes_per_day_max:,} bytes of today are spent; again in {hours:.0f} h"
    if reason:
        return Conditions(False, 0, known, reason)
    return Conditions(True, _stay(policy, reading, known, until_closed), known)


# ---------------------------------------------------------------- what may be known
def _coarse(reading: Reading, facts: Facts, *, hot: bool, rounds_left: bool) -> Facts:
    """`facts` with all buckets as the reading has them; the same object when nothing moved."""
    memory = _held(facts.memory_mb_step / MEMORY_STEP_MB, reading.free_memory_mb / MEMORY_STEP_MB)
    quarter = 4 if reading.power == "mains" else min(4, _held(facts.charge_quarter, reading.charge * 4))
    link = facts.link_bucket if reading.upload_kbit <= 0 else link_bucket(reading.upload_kbit, facts)
    history = bucket(reading.share_on, HISTORY_SHARES)
    found = (
        memory * MEMORY_STEP_MB,
        reading.metered,
        reading.power,
        quarter,
        hot,
        link,
        history,
        rounds_left,
    )
    said = (
        facts.memory_mb_step,
        facts.metered,
        facts.power,
        facts.charge_quarter,
        facts.hot,
        facts.link_bucket,
        facts.history_bucket,
        facts.rounds_left,
    )
    if found == said:
        return facts
    return msgspec.structs.replace(
        facts,
        memory_mb_step=memory * MEMORY_STEP_MB,
        metered=reading.metered,
        power=reading.power,
        charge_quarter=quarter,
        hot=hot,
        link_bucket=link,
        history_bucket=history,
        rounds_left=rounds_left,
    )


def link_bucket(upload_kbit: float, facts: Facts) -> int:
    """Bit length of the upload rate, 1 to 32; that of `facts` while the rate is within a quarter of its ends."""
    said = facts.link_bucket
    if said and 2.0 ** (said - 1) * (1 - _SLACK) <= upload_kbit < 2.0**said * (1 + _SLACK):
        return said
    return min(32, max(1, int(upload_kbit).bit_length()))


def _held(said: float, steps: float) -> int:
    """`steps` rounded down, or the step that was said while `steps` is within a quarter step of it."""
    if said and said - _SLACK <= steps < said + 1 + _SLACK:  # 0 may be a measure that was never taken
        return int(said)
    return max(0, int(steps))


# ---------------------------------------------------------------- what the owner allows
def _over(bound: float, celsius: float, *, was: bool) -> bool:
    return 0 < bound < celsius + (_COOLER if was else 0.0)


@lru_cache(maxsize=64)
def _hours(text: str) -> tuple[float, float]:
    """`22:00-06:00` as (22.0, 6.0), and none as (0.0, 0.0); the policy has checked the form."""
    if not text:
        return 0.0, 0.0
    begin, end = (int(part[:2]) + int(part[3:]) / 60 for part in text.split("-"))
    return begin, end


def _until(hour: float, local_hour: float) -> float:
    """Seconds until the clock shows `hour`; a whole day when it does now."""
    return (((hour - local_hour) % 24) or 24.0) * 3_600


def _stay(policy: Policy, reading: Reading, facts: Facts, until_closed: float) -> int:
    """Seconds that the device expects to stay, rounded down to a step; 0 when it is about to go."""
    stay = max(reading.up_seconds, _STAY_BY_HISTORY[facts.history_bucket])
    if reading.power == "battery":
        stay = min(stay, (reading.charge - policy.battery_min) * BATTERY_SECONDS)
    step = bucket(min(stay, until_closed), STAY_STEPS)
    return STAY_STEPS[step - 1] if step else 0
