"""Every format from end to end: quantised, exported, through the gates, and read back by the device's own reader."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from edge_agent.bundle import open_bundle
from quantize.bundle import quantize
from quantize.choice import Choice
from quantize.formats import FORMATS


@pytest.mark.xdist_group("formats of the tiny model")
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", ["int4gz", "int8d", "int8c", "nf4"])  # int4d and int8g are everywhere else
def test_a_format_passes_the_gates_and_is_read_by_a_device(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
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
    for suffix in fmt.suffixes:  # the device maps each part as it was written
        tensor = bundle.tensor(f"L1/mlp.down_proj.w.{suffix}")
        assert tensor.shape == fmt.part(suffix).shape(64, 128)
        assert np.isfinite(tensor.astype(np.float32)).all()
