"""Numbers that were fitted to recorded fleets; `fedge sim fits --traces PATH` prints them with their distances.

The recordings are not shipped. Presence and capacity: 100 phones of FedScale's traces (Apache-2.0), a subset that is
on more than most, kept by AFKD98/FLOAT (Apache-2.0). Rates: HSDPA in Norwegian buses, trams and ferries (Riiser et
al. 2013) and video sessions of Oboe (Akhtar et al. 2018), both from confiwent/Real-world-bandwidth-traces (MIT).
Heat: boards under sbc-bench (Thomas Kaiser, BSD-3-Clause), each in the case its owner had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Sessions and pauses of phones: log-normal, Kolmogorov-Smirnov distances 0.023 and 0.032; share of time on 0.11.
ON_HOURS: Final = 1.36  # median
OFF_HOURS: Final = 0.64
SPREAD: Final = 1.78  # sigma of sessions
PAUSE_SPREAD: Final = 0.86  # sigma of pauses, relative to that of sessions
BETWEEN: Final = 0.22  # share of both variances that lies between devices
TEMPO: Final = 0.88  # correlation, over devices, of long sessions and long pauses

# Rates: medians in kbit/s, sigmas of the logarithm between devices and over time, seconds until a rate is forgotten.
PHONE_KBIT: Final = 6_500.0  # capacities of FedScale, Wi-Fi and mobile together; distance 0.078
PHONE_BETWEEN: Final = 1.16
HSDPA_KBIT: Final = 1_090.0  # distance 0.11
HSDPA_BETWEEN: Final = 0.42
HSDPA_WITHIN: Final = 0.46  # distance 0.059
HSDPA_HOLD_SECONDS: Final = 30.0
VIDEO_WITHIN: Final = 0.28  # Oboe, distance 0.12
VIDEO_HOLD_SECONDS: Final = 22.0


@dataclass(frozen=True, slots=True)
class Heat:
    """Medians over the runs of a board: T' = (room + idle + rise * load - T) / tau, with ROOM_CELSIUS taken off."""

    tau_seconds: float
    idle_kelvin: float
    rise_kelvin: float  # at the load of 7-zip, which draws `watts`
    watts: float
    enclosure: str = "heatsink"  # what such a board mostly has; the results do not say it


# Heat above the air, relative to a small heat sink. A bare Pi 4 was 63 K above the room, the middle one 38: 1.7 times.
# What a fan does is assumed.
ENCLOSURES: Final = {"open": 1.75, "heatsink": 1.0, "fan": 0.5}

ROOM_CELSIUS: Final = 22.0  # assumed: no room was measured
HEAT: Final = {
    # Eight runs, rises 11.6 to 32; typical error 1.3 K; 7.46 W at the wall.
    "pi5": Heat(48.0, 23.7, 15.3, 7.46),
    # Nine runs, rises up to 25; 1.4 K; 5.7 W at the wall.
    "pi4": Heat(57.0, 22.7, 15.2, 5.7),
    # Three runs of a 3 B+; 0.9 K; watts of pidramble.com.
    "pi3": Heat(86.0, 33.6, 19.0, 5.1, "open"),
    # Two runs, rises 20 and 60 (the second with a time constant too long to trust): the first; 2.6 W at the wall.
    "zero2w": Heat(25.0, 27.7, 20.2, 2.6, "open"),
    # One run each; the Orin with its fan, its processor alone, at watts that are assumed.
    "jetson-nano": Heat(185.0, 10.6, 17.5, 10.0),
    "orin-nano": Heat(43.0, 26.3, 4.5, 9.0),
}
