"""Small GGUF files as llama.cpp's converter would write them, of any tiny transformers model.

Names and the changes of values are written down here once more, from the converter's rules, and not taken from the
reader under test: rows of q and k in rotary pairs (Llama), 1 added to norms (Gemma), matrices turned (GPT-2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType

_MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
_SANDWICH = {  # Gemma 2 and 3 have a norm on either side
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def tensor_name(family: str, parameter: str) -> str:
    """The GGUF name of a transformers parameter."""
    module, _, suffix = parameter.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    table = _MODULES | (_SANDWICH if family in ("gemma2", "gemma3") else {})
    return f"blk.{layer}.{table[rest]}.{suffix}"


def changed(family: str, name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """A tensor's values as the converter writes them."""
    if family == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return pairs.swapaxes(1, 2).reshape(value.shape)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if family == "gpt2" and name.startswith("blk.") and value.ndim == 2:
        return value.T
    return value


def write_gguf(
    path: Path,
    family: str,
    model: Any,
    kinds: Callable[[str], Any] = lambda name: None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """`kinds(tensor name)` gives the quantisation of a matrix, None for float32; `metadata` replaces or adds keys."""
    config, writer = model.config, gguf.GGUFWriter(path, family)
    values = _metadata(family, config) | dict(metadata or {})
    for key, value in values.items():
        _add(writer, key, value)
    for parameter, tensor in model.named_parameters():
        name = tensor_name(family, parameter)
        array = np.ascontiguousarray(changed(family, name, tensor.detach().float().numpy(), config))
        kind = kinds(name) if array.ndim == 2 else None
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(size: int) -> dict[str, Any]:
    """A byte-level vocabulary of one letter each and one merge."""
    letters = [chr(code) for code in range(0x100, 0x100 + size - 2)]
    letters.append(letters[0] + letters[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<end>", *letters],
        "tokenizer.ggml.token_type": [3] + [1] * len(letters),
        "tokenizer.ggml.merges": [f"{letters[0]} {letters[1]}"],
        "tokenizer.ggml.eos_token_id": np.uint32(0),
    }


def _metadata(family: str, config: Any) -> dict[str, Any]:
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if family == "gpt2":
        sizes["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        sizes["attention.head_count_kv"] = config.num_key_value_heads
        sizes["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        sizes["rope.freq_base"] = float(config.rope_theta)
        sizes["attention.key_length"] = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
    if family in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        sizes["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        sizes["attn_logit_softcapping"] = config.attn_logit_softcapping
        sizes["final_logit_softcapping"] = config.final_logit_softcapping
    return {f"{family}.{key}": value for key, value in sizes.items()} | vocabulary(config.vocab_size)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, int(value))
