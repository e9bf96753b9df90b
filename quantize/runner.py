"""One forward and backward pass over the training graphs of a bundle, with onnxruntime and numpy alone.

This is the exporter's own reading of the contract in docs/building-blocks.md, kept apart from the device's trainer
on purpose: the gates must not trust the code that they protect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from quantize.unrounded import without_rounding

Array = npt.NDArray[Any]
IGNORE: Final = -100
_GRAPHS: Final = ("prologue", "block_fwd", "block_bwd", "norm_fwd", "norm_bwd", "rows", "ce")


def session(path: Path | bytes, *, folds: bool = True) -> ort.InferenceSession:
    """A single-threaded session: the same order of additions, so the same digits, on every run.

    `folds`: what depends on constants alone is computed once, when the session is made, and held.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = path if isinstance(path, bytes) else str(path)
    left_out = None if folds else ["ConstantFolding"]
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
    )


class Runner:
    """Loss and gradients of a batch. `tensors` by their names in the weight file, adapters as L{i}/{module}.A|B.

    `kinds` and `cap` are the manifest's `layer_kinds` and `logit_cap`; `rounds`: products round what the graphs say.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Array],
        layers: int,
        head_rows: int,
        *,
        kinds: Sequence[str] = (),
        cap: float = 0.0,
        graphs: Sequence[str] = _GRAPHS,
        rounds: bool = True,
    ) -> None:
        paths = {name: folder / f"{name}.onnx" for name in graphs}
        self._sessions = {
            name: session(path if rounds else without_rounding(onnx.load(path)).SerializeToString())
            for name, path in paths.items()
        }
        self._tensors, self._layers, self._head_rows = tensors, layers, head_rows
        self._kinds, self._cap = kinds, cap

    def features(
        self, ids: Array, mask: Array, adapter: Mapping[str, Array]
    ) -> tuple[Array, list[Array], dict[str, Array]]:
        """(normed output of the last block, input of every block and of the norm, aux tensors)."""
        aux = self.prologue(ids, mask)
        inputs = [aux.pop("x")]
        for index in range(self._layers):
            more = self._layer(index, adapter) | self._own_aux(index, aux)
            inputs.append(self._run("block_fwd", more, x=inputs[-1])[0])
        return self._run("norm_fwd", h=inputs[-1])[0], inputs, aux

    def prologue(self, ids: Array, mask: Array) -> dict[str, Array]:
        """x and the aux tensors, by name."""
        names = [output.name for output in self._sessions["prologue"].get_outputs()]
        return dict(zip(names, self._run("prologue", input_ids=ids, attention_mask=mask), strict=True))

    def rotary(self, length: int) -> tuple[Array, Array]:
        """Cosine and sine tables [1, length, head_dim] of positions 0 to length - 1."""
        ids = np.zeros((1, length), np.int64)
        found = self.prologue(ids, np.ones_like(ids))
        return found["cos"], found["sin"]

    def losses(self, ids: Array, mask: Array, labels: Array, adapter: Mapping[str, Array]) -> Array:
        """Negative log-likelihood of every label that is not IGNORE, in order; labels are already shifted."""
        features, _, _ = self.features(ids, mask, adapter)
        return self._head(features, labels)[0]

    def gradients(
        self, ids: Array, mask: Array, labels: Array, adapter: Mapping[str, Array]
    ) -> tuple[float, dict[str, Array]]:
        """Mean loss over the labels and its gradient with respect to every adapter tensor."""
        features, inputs, aux = self.features(ids, mask, adapter)
        losses, at_labels = self._head(features, labels)
        gradient = np.zeros((labels.size, features.shape[-1]), np.float32)
        gradient[labels.reshape(-1) != IGNORE] = at_labels / len(losses)
        flow = self._run("norm_bwd", h=inputs[-1], gf=gradient.reshape(features.shape))[0]
        found: dict[str, Array] = {}
        names = [output.name for output in self._sessions["block_bwd"].get_outputs()]
        for index in reversed(range(self._layers)):
            more = self._layer(index, adapter) | self._own_aux(index, aux)
            outputs = self._run("block_bwd", more, x=inputs[index], gy=flow)
            by_name = dict(zip(names, outputs, strict=True))
            flow = by_name.pop("gx")
            found |= {f"L{index}/{name.removeprefix('g:')}": value for name, value in by_name.items()}
        return float(losses.mean()), found

    def _head(self, features: Array, labels: Array) -> tuple[Array, Array]:
        """Losses at the labels and d(sum of losses)/d(features) there, by a streamed softmax."""
        chosen = labels.reshape(-1) != IGNORE
        f, ids = features.reshape(-1, features.shape[-1])[chosen], labels.reshape(-1)[chosen]
        rows = self._run("rows", ids=ids)[0]
        top, total = np.full((len(f), 1), -1e30, np.float32), np.zeros((len(f), 1), np.float32)
        weighted = np.zeros_like(f)
        table = "HEAD" if "HEAD.q" in self._tensors else "EMB"
        parts = {name: value for name, value in self._tensors.items() if name.startswith(f"{table}.")}
        for start in range(0, len(parts[f"{table}.q"]), self._head_rows):
            part = slice(start, start + self._head_rows)
            feed = {f"W{name.removeprefix(table)}": value[part] for name, value in parts.items()}
            top, total, weighted = self._run("ce", feed | {"m": top, "z": total, "acc": weighted}, f=f)
        at_label, slope = (f * rows).sum(1, keepdims=True), 1.0
        if self._cap:
            bent = np.tanh(at_label / self._cap)
            at_label, slope = self._cap * bent, 1 - bent * bent
        return (top + np.log(total) - at_label)[:, 0], weighted / total - slope * rows

    def _own_aux(self, index: int, aux: Mapping[str, Array]) -> dict[str, Array]:
        """What the block of this layer calls mask, cos and so on: its kind's where there is one."""
        own = {name: value for name, value in aux.items() if "@" not in name}
        if self._kinds:
            tail = f"@{self._kinds[index]}"
            own |= {n.removesuffix(tail): value for n, value in aux.items() if n.endswith(tail)}
        return own

    def _layer(self, index: int, adapter: Mapping[str, Array]) -> dict[str, Array]:
        prefix = f"L{index}/"
        both = (self._tensors, adapter)
        return {n.removeprefix(prefix): v for some in both for n, v in some.items() if n.startswith(prefix)}

    def _run(self, graph: str, more: Mapping[str, Array] | None = None, **feed: Array) -> list[Array]:
        run = self._sessions[graph]
        given = {**self._tensors, **(more or {}), **feed}
        outputs: list[Array] = run.run(None, {value.name: given[value.name] for value in run.get_inputs()})
        return outputs


class Decoder:
    """The inference graph with its cache, which grows by what is read."""

    def __init__(self, graph: Path, adapter: Mapping[str, Array], *, folds: bool = True) -> None:
        self._session, self._adapter = session(graph, folds=folds), adapter
        declared = {value.name: value.shape for value in self._session.get_inputs()}
        self._inputs = set(declared)
        self._empty = {n: shape for n, shape in declared.items() if n[0] in "kv" and n[1:].isdigit()}
        self._outputs = [output.name for output in self._session.get_outputs()]

    def start(self, batch: int) -> dict[str, Array]:
        """A cache without any position."""
        return {n: np.zeros((batch, s[1], 0, s[3]), np.float32) for n, s in self._empty.items()}

    def step(self, ids: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """(logits [B, S, V], longer cache) for ids [B, S] that follow the cached positions."""
        past, places = cache["k0"].shape[2], np.arange(ids.shape[1])
        positions = np.repeat(past + places[None], len(ids), 0)
        given = {"ids": ids, "positions": positions, "at": places, **cache, **self._adapter}
        logits, *rest = self._session.run(None, {name: given[name] for name in self._inputs})
        return logits, {n.removeprefix("n"): v for n, v in zip(self._outputs[1:], rest, strict=True)}
