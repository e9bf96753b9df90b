"""One forward and backward pass over the training graphs of a bundle, with onnxruntime and numpy alone.

This is the exporter's own reading of the contract in docs/building-blocks.md, kept apart from the device's trainer
on purpose: the gates must not trust the code that they protect.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]
IGNORE: Final = -100


def session(path: Path | bytes) -> ort.InferenceSession:
    """A single-threaded session: the same order of additions, so the same digits, on every run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Runner:
    """Loss and gradients of a batch. `tensors` by their names in the weight file, adapters as L{i}/{module}.A|B."""

    def __init__(self, folder: Path, tensors: Mapping[str, Array], layers: int, head_rows: int) -> None:
        self._sessions = {path.stem: session(path) for path in folder.glob("*.onnx") if path.stem != "infer"}
        self._tensors, self._layers, self._head_rows = tensors, layers, head_rows

    def features(
        self, ids: Array, mask: Array, adapter: Mapping[str, Array]
    ) -> tuple[Array, list[Array], dict[str, Array]]:
        """(normed output of the last block, input of every block and of the norm, aux tensors)."""
        x, *aux_values = self._run("prologue", input_ids=ids, attention_mask=mask)
        names = [output.name for output in self._sessions["prologue"].get_outputs()][1:]
        aux, inputs = dict(zip(names, aux_values, strict=True)), [x]
        for index in range(self._layers):
            inputs.append(self._run("block_fwd", self._layer(index, adapter), x=inputs[-1], **aux)[0])
        return self._run("norm_fwd", h=inputs[-1])[0], inputs, aux

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
            outputs = self._run("block_bwd", self._layer(index, adapter), x=inputs[index], gy=flow, **aux)
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
        codes, scales = self._tensors["EMB.q"], self._tensors["EMB.s"]
        for start in range(0, len(codes), self._head_rows):
            part = slice(start, start + self._head_rows)
            feed = {"W.q": codes[part], "W.s": scales[part], "m": top, "z": total, "acc": weighted}
            top, total, weighted = self._run("ce", feed, f=f)
        at_label = (f * rows).sum(1, keepdims=True)
        return (top + np.log(total) - at_label)[:, 0], weighted / total - rows

    def _layer(self, index: int, adapter: Mapping[str, Array]) -> dict[str, Array]:
        prefix = f"L{index}/"
        both = (self._tensors, adapter)
        return {n.removeprefix(prefix): v for some in both for n, v in some.items() if n.startswith(prefix)}

    def _run(self, graph: str, more: Mapping[str, Array] | None = None, **feed: Array) -> list[Array]:
        run = self._sessions[graph]
        given = {**self._tensors, **(more or {}), **feed}
        outputs: list[Array] = run.run(None, {value.name: given[value.name] for value in run.get_inputs()})
        return outputs
