"""What this board can do now, asked of the kernel. The rule: what *we* may use, never what the machine has.

Nothing here is precise on purpose where it leaves the device: memory goes out in steps of 256 MB, the number of samples
as a power of two.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.dataset import Reading, read_records
from fedge import __version__, limits
from fedge.messages import Facts

MEMORY_STEP_MB: Final = 256
_KB_IN_MB: Final = 1_024
_ROOT: Final = Path("/")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process in kilobytes: resident now, its peak, and the part that no file backs."""

    resident_kb: int = 0
    peak_kb: int = 0
    anonymous_kb: int = 0


def measure(data: Path | None, reading: Reading | None = None) -> Facts:
    """The public facts about this device with this data file. Raises DataError or NoInputError for the file."""
    return Facts(
        board=board_name(),
        memory_mb_step=free_memory_mb() // MEMORY_STEP_MB * MEMORY_STEP_MB,
        samples_bucket=samples_bucket(data, reading) if data else 0,
        aes=has_aes(),
        version=__version__,
    )


def samples_bucket(data: Path, reading: Reading | None = None) -> int:
    """Bit length of the number of samples: 1 for one, 2 for two or three, 3 up to seven; 0 for none."""
    return sum(record.samples for record in read_records(data, reading)).bit_length()


def board_name() -> str:
    """The board's own name, or the processor's."""
    try:
        name = Path("/proc/device-tree/model").read_text("utf-8", "replace").strip("\0 \n")
    except OSError:
        name = ""
    return (name or platform.machine().replace("_", "-"))[: limits.BOARD_CHARS_MAX]


def has_aes() -> bool:
    """Whether the processor has AES instructions (`flags` on x86, `Features` on ARM)."""
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return "aes" in value.split()
    return False


def free_memory_mb(root: Path = _ROOT) -> int:
    """Memory that may still be had: what the machine has available, or what our control group has left."""
    free = _kb_of(root / "proc/meminfo", "MemAvailable") // _KB_IN_MB
    for group in _groups(root):
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None and used is not None:
            free = min(free, max(limit - used, 0) >> 20)
    return free


def threads_allowed(*bounds: int) -> int:
    """Threads that are worth starting: allowed cores, control-group quota, and `bounds` above 0; at least one."""
    threads = len(os.sched_getaffinity(0))
    for group in _groups(_ROOT):
        words = next(_lines(group / "cpu.max"), "").split()
        if len(words) == 2 and words[0].isdecimal():
            threads = min(threads, math.ceil(int(words[0]) / int(words[1])))
    return max(1, min(threads, *(bound for bound in bounds if bound > 0), threads))


def memory_of(pid: int) -> Memory:
    """Memory of a process; all zero when it is gone."""
    status = Path(f"/proc/{pid}/status")
    return Memory(_kb_of(status, "VmRSS"), _kb_of(status, "VmHWM"), _kb_of(status, "RssAnon"))


def memory_is_bounded(root: Path = _ROOT) -> bool:
    """Whether the kernel enforces limits of memory on control groups; those of Raspberry Pis start with it off."""
    return "memory" in next(_lines(root / "sys/fs/cgroup/cgroup.controllers"), "").split()


def _groups(root: Path) -> Iterator[Path]:
    """Our control group and those above it (version 2)."""
    top = root / "sys/fs/cgroup"
    line = next((line for line in _lines(root / "proc/self/cgroup") if line.startswith("0::")), "")
    group = top / line.removeprefix("0::").strip().lstrip("/")
    while group.is_relative_to(top):
        yield group
        group = group.parent


def _number(path: Path) -> int | None:
    text = next(_lines(path), "").strip()
    return int(text) if text.isdecimal() else None


def _kb_of(path: Path, name: str) -> int:
    for line in _lines(path):
        if line.startswith(f"{name}:"):
            words = line.split()
            return int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
    return 0


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            yield from stream
    except OSError:
        return
