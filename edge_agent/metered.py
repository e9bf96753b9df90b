"""Whether the network counts every byte, as NetworkManager says it; whoever has none is not metered.

Asked of `busctl` in a child process, so that no D-Bus package is needed: no shell, a time limit, once a minute, and
never waited for but the first time.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

ASK: Final = (
    "--system",
    "get-property",
    "org.freedesktop.NetworkManager",
    "/org/freedesktop/NetworkManager",
    "org.freedesktop.NetworkManager",
    "Metered",
)
_METERED: Final = (b"u 1", b"u 3")  # yes, and NetworkManager's guess at yes (NMMetered)
_LIMIT_SECONDS: Final = 2.0
_EVERY_SECONDS: Final = 60.0


class Metered:
    """The last answer, and the child that brings the next one. `command` is another program for tests."""

    def __init__(
        self, command: Sequence[str] | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        program = shutil.which("busctl")
        self._command = list(command) if command is not None else [program, *ASK] if program else []
        self._monotonic = monotonic
        self._child: subprocess.Popen[bytes] | None = None
        self._asked = float("-inf")
        self._answer = False

    def now(self) -> bool:
        """Whether the network was metered when last heard of. Only the first call waits, 2 seconds at most."""
        first = self._asked == float("-inf")
        if self._child is None and self._command and self._monotonic() - self._asked >= _EVERY_SECONDS:
            self._ask()
        if self._child is not None:
            if first:
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(_LIMIT_SECONDS)
            self._hear(self._child)
        return self._answer

    def _ask(self) -> None:
        self._asked = self._monotonic()
        try:
            self._child = subprocess.Popen(  # noqa: S603 - a fixed command line, no shell
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._answer = False

    def _hear(self, child: subprocess.Popen[bytes]) -> None:
        """Takes the answer when there is one; a child that takes too long is ended, and its answer unknown."""
        if child.poll() is None:
            if self._monotonic() - self._asked < _LIMIT_SECONDS:
                return
            child.kill()
            child.wait()
        self._child = None
        assert child.stdout is not None
        with child.stdout:
            said = child.stdout.read(64)
        self._answer = child.returncode == 0 and said.strip() in _METERED
