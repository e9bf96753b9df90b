"""Board classes: what a device of each kind can do, draws and costs. Measured where a source is named, else derived.

Sources: [top500] J. Geerling's top500-benchmark, HPL and watts at load; [sbc] T. Kaiser's sbc-bench results, memory
bandwidth and 7-zip; [pidramble] power figures of pidramble.com. A LoRA step is about three forward passes, so tokens
per second of training = prefill GFLOP/s / (6 x parameters). No LoRA training figure of these boards is published:
the first run on hardware replaces `tokens_per_second`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from fedge.errors import ConfigError
from firmware_sim.parts.fitted import ENCLOSURES, HEAT, Heat


@dataclass(frozen=True, slots=True)
class BoardClass:
    """One kind of board. Watts are of the whole board; `memory_mb` is what the system sees."""

    name: str
    label: str
    cores: int
    memory_mb: int
    tokens_per_second: float  # of a LoRA step of a 135M model
    idle_watts: float
    load_watts: float  # all cores, or the GPU where training uses it
    throttle_celsius: float  # from here the clock goes down
    aes: bool  # AES instructions: without them masks are made with ChaCha20
    price: float  # rough list price in US dollars, board alone
    idle_kelvin: float  # above the air while idle, with a small heat sink
    load_kelvin: float  # more than that at `load_watts`
    heat_seconds: float  # time constant of warming up


# The Broadcom chips before the Pi 5 have no AES instructions. Pi firmware throttles from 80 to 85 degrees.
_MADE: Final = (
    # 4 x A53 1.0 GHz; 2.1 W [top500], 427 MiB seen and 3,030 MIPS [sbc]; idle 0.6 W (CNX). 8 to 10 tokens/s.
    ("zero2w", "Pi Zero 2 W", 4, 427, 9.0, 0.6, 2.1, 80.0, False, 15.0),
    # 4 x A53 1.4 GHz, the Zero's core 1.4 times as fast; 1.9 W and 5.1 W [pidramble].
    ("pi3", "Pi 3 B+", 4, 906, 12.6, 1.9, 5.1, 80.0, False, 35.0),
    # 4 x A72 1.8 GHz; 11.9 GFLOP/s at 7.2 W [top500]; prefill 22 GFLOP/s; idle 2.7 W.
    ("pi4", "Pi 4", 4, 3_800, 27.0, 2.7, 7.2, 80.0, False, 55.0),
    # 4 x A76 2.4 GHz; 35.2 GFLOP/s at 12.7 W [top500]; prefill 99 GFLOP/s; idle 2.7 to 3.3 W.
    ("pi5", "Pi 5", 4, 7_900, 120.0, 3.0, 12.7, 80.0, True, 80.0),
    # 4 x A57 1.48 GHz, 5,260 MIPS [sbc]; trained on its processor, in the 10 W mode; throttles at 97 (L4T guide).
    ("jetson-nano", "Jetson Nano", 4, 3_900, 30.0, 2.0, 10.0, 97.0, True, 149.0),
    # 6 x A78AE 1.51 GHz; 1,000 to 1,500 tokens/s on its GPU in the 15 W mode.
    ("orin-nano", "Jetson Orin Nano", 6, 7_400, 1_200.0, 5.0, 15.0, 87.0, True, 249.0),
    # 4 x Gracemont with AVX2 (N100): about 1.5 times a Pi 5.
    ("gateway", "x86 gateway", 4, 15_700, 180.0, 7.0, 25.0, 95.0, True, 180.0),
)
# No run of a gateway was recorded: a large passive heat sink.
_GATEWAY_HEAT: Final = Heat(180.0, 15.0, 30.0, 25.0)


def _with_heat(
    name: str,
    label: str,
    cores: int,
    memory_mb: int,
    tokens_per_second: float,
    idle_watts: float,
    load_watts: float,
    throttle_celsius: float,
    aes: bool,
    price: float,
) -> BoardClass:
    """Training multiplies matrices and draws more than the runs that were recorded: the rise goes with the watts."""
    heat = HEAT.get(name, _GATEWAY_HEAT)
    recorded = ENCLOSURES[heat.enclosure]
    load_kelvin = heat.rise_kelvin / recorded * (load_watts - idle_watts) / (heat.watts - idle_watts)
    return BoardClass(
        name,
        label,
        cores,
        memory_mb,
        tokens_per_second,
        idle_watts,
        load_watts,
        throttle_celsius,
        aes,
        price,
        heat.idle_kelvin / recorded,
        load_kelvin,
        heat.tau_seconds,
    )


BOARDS: Final[dict[str, BoardClass]] = {row[0]: _with_heat(*row) for row in _MADE}


def board(name: str) -> BoardClass:
    """The class called `name`; ConfigError with the nearest name."""
    if name in BOARDS:
        return BOARDS[name]
    near = get_close_matches(name, BOARDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the boards are {', '.join(BOARDS)}"
    raise ConfigError("there is no such board", field="boards", value=name, hint=hint)
