"""Rotary tables of the inference graph: of all positions where they are small, else of the tokens that are read."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fedge.lora import LoraConfig
from quantize import decode
from quantize.decode import LEVEL_EXACT, at_level, inference_graph
from quantize.formats import FORMATS
from quantize.graph import operators
from quantize.reference import random_adapter
from quantize.runner import Decoder
from quantize.source import Source, build_model
from quantize.weights import quantise, write_weights


def test_where_tables_of_all_positions_are_too_large_rotation_is_an_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers as tr

    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = Source(build_model(tr.LlamaConfig(**tiny.SIZES)), "", b"", "", "", "", 0, 0)
    lora, fmt = LoraConfig(r=2), FORMATS["int8g"]
    places = write_weights(tmp_path / "weights.bin", quantise(source, fmt, lambda phase, fraction: None))
    monkeypatch.setattr(decode, "_TABLE_BYTES_MAX", 0)
    graph = at_level(inference_graph(source.anatomy, lora, fmt, places), LEVEL_EXACT)
    assert {"com.microsoft:RotaryEmbedding", "com.microsoft:GroupQueryAttention"} <= operators(graph)
    (tmp_path / "infer.onnx").write_bytes(graph.SerializeToString())
    ids = np.random.default_rng(0).integers(1, 300, (1, 12))
    decoder = Decoder(
        tmp_path / "infer.onnx", random_adapter(source.model, lora, np.random.default_rng(1), scale=0.0)
    )
    _, cache = decoder.step(ids[:, :9], decoder.start(1))
    found, _ = decoder.step(ids[:, 9:], cache)
    with torch.no_grad():
        expected = source.model(torch.from_numpy(ids)).logits[:, 9:].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
