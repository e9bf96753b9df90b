"""The real device's conditions: the board, its record of presence and its uplink, judged by its owner's policy.

Looked at every ten seconds. The machine hears of it only when the judgement has changed, because every change is a
signed message.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from edge_agent.board_state import Board
from edge_agent.conditions import judge
from edge_agent.effects import Conditions
from edge_agent.home import Home
from edge_agent.pace import coarse
from edge_agent.policy import Policy
from edge_agent.presence import History
from edge_agent.stats import Figures
from edge_agent.uplink import Uplink
from fedge.messages import Facts

LOOK_SECONDS: Final = 10.0


class Surroundings:
    """`figures` has what earlier processes measured, and is told what this one finds."""

    def __init__(
        self, home: Home, policy: Policy, facts: Facts, figures: Figures, board: Board | None = None
    ) -> None:
        self._board = board or Board()
        self._history = History(home.presence)
        self._policy, self._figures = policy, figures
        self.uplink = Uplink(figures.upload_kbit)
        self.facts = msgspec.structs.replace(facts, seconds_per_step=coarse(figures.seconds_per_step))
        self._told: Conditions | None = None
        self._look_at = 0.0

    @property
    def allowed(self) -> bool:
        """Whether the device might work when it was last looked at."""
        return self._told is None or self._told.allowed

    def forget(self) -> None:
        """A new machine knows nothing yet: the next look is due, and told whatever it finds."""
        self._told, self._look_at = None, 0.0

    def gauged(self, seconds: float) -> None:
        """The pace of the bundle that has just come, 0 = not known; the next look is due, and tells it."""
        self._figures.seconds_per_step = coarse(seconds)
        self.facts = msgspec.structs.replace(self.facts, seconds_per_step=coarse(seconds))
        self._look_at = 0.0

    def look(self, now: float, *, rounds_spent: int, busy: bool, worker_mb: int) -> Conditions | None:
        """The conditions at Unix time `now`, when a look is due and they are not those told before."""
        if time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._history.note(now)
        found = self._judge(now, rounds_spent, busy, worker_mb)
        self._figures.upload_kbit = self.uplink.kbit
        self._figures.why_not = found.reason
        self.facts = found.facts
        if found == self._told:
            return None
        self._told = found
        return found

    def _judge(self, now: float, rounds_spent: int, busy: bool, worker_mb: int) -> Conditions:
        history, clock = self._history, time.localtime(now)
        up = history.up_seconds
        reading = self._board.read(
            share_on=history.share_on,
            up_seconds=max(up, self._board.up_seconds()) if history.is_young else up,
            upload_kbit=self.uplink.kbit,
            busy=busy,
            own_mb=worker_mb,
        )
        return judge(
            self._policy,
            reading,
            self.facts,
            now,
            bytes_today=self._figures.day_bytes,
            rounds_spent=rounds_spent,
            local_hour=clock.tm_hour + clock.tm_min / 60,
        )
