"""Boards that people ask about: how much memory they have and how fast they train, for plans made without one.

`firmware_sim/parts/board.py` has the same boards with their watts, heat and prices, and the sources of the figures; a
test keeps the two equal. No training speed of these boards is published, so the figures are derived from what their
processors were measured to multiply: take them as within a factor of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from fedge.errors import UsageError

# Of the model that `tokens_per_second` is about, embedding included.
PARAMETERS_OF_THE_SPEED: Final = 134_515_008
SYSTEM_BYTES: Final = 250_000_000  # what an idle system without a desktop keeps for itself


@dataclass(frozen=True, slots=True)
class Board:
    """`memory_bytes` is what the system sees; `tokens_per_second` is of a LoRA step of a 135M model, all layers."""

    name: str
    label: str
    memory_bytes: int
    tokens_per_second: float

    def step_seconds(self, parameters: int, tokens: int) -> float:
        """About how long a step over `tokens` takes in a model of so many parameters: work grows with both."""
        return tokens * parameters / PARAMETERS_OF_THE_SPEED / self.tokens_per_second

    @property
    def free_bytes(self) -> int:
        """Memory that training may hope for."""
        return self.memory_bytes - SYSTEM_BYTES


BOARDS: Final = {
    board.name: board
    for board in (
        Board("zero2w", "Pi Zero 2 W", 427_000_000, 9.0),
        Board("pi3", "Pi 3 B+", 906_000_000, 12.6),
        Board("pi4", "Pi 4", 3_800_000_000, 27.0),
        Board("pi5", "Pi 5", 7_900_000_000, 120.0),
        Board("jetson-nano", "Jetson Nano", 3_900_000_000, 30.0),
        Board("orin-nano", "Jetson Orin Nano", 7_400_000_000, 1_200.0),
        Board("gateway", "x86 gateway", 15_700_000_000, 180.0),
    )
}


def board(name: str) -> Board:
    """The board called `name`. Raises UsageError with the nearest name."""
    if name in BOARDS:
        return BOARDS[name]
    near = get_close_matches(name, BOARDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"The boards are {', '.join(BOARDS)}"
    raise UsageError("no such board", field="board", value=name, hint=hint)
