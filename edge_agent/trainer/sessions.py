"""The runtime's sessions, set so that a device's memory stays a stated figure.

One arena is shared by all sessions and grows by what is asked for, never by doubling; no memory pattern is kept per
shape; what frees memory runs first. A graph runs node by node as it was made, on every version of the runtime: its
optimisers find nothing in ours that pays, and cost a third of the loading and 6 to 9 MB of a step. Threads are as
many as the agent allows, and never spin. Only the CPU provider.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.bundle import check_age
from fedge.errors import UnsupportedError

Tensor = NDArray[np.generic]
Floats = NDArray[np.float32]
_AS_REQUESTED: Final = 1  # arena_extend_strategy kSameAsRequested
_DEAD_BYTES_MAX: Final = 65_536  # a freed piece is split when more than this would lie idle; saves 4 MB
_MMAP_THRESHOLD: Final = -3  # M_MMAP_THRESHOLD of malloc.h
_RETURNED_BYTES_MIN: Final = 1 << 20  # glibc raises its own bound as it goes, and then gives nothing back
_QUIET: Final = 3  # errors only
_shared: list[str] = []  # the environment's arena is registered once for a process


def check_runtime(minimum: str) -> None:
    """Raises UnsupportedError when the installed runtime is older than the bundle needs."""
    check_age(minimum, ort.__version__)


class Graph:
    """One session: feeds are picked by the graph's own input names, outputs come back by name."""

    def __init__(self, path: Path, threads: int) -> None:
        _share_arena()
        try:
            self._session = ort.InferenceSession(
                str(path), _options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's errors share no base class
            raise UnsupportedError(
                f"graph cannot be loaded: {_first_line(error)}", field="graph", value=path.name
            ) from error
        self.inputs: Final = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs: Final = tuple(entry.name for entry in self._session.get_outputs())

    def run(self, feeds: Mapping[str, Tensor], *, last: bool = False) -> dict[str, Floats]:
        """Run once. `feeds` may hold more than the graph reads; a lacking one raises KeyError, our bug.

        After the `last` run of a phase the arena gives back what is free in it: the next phase has other shapes.
        """
        given = {name: feeds[name] for name in self.inputs}
        found = self._session.run(self.outputs, given, _shrinking() if last else None)
        return dict(zip(self.outputs, found, strict=True))


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _QUIET
    options.enable_mem_pattern = False
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # 6 MB less than the default order
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _shrinking() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _share_arena() -> None:
    if _shared:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _RETURNED_BYTES_MIN)
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {"arena_extend_strategy": _AS_REQUESTED, "max_dead_bytes_per_chunk": _DEAD_BYTES_MAX}
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(settings))
    _shared.append("cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
