"""Other families and formats than the tiny bundle's: the exporter's own gates compare each with torch."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from fedge.lora import LoraConfig
from quantize.bundle import quantize

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "targets", "weights_format"),
    [
        pytest.param(
            LlamaConfig(**tiny.SIZES, attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3_ROPE),
            ALL_SEVEN,
            "int8g",
            id="Llama with biases, scaled rotary, every matrix adapted, 8 bits",
        ),
        pytest.param(Qwen3Config(**tiny.SIZES, head_dim=32), ("q_proj", "v_proj"), "int4d", id="Qwen3"),
        pytest.param(Qwen2Config(**tiny.SIZES), ("q_proj", "v_proj"), "int4d", id="Qwen2"),
    ],
)
def test_a_family_passes_its_gates(
    config: Any, targets: tuple[str, ...], weights_format: str, tmp_path: Path
) -> None:
    tiny.write_model(tmp_path / "model", config)
    manifest = quantize(
        str(tmp_path / "model"),
        tmp_path / "bundle",
        tiny.PUBLISHER,
        lora=LoraConfig(r=4, alpha=8.0, targets=targets, rslora=True),
        weights_format=weights_format,
    )
    assert manifest.gates["cut_gradient_error"] <= 1e-5
    assert manifest.gates["gradient_error"] <= 1e-5
    assert manifest.gates["decode_error"] <= 1e-6
    assert len(manifest.lora_shapes) == len(targets)
