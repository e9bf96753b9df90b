"""Processes of a fleet on one machine: started with a log of their own, restarted when they die, stopped together.

The simulator never reaches into them. What it kills, it kills like a power cut would (SIGKILL); what it stops, it asks
first (SIGTERM). Children end with the simulator, however it ends (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from fedge.errors import UnavailableError

STOP_SECONDS: Final = 20.0
BACKOFF_SECONDS: Final = (0.2, 1.0, 3.0, 10.0)
# Of one process, beside those that we killed; more is a fault of ours, not the world's.
RESTARTS_MAX: Final = 20
_LOG_BYTES: Final = 512  # what a full disk leaves to the log: it lies here for our sake, not the device's
_PR_SET_PDEATHSIG: Final = 1


@dataclass
class Child:
    """One supervised process: its command, its log, and how often it was started again and how often we killed it.

    `born` is called with the process number of each new life.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    born: Callable[[int], None] | None = None
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    kills: int = 0
    start_at: float = 0.0
    wanted: bool = field(default=True)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Starts the process, its output appended to the log."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules, no shell
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_end_with_parent
            )
        if self.born is not None:
            self.born(self.process.pid)

    def family(self) -> list[psutil.Process]:
        """The process and everything that it started, parents first; empty when it does not run."""
        if not self.running or self.process is None:
            return []
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def tail(self, lines: int = 3) -> str:
        """The last lines of its log, for an error message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " | ".join(text.strip().splitlines()[-lines:])


class Supervisor:
    """All processes of a fleet. `look` is called often; it restarts what died."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.children: dict[str, Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, command: Sequence[str], born: Callable[[int], None] | None = None) -> Child:
        """Starts a process under `name`."""
        child = Child(name, tuple(command), self.logs / f"{name}.log", born)
        self.children[name] = child
        child.start()
        return child

    def look(self) -> None:
        """Restarts what died, after a pause. UnavailableError when one dies again and again."""
        now = time.monotonic()
        for child in self.children.values():
            if not child.wanted or child.running:
                continue
            if child.start_at == 0.0:
                child.restarts += 1
                own = max(1, child.restarts - child.kills)
                if own > RESTARTS_MAX:
                    raise UnavailableError(
                        f"{child.name} keeps dying: {child.tail()}", field="log", value=str(child.log)
                    )
                child.start_at = now + BACKOFF_SECONDS[min(own, len(BACKOFF_SECONDS)) - 1]
            elif now >= child.start_at:
                child.start_at = 0.0
                child.start()

    @property
    def restarts(self) -> int:
        """How often anything had to be started again."""
        return sum(child.restarts for child in self.children.values())

    def kill(self, name: str) -> None:
        """Cuts a process off, as a power cut would. `look` starts it again."""
        child = self.children[name]
        assert child.process is not None
        child.kills += 1
        child.process.send_signal(signal.SIGKILL)
        child.process.wait()

    def freeze(self, name: str) -> None:
        """Stops a process and its children where they are (SIGSTOP); their connections stay open and silent."""
        for process in self.children[name].family():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self, name: str) -> None:
        """Lets a frozen process go on."""
        for process in reversed(self.children[name].family()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def fill_disk(self, name: str) -> None:
        """No file of this process and its children may grow from now on (RLIMIT_FSIZE); a new life has room again."""
        child = self.children[name]
        room = child.log.stat().st_size + _LOG_BYTES
        self._limit_files(child, room)

    def free_disk(self, name: str) -> None:
        """Files may grow again."""
        self._limit_files(self.children[name], resource.RLIM_INFINITY)

    def _limit_files(self, child: Child, room: int) -> None:
        for process in child.family():
            with suppress(ProcessLookupError):
                _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
                soft = most if room == resource.RLIM_INFINITY else room
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, most))

    def stop(self, names: Iterable[str] | None = None) -> None:
        """Asks processes to end, waits, and kills what does not."""
        children = [self.children[name] for name in (self.children if names is None else names)]
        for child in children:
            child.wanted = False
            if child.running and child.process is not None:
                self.thaw(child.name)  # a frozen one would not hear it
                child.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _end_with_parent() -> None:
    """In the child: SIGTERM when the simulator dies. Its own group, since Ctrl-C is the simulator's to pass on."""
    os.setpgrp()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
