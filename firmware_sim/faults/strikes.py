"""What goes wrong in a world, how often, and to whom: drawn from the seed alone, so that one seed replays one disaster.

Every fault strikes as a Poisson process: `rate` times per device and day, or per day for those of the hub, the broker
and the whole network. Each (fault, device) has a stream of its own, so a device meets the same fate in a fleet of any
size, with or without the other faults. Faults strike in the first part of a run only (`Faults.ends`): the rest is
quiet, and there everything must have come to order again. A fault whose rate is 0 costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Final

from fedge import topics
from fedge.errors import ConfigError
from firmware_sim.faults import tampering
from firmware_sim.faults.kinds import DAY, FAULTS, HUB, Surface
from firmware_sim.world.streams import Stream

__all__ = ["FAULTS", "HUB", "Faults"]

QUIET_SHARE, QUIET_SECONDS_MAX = 0.4, 3 * 3_600.0  # of the run's end, in which nothing goes wrong
BURST_SECONDS: Final = 30.0  # a link that loses one message loses those right behind it
_REMEMBERED: Final = 8  # old announcements that may be replayed
_AT_SAVE: Final = {"power-cut-at-save", "hub-crash-at-save"}
_FORGEABLE: Final = {"open", "result", "announcement"}
_COMMANDS: Final = topics.commands("x").removeprefix(f"{topics.ROOT}/d/x")
_ANNOUNCEMENTS: Final = topics.announcement("")
_NONE: Final = (b"", b"")
_Copies = list[tuple[float, bytes]]


@dataclass(slots=True, eq=False)
class _Strike:
    """A fault that waits for what it can hit, until it `ends`."""

    name: str
    draw: Stream
    ends: float = math.inf


class Faults:
    """The faults of one run. `rates` by name of FAULTS; ConfigError for an unknown name, with the nearest one.

    The world calls `arm` once and then the `on_…` hooks. `counts` says how often each fault has really struck. After
    `ends` seconds (`quiet_from(days)` when left out) nothing goes wrong any more.
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        seed: int,
        devices: int,
        days: float,
        ends: float | None = None,
    ) -> None:
        self.rates = {name: float(rate) for name, rate in sorted(rates.items()) if rate > 0}
        for name in self.rates:
            _require_known(name)
        self.seed, self.devices = seed, devices
        self.ends = quiet_from(days) if ends is None else ends
        self.counts: dict[str, int] = dict.fromkeys(self.rates, 0)
        self._next: dict[str, list[tuple[float, int, Stream]]] = {}  # heaps: when, whom, its draws
        self._waiting: dict[int, list[_Strike]] = {}  # whom -> what will hit its next message
        self._at_save: dict[int, Stream] = {}
        self._at_blob: dict[int, Stream] = {}
        self._old: deque[bytes] = deque(maxlen=_REMEMBERED)  # announcements, oldest first
        self._opens: dict[int, tuple[bytes, bytes]] = {}  # device -> its OPEN before, its newest
        self._foreign = b""  # a device's own envelope: its certificate is not the hub's
        self._replays = bool(self.rates.get("stale-metadata") or self.rates.get("forged-metadata"))

    # ------------------------------------------------------------ when
    def arm(self, world: Surface) -> None:
        """Draws the first strike of every fault; each strike draws the next."""
        for name, rate in self.rates.items():
            numbers: Iterable[int] = range(self.devices) if FAULTS[name].unit == "device" else (HUB,)
            first = []
            for number in numbers:
                draw = Stream(self.seed, number, name)
                when = draw.exponential(DAY / rate)
                if when < self.ends:
                    first.append((when, number, draw))
            heapq.heapify(first)
            self._next[name] = first
            self._schedule(world, name)
        if self.rates:
            world.at(self.ends, lambda world: self._calm())

    def _schedule(self, world: Surface, name: str) -> None:
        if self._next[name]:
            world.at(self._next[name][0][0], lambda world: self._strike(world, name))

    def _strike(self, world: Surface, name: str) -> None:
        when, number, draw = heapq.heappop(self._next[name])
        strike = FAULTS[name].strike
        if strike is not None:
            self.counts[name] += 1
            strike(world, number, draw, self.devices)
        elif name in _AT_SAVE:
            self._at_save[number] = draw
        elif name == "bit-flip":
            self._at_blob[number] = draw
        else:
            waiting = self._waiting.setdefault(number, [])
            if name not in [known.name for known in waiting]:  # hours without a message do not pile losses up
                waiting.append(_Strike(name, draw))
        later = when + draw.exponential(DAY / self.rates[name])
        if later < self.ends:
            heapq.heappush(self._next[name], (later, number, draw))
        self._schedule(world, name)

    def _calm(self) -> None:
        """From now on nothing goes wrong any more."""
        self._waiting.clear()
        self._at_save.clear()
        self._at_blob.clear()

    # ------------------------------------------------------------ what is hit
    def on_save(self, world: Surface, number: int) -> str:
        """Where in this write the power fails: "before", "torn", "after"; empty: it does not."""
        if not self._at_save or number not in self._at_save:
            return ""
        draw = self._at_save.pop(number)
        self.counts["hub-crash-at-save" if number == HUB else "power-cut-at-save"] += 1
        return draw.pick(("before", "torn", "after"))

    def on_blob(self, world: Surface, number: int, data: bytes) -> bytes:
        """The bytes that a download brings."""
        if not self._at_blob or number not in self._at_blob:
            return data
        self.counts["bit-flip"] += 1
        return tampering.flip_bit(data, self._at_blob.pop(number))

    def on_message(self, world: Surface, to: int, topic: str, payload: bytes) -> _Copies | None:
        """What becomes of a message: None, as it is; else its copies, each with its extra delay; none: lost."""
        if self._replays:
            self._remember(to, topic, payload)
        if not self._waiting:
            return None
        number = to if to != HUB else number_of(topic)
        waiting = self._waiting.get(number)
        if waiting is None:
            return None
        for strike in list(waiting):
            if world.now <= strike.ends:
                copies = self._hit(world, strike.name, strike.draw, to, payload)
                if copies is None:
                    continue
                self.counts[strike.name] += 1
                self._goes_on(world, number, strike)
                return copies
            self._ended(number, strike)
        return None

    def _goes_on(self, world: Surface, number: int, strike: _Strike) -> None:
        """A loss takes a few messages in a row; everything else hits once."""
        if strike.name == "loss" and strike.draw.chance(0.6):
            strike.ends = min(strike.ends, world.now + BURST_SECONDS)
        else:
            self._ended(number, strike)

    def _ended(self, number: int, strike: _Strike) -> None:
        waiting = self._waiting[number]
        waiting.remove(strike)
        if not waiting:
            del self._waiting[number]

    def _hit(self, world: Surface, name: str, draw: Stream, to: int, payload: bytes) -> _Copies | None:
        """The copies of a message that fault `name` hits; None when it is not one that it can hit."""
        match name:
            case "loss":
                return []
            case "duplicate":
                return [(0.0, payload), (draw.lognormal(20.0, 2.0), payload)]
            case "reorder":
                return [(draw.uniform(1.0, 120.0), payload)]
        kind = tampering.tag(payload)
        if name == "forged-report" and to == HUB and kind in ("chunk", "ready", "report", "decline"):
            return [(0.0, tampering.forged_report(payload, draw))]
        if name == "forged-metadata" and to != HUB and kind in _FORGEABLE:
            return [(0.0, tampering.forged_envelope(payload, self._foreign, draw)), (5.0, payload)]
        if name == "second-open" and to != HUB and kind == "open":
            second = tampering.second_open(payload, world.hub_signer, draw)
            return [(0.0, payload), (draw.lognormal(20.0, 1.0), second)]
        if name == "stale-metadata" and to != HUB and (old := self._older(to, kind, payload, draw)):
            return [(0.0, payload), (draw.uniform(0.0, 10.0), old)]
        return None

    # ------------------------------------------------------------ what an attacker has kept
    def _remember(self, to: int, topic: str, payload: bytes) -> None:
        if to == HUB:
            if not self._foreign and tampering.tag(payload) == "ready":
                self._foreign = payload
        elif topic.endswith(_COMMANDS):
            if tampering.tag(payload) == "open" and payload != (newest := self._opens.get(to, _NONE)[1]):
                self._opens[to] = newest, payload
        elif topic.startswith(_ANNOUNCEMENTS) and payload not in self._old:
            self._old.append(payload)

    def _older(self, number: int, kind: str, payload: bytes, draw: Stream) -> bytes:
        """What can be replayed behind a message: an older announcement, this device's OPEN before; empty for none."""
        if kind == "announcement":
            old = [known for known in self._old if known != payload]
            return draw.pick(old) if old else b""
        return self._opens.get(number, _NONE)[0] if kind in ("open", "result") else b""


def quiet_from(days: float) -> float:
    """When faults end in a run of so many days, seconds."""
    return days * DAY - min(QUIET_SHARE * days * DAY, QUIET_SECONDS_MAX)


@lru_cache(maxsize=4_096)
def number_of(topic: str) -> int:
    """The number of the device whose topic this is; that of the hub when it is no device's."""
    name = topics.device_of(topic)
    return int(name[1:]) if name[1:].isdigit() else HUB


def _require_known(name: str) -> None:
    if name not in FAULTS:
        near = get_close_matches(name, FAULTS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"One of {', '.join(FAULTS)}."
        raise ConfigError("no such fault", field="faults", value=name, hint=hint)
