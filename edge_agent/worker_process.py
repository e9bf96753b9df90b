"""The agent's side of its worker: a child process that does the heavy work, one job at a time.

It is started for a job, kept for the next one, and ended when it has been idle for a while, so that its memory goes
back to the board. Whatever ends it, the job ends with an answer. Secrets reach it through its standard input alone:
never its command line, its environment or a file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.jobs import (
    BundleJob,
    Evaluated,
    Failed,
    Gauged,
    Personalised,
    Progress,
    Seal,
    Sealed,
    Trained,
)
from fedge.errors import UnavailableError

Reply = Progress | Trained | Evaluated | Gauged | Personalised | Sealed | Failed
OnReply = Callable[[int, Reply], None]

_decoder: Final = msgspec.json.Decoder(Reply)
_END_SECONDS: Final = 2.0


class WorkerProcess:
    """One worker. `on_reply(number, reply)` is called from a thread; `number` is what `submit` returned."""

    def __init__(self, on_reply: OnReply, linger_seconds: float) -> None:
        self._on_reply, self._linger = on_reply, linger_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._idle_since = 0.0

    @property
    def pid(self) -> int:
        """The child's process number, 0 when there is none."""
        return self._child.pid if self._child is not None and self._child.poll() is None else 0

    def submit(self, job: BundleJob | Seal) -> int:
        """Give the worker a job, starting it when needed. Raises UnavailableError when no process can be started."""
        if not self.pid:
            self._child = self._start()
        assert self._child is not None
        assert self._child.stdin is not None
        self._number += 1
        self._idle_since = 0.0
        threading.Thread(target=self._listen, args=(self._child, self._number), daemon=True).start()
        try:
            self._child.stdin.write(msgspec.json.encode(job) + b"\n")
            self._child.stdin.flush()
        except OSError:
            self._child.kill()  # it died between two jobs: the listener tells why
        return self._number

    def tend(self) -> None:
        """End a worker that has been idle for long enough; call it now and then."""
        if self.pid and self._idle_since and time.monotonic() - self._idle_since >= self._linger:
            self.stop()

    def stop(self) -> None:
        """End the worker at once; a job under way is answered by Failed."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait(_END_SECONDS)
        if child.stdin is not None:
            child.stdin.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # The very package that runs here, and nothing from the current folder (-P).
        source = str(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": source}
        command = [sys.executable, "-P", "-m", "edge_agent.worker"]
        try:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=-1
            )
        except OSError as error:
            raise UnavailableError(
                f"cannot start the worker: {error.strerror}", hint="Is memory short?"
            ) from error

    def _listen(self, child: subprocess.Popen[bytes], number: int) -> None:
        """Passes on the replies to one job, the last of which is not Progress."""
        assert child.stdout is not None
        for line in child.stdout:
            try:
                reply = _decoder.decode(line)
            except msgspec.MsgspecError as error:
                reply = Failed(
                    error="ProtocolError", what=f"the worker said what nobody understands: {error}"
                )
            if not isinstance(reply, Progress):
                self._idle_since = time.monotonic()
                self._on_reply(number, reply)
                return
            self._on_reply(number, reply)
        self._on_reply(number, Failed(error="Killed", what=_cause(child.wait())))


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the worker was killed (SIGKILL): this board is probably short of memory"
    if code < 0:
        return f"the worker was ended by {signal.Signals(-code).name}"
    return f"the worker ended early with exit code {code}"
