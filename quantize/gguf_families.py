"""GGUF architectures: how metadata becomes a transformers configuration, and what a converter did to the tensors.

Names of tensors are the gguf library's own business (`gguf.TensorNameMap`). Here stands what it does not know: the
meaning of the keys, and the changes that llama.cpp's converter makes to values (rows of q and k put in pairs, 1 added
to the norms of Gemma, GPT-2's matrices turned). A key or an architecture that is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np

from fedge.errors import DataError, UnsupportedError
from quantize.supported import unsupported_architecture

Metadata = Mapping[str, Any]


class Fields(dict[str, Any]):
    """GGUF metadata; asking for a value that is not there is the file's fault."""

    def __missing__(self, key: str) -> NoReturn:
        raise DataError("the GGUF lacks a value", field="key", value=key)


@dataclass(frozen=True, slots=True)
class Family:
    """One GGUF architecture: transformers' model type and class, keys beyond `_KEYS`, and the converter's changes."""

    model_type: str
    architecture: str
    keys: Mapping[str, str] = field(default_factory=dict)  # GGUF key -> configuration value, over `_KEYS`
    fixed: Mapping[str, object] = field(default_factory=dict)
    pairs_rows: bool = False  # rows of q and k are interleaved for rotary pairs
    norms_plus_one: bool = False
    turned: bool = False  # transformers keeps these matrices as (in, out)
    finish: Callable[[dict[str, Any]], None] | None = None


_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED: Final = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
)
# Read elsewhere in this module, or of no consequence to what the model computes.
_OTHER: Final = {
    "vocab_size",
    "rope.dimension_count",
    "attention.value_length",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}


def _gemma_scale(large: int) -> Callable[[dict[str, Any]], None]:
    """Gemma's scores are scaled by its head width, in the largest model by the width of an even share."""

    def finish(config: dict[str, Any]) -> None:
        even = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = even if config["num_hidden_layers"] == large else config["head_dim"]

    return finish


_WINDOW: Final = {"attention.sliding_window": "sliding_window"}
_GELU: Final = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family("llama", "LlamaForCausalLM", pairs_rows=True),  # Mistral's files say llama, too
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "phi3": Family("phi3", "Phi3ForCausalLM", keys=_WINDOW),
    "gemma": Family("gemma", "GemmaForCausalLM", fixed=_GELU, norms_plus_one=True),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        keys=_WINDOW
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        norms_plus_one=True,
        finish=_gemma_scale(46),
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        keys=_WINDOW,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        norms_plus_one=True,
        finish=_gemma_scale(62),
    ),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        keys={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        turned=True,
    ),
}


def family_of(fields: Metadata) -> tuple[str, Family]:
    """(GGUF architecture, its family). Raises UnsupportedError for one that is not in the table."""
    name = str(fields["general.architecture"])
    if name not in FAMILIES:
        raise unsupported_architecture(f"{name} (GGUF)")
    return name, FAMILIES[name]


