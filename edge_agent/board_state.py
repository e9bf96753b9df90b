"""What the board is doing now, read from the kernel's files without root, in well below a millisecond.

Nothing here raises for what is missing or garbage: a board without a battery is on mains, one without a sensor is not
warm, a container has none of it. `root` is the root of the file system, so that tests feed trees of other boards.

Not read on purpose: the Pi's `get_throttled` (deprecated, the kernel warns with a backtrace for every look); its
voltage alarm and the clocks say the same. `vcgencmd` and jtop need a group or a service that we do not ask for.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Final, Literal

from edge_agent.conditions import Reading
from edge_agent.metered import Metered
from edge_agent.resources import free_memory_mb

Power = Literal["mains", "charging", "battery"]

_CELSIUS: Final = (-40.0, 125.0)  # anything else is a sensor that is not there
_WARM_CELSIUS: Final = 60.0  # below it a slow clock is the governor's choice
_SLOWED: Final = 0.9  # of the highest clock, under load: throttled
_FALSE_ZONES: Final = frozenset({"PMIC-Die"})  # of Jetsons: a constant
_LOOKS_PER_SEARCH: Final = 60  # sensors and batteries may come and go; folders are listed this seldom


class Board:
    """One board's kernel files under `root`; `metered` answers for the network."""

    def __init__(self, root: Path = Path("/"), metered: Metered | None = None) -> None:
        self._root = root
        self._metered = metered or Metered()
        self._looks = 0
        self._search()

    def read(
        self, *, share_on: float, up_seconds: float, upload_kbit: float, busy: bool = False, own_mb: int = 0
    ) -> Reading:
        """The board now. The first three come from the agent's own records; a worker that is `busy` explains a fast
        clock, and the `own_mb` of memory that it holds would be free again without it.
        """
        self._looks += 1
        if self._looks % _LOOKS_PER_SEARCH == 0:
            self._search()
        power, charge = self._power()
        celsius = self._celsius()
        return Reading(
            power=power,
            charge=charge,
            celsius=celsius,
            hot=self._throttled(busy and celsius >= _WARM_CELSIUS),
            metered=self._metered.now(),
            free_memory_mb=free_memory_mb(self._root) + own_mb,
            up_seconds=up_seconds,
            share_on=share_on,
            upload_kbit=upload_kbit,
        )

    def up_seconds(self) -> float:
        """Since the board started; 0 when the kernel does not say."""
        return max(0.0, _first_number(_text(self._root / "proc/uptime")) or 0.0)

    # ------------------------------------------------------------ where things are
    def _search(self) -> None:
        kernel = self._root / "sys/class"
        zones = sorted((kernel / "thermal").glob("thermal_zone*"))
        self._zones = [zone / "temp" for zone in zones if _text(zone / "type") not in _FALSE_ZONES]
        coolers = (kernel / "thermal").glob("cooling_device*")
        self._brakes = [cooler / "cur_state" for cooler in coolers if _slows_processor(cooler)]
        chips = (kernel / "hwmon").glob("hwmon*")
        self._alarms = [chip / "in0_lcrit_alarm" for chip in chips if _text(chip / "name") == "rpi_volt"]
        self._clocks = list((self._root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
        supplies = list((kernel / "power_supply").glob("*"))
        self._batteries = [supply for supply in supplies if _is_own_battery(supply)]
        self._plugs = [supply / "online" for supply in supplies if _text(supply / "type") != "Battery"]

    # ------------------------------------------------------------ one look
    def _power(self) -> tuple[Power, float]:
        if not self._batteries:
            return "mains", 1.0
        states = {_text(battery / "status") for battery in self._batteries}
        charge = sum(map(_charge, self._batteries)) / len(self._batteries)
        if "Discharging" in states:
            return "battery", charge
        if "Charging" in states:
            return "charging", charge
        if "Full" in states or any((_number(plug) or 0) > 0 for plug in self._plugs):
            return "mains", charge
        return "battery", charge

    def _celsius(self) -> float:
        low, high = _CELSIUS
        found = ((_number(zone) or 0.0) / 1_000 for zone in self._zones)
        return max((celsius for celsius in found if low < celsius < high), default=0.0)

    def _throttled(self, under_load: bool) -> bool:
        """Slowed down by heat or by a weak supply, as far as anybody may read it."""
        if any((_number(path) or 0) > 0 for path in chain(self._alarms, self._brakes)):
            return True
        return under_load and any(map(_is_slow, self._clocks))


def _slows_processor(cooler: Path) -> bool:
    """A fan that turns is no sign of throttling; a clock that is held down is."""
    kind = _text(cooler / "type").lower()
    return "cpufreq" in kind or kind == "processor"


def _is_own_battery(supply: Path) -> bool:
    return _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device"  # not that of a mouse


def _charge(battery: Path) -> float:
    """0 to 1; 0 when the battery does not say, so that nobody drains what cannot be seen."""
    percent = _number(battery / "capacity")
    if percent is not None:
        return min(1.0, max(0.0, percent / 100))
    for kind in ("energy", "charge"):
        now, full = _number(battery / f"{kind}_now"), _number(battery / f"{kind}_full")
        if now is not None and full:
            return min(1.0, max(0.0, now / full))
    return 0.0


def _is_slow(clock: Path) -> bool:
    now, most = _number(clock / "scaling_cur_freq"), _number(clock / "scaling_max_freq")
    return now is not None and most is not None and 0 < now < _SLOWED * most


def _number(path: Path) -> float | None:
    return _first_number(_text(path))


def _first_number(text: str) -> float | None:
    try:
        return float(text.split(None, 1)[0])
    except (IndexError, ValueError):
        return None


def _text(path: Path) -> str:
    """The first line of a kernel file, or nothing. A sensor that is there may still refuse to be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(handle, 256).decode("utf-8", "replace").strip()
    except OSError:
        return ""
    finally:
        os.close(handle)
