"""Whether the runtime of this board computes with a bundle what its maker's did (field case F09).

"It loads" is not "it computes": an operator of another version may load and give something else. So before a bundle
is used for the first time, the fixed input of its manifest goes there and back, and loss and gradient must be those
that the manifest names.
"""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort

from edge_agent.trainer.batch import Piece
from edge_agent.trainer.trainer import Trainer
from fedge.errors import UnsupportedError
from fedge.release import probe_tokens


def check_probe(trainer: Trainer) -> None:
    """Raises UnsupportedError, naming figure, runtime and what to do. A bundle without a probe passes."""
    manifest = trainer.manifest
    if manifest.probe is None:
        return
    ids = np.array([probe_tokens(manifest.probe.tokens, manifest.vocabulary)], np.int64)
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    layout = trainer.layout
    zeros = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes.items()}
    a = layout.frozen(bytes(16))
    result = trainer.loss_and_gradients(Piece(ids, np.ones_like(ids), labels), {**a, **zeros})
    squares = sum(
        float(np.square(result.gradients[name], dtype=np.float64).sum())
        for name in layout.b_shapes
        if name in result.gradients
    )
    _compare("loss", result.loss_sum / result.labels, manifest.probe.loss, manifest.probe.tolerance)
    norm = manifest.probe.gradient_norm
    _compare("gradient_norm", math.sqrt(squares), norm, manifest.probe.tolerance)


def _compare(figure: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance * max(abs(expected), 1e-3):  # also catches NaN
        raise UnsupportedError(
            f"this board computes something else with the bundle: {figure} is {found:.5g}, not {expected:.5g}",
            field=figure,
            value=found,
            hint=f"ONNX Runtime here is {ort.__version__}; try the version that the bundle was made with",
        )
