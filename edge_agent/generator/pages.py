"""Large pages for the weights that every token reads, asked for while tokens are written.

A token reads all weights once, some hundred megabytes in order. In pages of 4 KB the processor then looks up tens of
thousands of addresses a token, which is a sixth of its time (measured: SmolLM2-135M, 14.7 against 12.3 ms). A kernel
that leaves large pages to the program (`madvise`) gathers a stretch of memory into one when it is asked to
(`MADV_COLLAPSE`, Linux 6.1, madvise(2)). That copies the stretch once, so it pays after some hundred tokens: a few
stretches a token, and only once a text has become long.

The rule: memory does not grow. Only what was mapped when the session was loaded is gathered; a cache that is mostly
room comes later. The owner's setting is respected: where it is `never`, or `always`, nothing is asked for. Refusals of
the kernel change nothing but speed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

STRETCH_BYTES: Final = 2 * 1024**2  # a large page on x86-64, and on ARM with pages of 4 KB
TOKENS_BEFORE: Final = 64  # a short answer is over before gathering pays
_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE: Final = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAPS: Final = Path("/proc/self/maps")
_COLLAPSE: Final = 25  # MADV_COLLAPSE in the kernel's asm-generic/mman-common.h


class LargePages:
    """The stretches of memory that this process had when it was made, to be gathered one after the other.

    `maps` is what to gather, as proc_pid_maps(5) has it; by default all of this process.
    """

    def __init__(self, maps: str | None = None) -> None:
        self._waiting = TOKENS_BEFORE
        asked = is_asked_for()
        self._left: Iterator[int] = iter(_stretches(maps or _MAPS.read_text()) if asked else ())

    def after_token(self) -> None:
        """Gather one more stretch, once enough tokens have been written."""
        if self._waiting:
            self._waiting -= 1
            return
        address = next(self._left, None)
        if address is not None:
            _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(STRETCH_BYTES), _COLLAPSE)


def is_asked_for(setting: Path = _SETTING, size: Path = _SIZE) -> bool:
    """Whether this kernel gives large pages to programs that ask, and to no other."""
    if sys.platform != "linux":
        return False
    try:
        return "[madvise]" in setting.read_text() and int(size.read_text()) == STRETCH_BYTES
    except (OSError, ValueError):
        return False


def _stretches(maps: str) -> list[int]:
    """Addresses of the whole stretches in private writable memory without a file, of the text of proc_pid_maps(5)."""
    found: list[int] = []
    for line in maps.splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights != "rw-p" or inode != "0" or (name and name[0] != "[heap]"):
            continue
        begin, end = (int(part, 16) for part in span.split("-"))
        first = -(-begin // STRETCH_BYTES) * STRETCH_BYTES
        found += range(first, end - STRETCH_BYTES + 1, STRETCH_BYTES)
    return found


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
