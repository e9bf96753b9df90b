"""Groups of the kernel, as the files that they are: what is written where, and a plain no where it is not allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedge.errors import UnavailableError
from firmware_sim.processes.cgroups import Cgroups, Limits


class Kernel:
    """A unified hierarchy as a folder; the files that a kernel would make in each new group are made here."""

    def __init__(self, folder: Path, controllers: str = "cpuset cpu io memory pids") -> None:
        self.mount, self.own = folder / "cgroup", folder / "self"
        self.group = self.mount / "user.slice" / "run.scope"
        self.group.mkdir(parents=True)
        self.own.write_text("1:name=systemd:/elsewhere\n0::/user.slice/run.scope\n")
        (self.group / "cgroup.controllers").write_text(controllers)
        self.populate(self.group)

    def populate(self, group: Path) -> None:
        group.mkdir(exist_ok=True)
        for name in ("cgroup.procs", "cgroup.subtree_control", "memory.max", "cpu.max"):
            (group / name).touch()

    def expect(self, *names: str) -> None:
        for name in names:
            self.populate(self.group / name)

    def text(self, *path: str) -> str:
        return self.group.joinpath(*path).read_text()

    def here(self, limits: Limits) -> Cgroups:
        return Cgroups.here(limits, (self.mount,), self.own)


def test_agents_get_a_group_each_and_we_leave_the_parent_first(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.expect("fedge-sim", "fedge-d1")
    groups = kernel.here(Limits(memory_mb=256, cpus=0.5))
    assert kernel.text("fedge-sim", "cgroup.procs") == str(os.getpid())
    assert kernel.text("cgroup.subtree_control") == "+cpu +memory"
    groups.bound("d1")(4711)
    assert kernel.text("fedge-d1", "memory.max") == str(256 << 20)
    assert kernel.text("fedge-d1", "cpu.max") == "50000 100000"
    assert kernel.text("fedge-d1", "cgroup.procs") == "4711"
    groups.remove()
    assert kernel.text("cgroup.subtree_control").startswith("-cpu -memory")
    assert kernel.text("cgroup.procs") == str(os.getpid())


def test_controllers_that_were_there_before_stay(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.expect("fedge-sim")
    (kernel.group / "cgroup.subtree_control").write_text("cpu memory")
    kernel.here(Limits(cpus=1.0)).remove()
    assert kernel.text("cgroup.subtree_control") == "cpu memory"


def test_a_bound_that_was_not_asked_for_is_not_set(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.expect("fedge-sim", "fedge-d1")
    kernel.here(Limits(memory_mb=64)).bound("d1")
    assert kernel.text("fedge-d1", "cpu.max") == ""


@pytest.mark.parametrize(
    ("controllers", "own", "reason"),
    [
        ("cpuset pids", "0::/user.slice/run.scope", "no controller for cpu and memory"),
        ("cpu", "0::/user.slice/run.scope", "no controller for memory"),
        ("cpu memory", "9:memory:/old", "no unified hierarchy"),
        ("cpu memory", "0::/not/mounted/here", "no unified hierarchy"),
        ("cpu memory", "0::/user.slice/run.scope", "fedge-sim/cgroup.procs"),  # we may not move ourselves
    ],
)
def test_where_it_is_not_allowed_the_reason_is_said(
    tmp_path: Path, controllers: str, own: str, reason: str
) -> None:
    kernel = Kernel(tmp_path, controllers)
    kernel.own.write_text(own)
    with pytest.raises(UnavailableError, match=f"cgroup limits are not allowed here: .*{reason}"):
        kernel.here(Limits(memory_mb=64))
    assert kernel.text("cgroup.subtree_control") == ""