def config_of(fields: Fields, tensors: Mapping[str, Any]) -> Any:
    """The transformers configuration that a GGUF's metadata describes; `tensors` by their GGUF names.

    Raises UnsupportedError naming a key that has no meaning here, DataError naming one that is missing.
    """
    from transformers import AutoConfig

    name, family = family_of(fields)
    meaning = {**_KEYS, **family.keys}
    values: dict[str, Any] = {}
    for key in sorted(key.removeprefix(f"{name}.") for key in fields if key.startswith(f"{name}.")):
        if key in meaning:
            values[meaning[key]] = _plain(fields[f"{name}.{key}"], f"{name}.{key}")
        elif key not in _OTHER:
            raise UnsupportedError(
                "this GGUF value is not handled", field=f"{name}.{key}", value=fields[f"{name}.{key}"]
            )
    for key in _REQUIRED:
        values[meaning[key]] = fields[f"{name}.{key}"]
    heads, hidden = values[meaning["attention.head_count"]], values[meaning["embedding_length"]]
    if "num_attention_heads" in values:
        values.setdefault("num_key_value_heads", heads)
        values.setdefault("head_dim", hidden // heads)
    _check_head(name, fields, values.get("head_dim", hidden // heads))
    eos = int(fields["tokenizer.ggml.eos_token_id"])
    values |= {
        "architectures": [family.architecture],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": _is_tied(tensors),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": int(fields.get("tokenizer.ggml.padding_token_id", eos)),
        **family.fixed,
        **_biases(name, tensors),
    }
    scaling = _rope_scaling(name, fields, tensors, values)
    if scaling:
        values["rope_scaling"] = scaling
    if family.finish is not None:
        family.finish(values)
    return AutoConfig.for_model(family.model_type, **values)


def row_order(family: Family, tensor: str, rows: int, config: Any) -> Any:
    """Rows in transformers' order: the two halves of each head apart, where llama.cpp interleaves rotary pairs."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    module = tensor.split(".")[-2]
    if not family.pairs_rows or module not in heads:
        return slice(None)
    count = getattr(config, heads[module])
    return np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)


def is_shifted(family: Family, tensor: str) -> bool:
    """Whether the converter added 1 to this tensor: Gemma multiplies by 1 + w, llama.cpp by w."""
    return family.norms_plus_one and tensor.endswith("norm.weight")


def is_turned(family: Family, tensor: str) -> bool:
    """Whether transformers keeps this matrix as (in, out)."""
    return family.turned and tensor.startswith("blk.") and tensor.endswith(".weight") and "norm" not in tensor


def _plain(value: Any, key: str) -> Any:
    """A metadata value as configurations have it; floats were stored in single precision."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UnsupportedError("layers of different sizes are not handled", field=key, value=value)
        value = value[0]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _check_head(name: str, fields: Metadata, head_dim: int) -> None:
    for key in ("rope.dimension_count", "attention.value_length"):
        if int(fields.get(f"{name}.{key}", head_dim)) != head_dim:
            raise UnsupportedError(
                "this GGUF value is not handled", field=f"{name}.{key}", value=fields[f"{name}.{key}"]
            )


def _is_tied(tensors: Mapping[str, Any]) -> bool:
    """A head that says the same as the embedding is the embedding."""
    head, table = tensors.get("output.weight"), tensors.get("token_embd.weight")
    return head is None or (
        table is not None and head.tensor_type == table.tensor_type and np.array_equal(head.data, table.data)
    )


def _biases(name: str, tensors: Mapping[str, Any]) -> dict[str, bool]:
    if name != "llama":
        return {}
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _rope_scaling(
    name: str, fields: Metadata, tensors: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The rotary scaling, from metadata (linear) or from Llama 3's table of factors, checked number by number."""
    kind = fields.get(f"{name}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors and kind == "none":
        return _llama3_scaling(np.asarray(tensors["rope_freqs.weight"].data), values)
    if kind == "none":
        return None
    if kind != "linear":
        raise UnsupportedError(
            "this rotary scaling is not handled", field=f"{name}.rope.scaling.type", value=kind
        )
    return {"rope_type": "linear", "factor": float(fields[f"{name}.rope.scaling.factor"])}


def _llama3_scaling(factors: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp keeps the finished factors; the settings that give them are among those that Llama 3 was made with."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor in (8.0, 32.0):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(
            **{key: values[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "rope_theta")},
            max_position_embeddings=values["max_position_embeddings"],
            rope_scaling=scaling,
        )
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
        width = values["head_dim"]
        plain = values["rope_theta"] ** (-np.arange(0, width, 2) / width)
        if factors.size == width // 2 and np.allclose(plain / scaled.numpy(), factors, rtol=1e-4):
            return scaling
    raise UnsupportedError(
        "these rotary factors are not handled", field="rope_freqs.weight", value=factors[:4].tolist()
    )
