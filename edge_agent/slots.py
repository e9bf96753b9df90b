"""Training slots: of several agents on one machine, at most N train at a time.

A slot is a lock on one of N files. The kernel gives it back when its holder dies, whatever killed it. Whoever waits is
a worker process, so the agent itself goes on listening.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_LOOK_SECONDS: Final = 0.02


@contextmanager
def slot(folder: Path, count: int) -> Iterator[None]:
    """Waits for one of `count` slots in `folder` and holds it; with `count` 0 there is nothing to wait for."""
    if count < 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        os.open(folder / f"slot-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for number in range(count)
    ]
    try:
        while not any(_take(file) for file in files):
            time.sleep(_LOOK_SECONDS)
        yield
    finally:
        for file in files:
            os.close(file)


def _take(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
