"""A fixed input with the loss and the gradient that it must give, for devices to check before they use a bundle (F09).

That a graph loads says nothing about what an older or newer runtime computes with it. The numbers are those of this
machine's exact path through the bundle's own graphs; a format that is another approximation on each instruction set
gets a wider tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedge.lora import AdapterLayout
from fedge.release import Probe, probe_tokens
from quantize.anatomy import Anatomy
from quantize.formats import WeightFormat
from quantize.runner import Array, Runner

TOKENS = 16
TOLERANCE = 2e-3  # other instruction sets add in another order: 7e-6 on loss and gradients of a 135 M model
DYNAMIC_TOLERANCE = 0.5  # activations in 8 bits: 0.1 nats and a third of a gradient between instruction sets


def make_probe(
    folder: Path,
    tensors: Mapping[str, Array],
    anatomy: Anatomy,
    layout: AdapterLayout,
    fmt: WeightFormat,
    head_rows: int,
) -> Probe:
    """The probe of the bundle in `folder`: B is zero, A is that of the public seed of zeros."""
    runner = Runner(
        folder, tensors, len(anatomy.layers), head_rows, kinds=anatomy.kinds, cap=anatomy.logit_cap
    )
    ids = np.array([probe_tokens(TOKENS, anatomy.vocabulary)], np.int64)
    labels = np.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    zeros = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes.items()}
    adapter = layout.fed({**layout.frozen(bytes(16)), **zeros})
    loss, gradients = runner.gradients(ids, np.ones_like(ids), labels, adapter)
    own = layout.taken(gradients)
    squares = sum(float(np.square(own[name], dtype=np.float64).sum()) for name in layout.b_shapes)
    tolerance = DYNAMIC_TOLERANCE if fmt.name == "int8c" else TOLERANCE
    return Probe(
        tokens=TOKENS, loss=_rounded(loss), gradient_norm=_rounded(squares**0.5), tolerance=tolerance
    )


def _rounded(value: float) -> float:
    """Enough to judge by; the manifest must not depend on the last bit of a sum."""
    return float(f"{value:.5g}")
