"""Every format from end to end: quantised, exported, through the gates, and read back by the device's own reader."""

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import tiny

from edge_agent.bundle import open_bundle
from edge_agent.trainer.step import Streamer
from quantize.bundle import quantize
from quantize.choice import Choice
from quantize.formats import FORMATS


def yield_from(steps: Generator[None, None, np.ndarray]) -> np.ndarray:
    """What a generator of the trainer returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            found: np.ndarray = done.value
            return found


@pytest.mark.parametrize("name", ["int4gz", "int8d", "int8c", "nf4"])  # int4d and int8g are everywhere else
def test_a_format_passes_the_gates_and_trains(name: str, tiny_model: Path, tmp_path: Path) -> None:
    taken: list[Choice] = []
    manifest = quantize(
        str(tiny_model),
        tmp_path / "bundle",
        tiny.PUBLISHER,
        lora=tiny.LORA,
        weights_format=name,
        head_rows=tiny.HEAD_ROWS,
        chosen=taken.append,
    )
    fmt = FORMATS[name]
    assert (taken[0].format, taken[0].exact) == (fmt, False)
    assert manifest.weights_format == name
    dtypes = {
        n.rsplit(".")[-1]: p.dtype for n, p in manifest.tensors.items() if n.startswith("L0/mlp.up_proj.w.")
    }
    assert dtypes == {part.suffix: part.dtype for part in fmt.parts}
    bundle = open_bundle(tmp_path / "bundle")
    adapter = {n: np.full(shape, 0.01, np.float32) for n, shape in bundle.layout.a_shapes.items()}
    adapter |= {n: np.full(shape, 0.01, np.float32) for n, shape in bundle.layout.b_shapes.items()}
    ids = np.arange(1, 25).reshape(2, 12)
    found = yield_from(Streamer(bundle, threads=1).losses(ids, np.ones_like(ids), ids, adapter))
    assert found.shape == (24,)
    assert np.isfinite(found).all()
