"""Figures for people: what this agent costs in memory and bytes. `stats.json` is replaced every few seconds.

Bytes and rounds count from the day the device joined; memory counts from the start of this process. Memory is that
of agent and worker together; the worker's own peak comes from the kernel (VmHWM), so nothing slips between two looks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.jobs import Memory
from edge_agent.resources import memory_of
from fedge.io import durable

_ROUNDS_KEPT: Final = 1_000


class Figures(msgspec.Struct, kw_only=True):
    """What `stats.json` holds. Megabytes are 10^6 bytes."""

    at: float = 0.0
    phase: str = ""
    campaign: str = ""
    link_up: bool = False
    problem: str = ""
    rss_mb: float = 0.0
    idle_rss_mb: float = 0.0  # the agent's own, highest while no worker lived
    peak_rss_mb: float = 0.0
    peak_anonymous_mb: float = 0.0
    mqtt_up_bytes: int = 0  # payload bytes
    mqtt_down_bytes: int = 0
    https_down_bytes: int = 0
    rounds: int = 0
    rounds_opened: int = 0
    round_up_bytes: list[int] = []  # MQTT payload of each round, READY included
    round_loss: list[float] = []  # mean training loss per token of each round trained here
    seconds_per_step: float = 0.0
    upload_kbit: float = 0.0  # smoothed; 0 = not known yet
    day: int = 0  # since 1970, UTC
    day_bytes: int = 0  # of that day, up and down, downloads included
    why_not: str = ""  # why the device may not work now; for its owner alone


class Stats:
    """The running figures of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures = _earlier(path)
        self._base = (
            self.figures.mqtt_up_bytes,
            self.figures.mqtt_down_bytes,
            self.figures.https_down_bytes,
        )
        self._round_from = self._counted = 0

    def count_bytes(self, now: float, mqtt_up: int, mqtt_down: int, https_down: int) -> None:
        """Bytes moved by this process so far, at Unix time `now`."""
        moved, figures = mqtt_up + mqtt_down + https_down, self.figures
        if figures.day != (today := int(now // 86_400)):
            figures.day, figures.day_bytes = today, 0
        figures.day_bytes += moved - self._counted
        self._counted = moved
        up, down, https = self._base
        self.figures.mqtt_up_bytes = up + mqtt_up
        self.figures.mqtt_down_bytes = down + mqtt_down
        self.figures.https_down_bytes = https + https_down

    def look(self, worker: int) -> int:
        """Samples memory now; returns megabytes resident of agent and worker (process number, 0 for none)."""
        own, other = memory_of(os.getpid()), memory_of(worker)
        figures = self.figures
        figures.rss_mb = _mb(own.resident_kb + other.resident_kb)
        figures.peak_rss_mb = max(figures.peak_rss_mb, _mb(own.resident_kb + other.peak_kb))
        anonymous = _mb(own.anonymous_kb + other.anonymous_kb)
        figures.peak_anonymous_mb = max(figures.peak_anonymous_mb, anonymous)
        if not worker:
            figures.idle_rss_mb = max(figures.idle_rss_mb, _mb(own.resident_kb))
        return int(figures.rss_mb)

    def worker_said(self, memory: Memory) -> None:
        """Memory as the worker itself saw it at a step."""
        own = memory_of(os.getpid())
        figures = self.figures
        figures.peak_rss_mb = max(figures.peak_rss_mb, _mb(own.resident_kb + memory.peak / 1_024))
        figures.peak_anonymous_mb = max(
            figures.peak_anonymous_mb, _mb(own.anonymous_kb + memory.anonymous / 1_024)
        )

    def round_ended(self, mqtt_up: int) -> None:
        """A round was opened or sat out; `mqtt_up` = payload bytes of this process so far."""
        self.figures.rounds += 1
        self.figures.round_up_bytes = [*self.figures.round_up_bytes, mqtt_up - self._round_from][
            -_ROUNDS_KEPT:
        ]
        self._round_from = mqtt_up

    def round_trained(self, loss: float, seconds_per_step: float) -> None:
        """Training of a round is done, at this mean loss per token."""
        self.figures.seconds_per_step = round(seconds_per_step, 3)
        self.figures.round_loss = [*self.figures.round_loss, loss][-_ROUNDS_KEPT:]

    def write(self, at: float) -> None:
        """Replaces the file; a full disk is no reason to stop. Not synced: that would wear out a flash card."""
        self.figures.at = at
        part = durable.part_name(self._path)
        with suppress(OSError):
            part.write_bytes(msgspec.json.format(msgspec.json.encode(self.figures), indent=1))
            part.replace(self._path)


def _earlier(path: Path) -> Figures:
    """The figures of the process before, its memory forgotten."""
    try:
        figures = msgspec.json.decode(path.read_bytes(), type=Figures)
    except (OSError, msgspec.MsgspecError):
        return Figures()
    figures.rss_mb = figures.idle_rss_mb = figures.peak_rss_mb = figures.peak_anonymous_mb = 0.0
    return figures


def _mb(kilobytes: float) -> float:
    return round(kilobytes * 1_024 / 1e6, 1)
