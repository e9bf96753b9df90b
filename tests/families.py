"""Small random models of the families under test: two layers and a few more where layers are of several kinds.

Every setting in which a family differs from Llama is on: windows shorter than the texts, soft-caps that bend, biases
that are not zero, partial rotary positions, heads that are not tied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import tiny

WINDOW: Final = 16
LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SEVEN: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SQUARE: Final[dict[str, Any]] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Family:
    """How to make a small model of a family, and which of its matrices get an adapter."""

    config: Callable[[], Any]
    targets: tuple[str, ...]
    weights_format: str = "int8g"


def _llama_like(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**{**tiny.SIZES, **more})

    return make


def _other(name: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(vocab_size=304, **sizes)

    return make


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(
        _llama_like(
            "LlamaConfig",
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling=LLAMA3_ROPE,
        ),
        SEVEN,
    ),
    "mistral": Family(_llama_like("MistralConfig", sliding_window=WINDOW), ("q_proj", "v_proj"), "int4d"),
    "qwen2": Family(_llama_like("Qwen2Config"), ("q_proj", "v_proj"), "int4d"),
    "qwen3": Family(_llama_like("Qwen3Config", head_dim=32), ("q_proj", "v_proj")),
    "phi3": Family(
        _llama_like("Phi3Config", tie_word_embeddings=False),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "gpt2": Family(
        _other(
            "GPT2Config",
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=0,
        ),
        ("c_attn", "c_proj", "c_fc"),
    ),
    "gpt_neox": Family(
        _other(
            "GPTNeoXConfig",
            hidden_size=64,
            intermediate_size=128,
            max_position_embeddings=128,
            rotary_pct=0.25,
            initializer_range=0.15,
            **_SQUARE,
        ),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "opt": Family(
        _other(
            "OPTConfig",
            hidden_size=64,
            ffn_dim=128,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            pad_token_id=1,
            init_std=0.15,
            **_SQUARE,
        ),
        ("q_proj", "v_proj", "fc1"),
    ),
    "gemma": Family(_llama_like("GemmaConfig", head_dim=16), ("q_proj", "v_proj")),
    "gemma2": Family(
        _llama_like(
            "Gemma2Config",
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
        ("q_proj", "o_proj", "down_proj"),
    ),
    "gemma3": Family(
        _llama_like(
            "Gemma3TextConfig",
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        ("q_proj", "v_proj"),
    ),
    "smollm3": Family(
        _llama_like("SmolLM3Config", no_rope_layer_interval=2, no_rope_layers=[1, 0]), ("q_proj", "v_proj")
    ),
    "olmo2": Family(_llama_like("Olmo2Config", tie_word_embeddings=False), ("q_proj", "v_proj")),
}
