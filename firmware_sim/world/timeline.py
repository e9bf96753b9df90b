"""The strip of the time-lapse while it is recorded: what each shown device does, once in every span of time.

All devices are looked at until the first blocs are formed; then whole blocs are chosen, so that their rounds can be
seen, and some devices in none. Earlier looks keep only these. Fleets too large for that show devices evenly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from edge_agent.round import Phase
from firmware_sim.world import outcome
from firmware_sim.world.devices import GONE
from firmware_sim.world.standins import name_of

if TYPE_CHECKING:
    from firmware_sim.world.devices import Device

Item = TypeVar("Item")
COLUMNS: Final = 240
DEVICES: Final = 120
IN_NO_BLOC: Final = 16  # of the devices shown
ALL_MAX: Final = 20_000  # devices of a fleet that is looked at as a whole until blocs are formed


class Timeline:
    """Columns of letters, as outcome.Strip has them; `blocs` is the recorder's bloc of each device, "" for none."""

    def __init__(self, devices: Sequence[Device], blocs: Sequence[str]) -> None:
        self._devices, self._blocs = devices, blocs
        every = len(devices) <= ALL_MAX
        self._shown = list(devices) if every else evenly(devices, DEVICES)
        self._chosen = not every or len(devices) <= DEVICES
        self._columns: list[str] = []
        self.opened = [0] * COLUMNS  # sums in each column, whole fleet

    def look(self, formed: bool) -> None:
        """One column more; `formed`: there are blocs."""
        if formed:
            self._choose()
        self._columns.append("".join(map(letter, self._shown)))

    def count_opened(self, share: float) -> None:
        """A sum was opened when this share of the run was over."""
        self.opened[min(int(share * COLUMNS), COLUMNS - 1)] += 1

    def _choose(self) -> None:
        if self._chosen:
            return
        self._chosen = True
        blocs: dict[str, list[int]] = defaultdict(list)
        for device in self._devices:
            blocs[self._blocs[device.number]].append(device.number)
        outside, whole = blocs.pop("", []), list(blocs.values())
        size = max(map(len, whole), default=1)
        kept = [number for bloc in evenly(whole, (DEVICES - IN_NO_BLOC) // size) for number in bloc]
        kept += evenly(outside, DEVICES - len(kept))
        self._columns = ["".join(column[number] for number in kept) for column in self._columns]
        self._shown = [self._devices[number] for number in kept]

    def strip(self, seconds: float) -> outcome.Strip:
        """All of it, at the end; `seconds` of a column."""
        self._choose()
        return outcome.Strip(
            seconds=seconds,
            devices=[name_of(device.number) for device in self._shown],
            boards=[device.parts.board.name for device in self._shown],
            rows=["".join(column[place] for column in self._columns) for place in range(len(self._shown))],
            opened=self.opened[: len(self._columns)],
            blocs=[self._blocs[device.number] for device in self._shown],
        )


def letter(device: Device) -> str:
    """What a device does now, as outcome.Strip tells it."""
    if device.off:
        return "x" if device.off & GONE else "."
    agent = device.agent
    if agent is None:
        return "i"
    if agent.phase is Phase.TRAINING and device.job is not None:
        return "h" if device.job.throttled else "t"
    if agent.phase is Phase.OFFERED and device.told is not None and not device.told.allowed:
        return "n"
    return _LETTERS[agent.phase]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, spread over all."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


_LETTERS: Final[dict[Phase, str]] = {
    Phase.IDLE: "i",
    Phase.FETCHING: "l",
    Phase.OFFERED: "w",
    Phase.LOADING: "l",
    Phase.TRAINING: "t",
    Phase.INTERRUPTED: "n",
    Phase.SEALING: "s",
    Phase.SENDING: "s",
    Phase.AWAITING: "a",
    Phase.CLOSED: "i",
}
