"""Memory and processor time of each agent bounded by the kernel (cgroup v2), where this user may.

The kernel's rule: a group with processes of its own cannot hand controllers down. So this process moves into a leaf
beside those of its agents, which works where its own group is delegated to it and empty otherwise:
`systemd-run --user --scope -p Delegate=yes fedge sim …`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge.errors import UnavailableError

_MOUNTS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_OWN: Final = Path("/proc/self/cgroup")
_NEEDED: Final = ("cpu", "memory")
_PERIOD: Final = 100_000  # microseconds, the kernel's default
_HINT: Final = "Where systemd runs: systemd-run --user --scope -p Delegate=yes fedge sim ..."


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one agent with its worker. 0 = no bound; `cpus` may be a fraction."""

    memory_mb: int = 0
    cpus: float = 0.0


class Cgroups:
    """One group for each agent, below the group that this process was started in."""

    def __init__(self, limits: Limits, parent: Path) -> None:
        self.limits, self.parent = limits, parent
        self._made: list[Path] = []
        self._enabled: list[str] = []

    @classmethod
    def here(cls, limits: Limits, mounts: tuple[Path, ...] = _MOUNTS, own: Path = _OWN) -> Cgroups:
        """Groups below our own. Raises UnavailableError, with the reason, where they are not allowed."""
        parent = _own_group(mounts, own)
        known = (parent / "cgroup.controllers").read_text().split()
        if missing := [name for name in _NEEDED if name not in known]:
            raise _refused(f"{parent} has no controller for {' and '.join(missing)}")
        groups = cls(limits, parent)
        try:
            groups._enter()
        except OSError as error:
            groups.remove()
            raise _refused(f"{error.filename or parent}: {error.strerror}") from error
        return groups

    def bound(self, name: str) -> Callable[[int], None]:
        """A group for `name`; what is returned puts a process into it. Raises UnavailableError."""
        limits = self.limits
        try:
            group = self._make(f"fedge-{name}")
            if limits.memory_mb:
                _put(group / "memory.max", str(limits.memory_mb << 20))
            if limits.cpus:
                _put(group / "cpu.max", f"{int(limits.cpus * _PERIOD)} {_PERIOD}")
        except OSError as error:
            raise _refused(f"{error.filename or self.parent}: {error.strerror}") from error
        return lambda pid: _put(group / "cgroup.procs", str(pid))

    def _enter(self) -> None:
        """Moves this process into a leaf, then lets the parent hand its controllers down."""
        _put(self._make("fedge-sim") / "cgroup.procs", str(os.getpid()))
        control = self.parent / "cgroup.subtree_control"
        missing = [name for name in _NEEDED if name not in control.read_text().split()]
        if missing:
            _put(control, " ".join(f"+{name}" for name in missing))
            self._enabled = missing

    def remove(self) -> None:
        """Gives the groups back; this process returns to where it was. Agents must have ended."""
        with suppress(OSError):
            if self._enabled:
                _put(self.parent / "cgroup.subtree_control", " ".join(f"-{name}" for name in self._enabled))
            _put(self.parent / "cgroup.procs", str(os.getpid()))
        for group in self._made:
            with suppress(OSError):
                group.rmdir()
        self._made.clear()

    def _make(self, name: str) -> Path:
        group = self.parent / name
        group.mkdir(exist_ok=True)
        self._made.append(group)
        return group


def _own_group(mounts: tuple[Path, ...], own: Path) -> Path:
    """The folder of this process's group in the unified hierarchy."""
    try:
        lines = own.read_text().splitlines()
    except OSError as error:
        raise _refused(f"{own}: {error.strerror}") from error
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    for mount in mounts:
        if paths and (mount / paths[0] / "cgroup.controllers").is_file():
            return mount / paths[0]
    raise _refused("no unified hierarchy (cgroup v2) is mounted")


def _put(path: Path, words: str) -> None:
    """One write, as the kernel wants it; these files exist already."""
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, words.encode())
    finally:
        os.close(handle)


def _refused(why: str) -> UnavailableError:
    return UnavailableError(f"cgroup limits are not allowed here: {why}", hint=_HINT)
