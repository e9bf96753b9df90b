"""The bundle's inference graph with its key/value cache: tokens in, logits of the last one out.

The rule: the cache stays where it lies. It is bound to the session as input and output, and never passes through a
copy in Python. A graph with fused attention writes new keys and values into the very buffers that it reads; they have
room to spare and only the part in use is ever touched, so untouched room costs no memory. A graph without it returns
a longer cache, whose values are bound as the next run's inputs as they are.

External data is found beside the graph, and the runtime refuses to follow a symbolic link out of its folder, so the
graph is opened by its real path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_agent.bundle import Bundle
from edge_agent.generator.adapter import adapter_feeds
from edge_agent.generator.pages import LargePages
from fedge.errors import ConfigError, UnsupportedError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

GRAPH: Final = "infer"
FUSED: Final = "com.microsoft:GroupQueryAttention"  # a graph with it shares its cache buffers
PREFILL_TOKENS: Final = 128  # a prompt's tokens in one run: attention scores stay small, and a stop is near
_ROOM_TOKENS: Final = 256  # of a cache that shares its buffers, at first; then it doubles
_QUIET: Final = 3


class Decoding:
    """One sequence being read and continued. Not for use by several threads.

    `adapter` has A and B by name (`adapter_feeds`); `pause` is called after every run and may sleep, or raise to stop.
    Raises UnsupportedError when the bundle has no inference graph or the runtime cannot load it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 1,
        adapter: Mapping[str, Floats] | None = None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        if threads < 1:  # to the runtime, 0 would mean all processors
            raise ConfigError("thread count must be at least 1", field="threads", value=threads)
        manifest = bundle.manifest
        self.positions_max: Final = manifest.positions_max
        self.vocabulary: Final = manifest.vocabulary
        self._pause = pause
        self._one = np.empty((1, 1, self.vocabulary), np.float32)  # logits of one token, used again and again
        self._session = _open(bundle, threads)
        self._pages = LargePages()  # of the weights: before the caches are made
        declared = self._session.get_inputs()
        self._inputs = {entry.name for entry in declared}
        self._empty = {e.name: (1, e.shape[1], 0, e.shape[3]) for e in declared if _is_cache(e.name)}
        self._shared = FUSED in manifest.operators
        self._binding = self._session.io_binding()
        self._cache: dict[str, ort.OrtValue] = {}
        self._bound: dict[str, ort.OrtValue] = {}  # keeps alive what the binding only points to
        self._room = 0
        self.past = 0
        self.reset()
        self.adapt(adapter_feeds(bundle.layout) if adapter is None else adapter)

    def adapt(self, adapter: Mapping[str, Floats]) -> None:
        """Use this adapter from now on, and forget what was read with another."""
        self.reset()
        for name in sorted(self._inputs):
            if name.endswith((".A", ".B")):
                self._bind(name, adapter[name])

    def reset(self) -> None:
        """An empty cache."""
        self.past = self._room = 0
        self._set_cache({name: np.zeros(shape, np.float32) for name, shape in self._empty.items()})

    def keep(self, positions: int) -> None:
        """Forget everything after the first `positions` tokens."""
        assert 0 <= positions <= self.past
        if not self._shared and positions < self.past:
            self._set_cache({n: v.numpy()[:, :, :positions].copy() for n, v in self._cache.items()})
        self.past = positions

    def read(self, ids: Sequence[int]) -> Floats:
        """Logits (V,) after the last of `ids`, which follow what was read before; good until the next reading."""
        assert ids, "nothing to read"
        logits = np.empty(0, np.float32)
        for start in range(0, len(ids), PREFILL_TOKENS):
            part = np.array(ids[start : start + PREFILL_TOKENS], np.int64)
            logits = self._run(part, np.array([len(part) - 1], np.int64))[0]
        return logits

    def read_all(self, ids: Sequence[int]) -> Floats:
        """Logits (S, V) after each of `ids`, in one run: for measuring, not for generating."""
        part = np.array(ids, np.int64)
        return self._run(part, np.arange(len(part)))

    def _run(self, ids: Ints, at: Ints) -> Floats:
        total = self.past + len(ids)
        assert total <= self.positions_max, "the caller keeps to the position table"
        if self._shared and total > self._room:
            self._make_room(total)
        self._bind("ids", ids[None])
        self._bind("at", at)
        if "positions" in self._inputs:
            self._bind("positions", np.arange(self.past, total)[None])
        logits = self._one if len(at) == 1 else np.empty((1, len(at), self.vocabulary), np.float32)
        self._bound["logits"] = ort.OrtValue.ortvalue_from_numpy(logits)
        self._binding.bind_ortvalue_output("logits", self._bound["logits"])
        self._session.run_with_iobinding(self._binding)
        self.past = total
        if len(ids) == 1:
            self._pages.after_token()
        if not self._shared:
            self._follow()
        if self._pause is not None:
            self._pause()
        found: Floats = logits[0]
        return found

    def _bind(self, name: str, values: NDArray[np.generic]) -> None:
        value = self._bound[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))
        self._binding.bind_ortvalue_input(name, value)

    def _make_room(self, total: int) -> None:
        """Larger buffers, with what the present ones hold."""
        room = min(self.positions_max, max(total, 2 * self._room, _ROOM_TOKENS))
        larger = {}
        for name, value in self._cache.items():
            batch, heads, _, width = self._empty[name]
            larger[name] = np.zeros((batch, heads, room, width), np.float32)
            larger[name][:, :, : self.past] = value.numpy()[:, :, : self.past]
        self._room = room
        self._set_cache(larger)

    def _set_cache(self, arrays: Mapping[str, Floats]) -> None:
        for name, array in arrays.items():
            value = self._cache[name] = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, value)
            if self._shared:
                self._binding.bind_ortvalue_output(f"n{name}", value)
            else:
                self._binding.bind_output(f"n{name}", "cpu")

    def _follow(self) -> None:
        """The caches that a run returned become the next run's inputs."""
        values = self._binding.get_outputs()  # in the order in which they were first bound
        for name, value in zip(self._empty, values[: len(self._empty)], strict=True):
            self._cache[name] = value
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_output(f"n{name}", "cpu")


def _open(bundle: Bundle, threads: int) -> ort.InferenceSession:
    path = bundle.graph(GRAPH)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path.resolve()), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no base class
        line = str(error).strip().split("\n")[0][:200]
        raise UnsupportedError(f"graph cannot be loaded: {line}", field="graph", value=path.name) from error


def _is_cache(name: str) -> bool:
    return name[:1] in ("k", "v") and name[1:].isdigit()
