"""Which memory is gathered into large pages, when, and that gathering changes no byte of it."""

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest

from edge_agent.generator import pages
from edge_agent.generator.pages import STRETCH_BYTES, TOKENS_BEFORE, LargePages, is_asked_for

MAPS = """\
560000000000-560000400000 rw-p 00000000 00:00 0                          [heap]
7f0000001000-7f0000601000 rw-p 00000000 00:00 0
7f0000800000-7f0000a00000 r--p 00000000 00:00 0
7f0000c00000-7f0000e00000 rw-s 00000000 00:05 77                         /dev/shm/shared memory
7f0001000000-7f0001400000 rw-p 00000000 08:01 4711                       /bundle/weights.bin
7f0002000000-7f0002100000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0                          [stack]
"""


def test_whole_stretches_of_own_memory_are_gathered_and_nothing_else() -> None:
    assert pages._stretches(MAPS) == [0x560000000000, 0x560000200000, 0x7F0000200000, 0x7F0000400000]


@pytest.mark.parametrize(
    ("setting", "size", "expected"),
    [
        ("always [madvise] never\n", "2097152\n", True),
        ("[always] madvise never\n", "2097152\n", False),
        ("always madvise [never]\n", "2097152\n", False),
        ("always [madvise] never\n", "536870912\n", False),
        (None, "2097152\n", False),
    ],
)
def test_the_owners_setting_decides(tmp_path: Path, setting: str | None, size: str, expected: bool) -> None:
    for name, text in (("setting", setting), ("size", size)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert is_asked_for(tmp_path / "setting", tmp_path / "size") is expected


def huge_bytes(address: int) -> int:
    """AnonHugePages of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def test_a_long_text_gathers_stretch_by_stretch_and_no_byte_changes() -> None:
    if not is_asked_for():
        pytest.skip("this kernel does not leave large pages to programs that ask")
    memory = mmap.mmap(-1, 5 * STRETCH_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.uint32)
    values[:] = np.arange(values.size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    span = f"{address:x}-{address + len(memory):x} rw-p 00000000 00:00 0"
    stretches = pages._stretches(span)
    first, second = stretches[:2]
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(second), ctypes.c_size_t(STRETCH_BYTES), 25):
        pytest.skip("this kernel gathers nothing")
    gathered = LargePages(span)
    for _ in range(TOKENS_BEFORE):
        gathered.after_token()
    assert huge_bytes(first) == STRETCH_BYTES  # the one that was tried above
    for _ in range(9):  # more often than there are stretches
        gathered.after_token()
    assert huge_bytes(first) == len(stretches) * STRETCH_BYTES
    assert np.array_equal(values, np.arange(values.size))
