"""How one agent is run on this machine: paths and shares, none of which the fleet ever hears of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.dataset.choices import AS_IT_IS, Reading
from edge_agent.home import Home

LINGER_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """`blobs` may be shared by several agents; with `slots`, at most `slot_count` of them train at a time.

    `threads` 0 means all that this process may use; the worker is ended after `linger_seconds` without a job.
    `reading` is what the owner says about the file `data`.
    """

    home: Home
    data: Path
    blobs: Path | None = None
    slots: Path | None = None
    slot_count: int = 0
    threads: int = 0
    linger_seconds: float = LINGER_SECONDS
    reading: Reading = AS_IT_IS
