"""What is handled: architectures, and every configuration value inside them. Anything else stops by name.

"It looks like Llama" is how exporters lose a soft-cap or a sliding window and still write plausible text. So a value
must be on one of the lists below, or what every configuration says by default; an unknown key stops as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

from fedge.errors import UnsupportedError

Config = Mapping[str, object]

# Sizes and numbers that the graphs take over as they are, whatever they say.
_TAKEN_OVER: Final = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "attention_bias",
    "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "architectures",
}  # fmt: skip

# Notes of training and of other tools; none of them changes what the model computes.
_NO_MEANING_HERE: Final = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "max_window_layers", "id2label", "label2id",
    "return_dict", "output_attentions", "output_hidden_states", "is_llama_config", "problem_type", "tokenizer_class",
}  # fmt: skip

# The only values handled for keys that do change it.
_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "tie_word_embeddings": (True,),
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "auto_map": (None,),
}

# Rotary scalings whose frequencies do not depend on the length of the text at hand.
_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")

# Per architecture: what its own keys may say beyond the lists above. None: any value.
ARCHITECTURES: Final[dict[str, dict[str, tuple[object, ...] | None]]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"sliding_window": None},  # not used while use_sliding_window is off
    "Qwen3ForCausalLM": {"sliding_window": None},
}

_HINTS: Final = {
    "tie_word_embeddings": "A head of its own is not handled yet: only models that share it with the embedding",
    "quantization_config": "Give the unquantised checkpoint, or a GGUF",
    "auto_map": "The model needs code of its own, which is never run",
}


def check_config(config: Config) -> str:
    """The architecture of a config.json. Raises UnsupportedError that names the key, its value and what is handled."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else str(named)
    if architecture not in ARCHITECTURES:
        raise unsupported_architecture(architecture)
    own = ARCHITECTURES[architecture]
    values = {"tie_word_embeddings": False, **config}  # absent means untied to every class in the table
    for key, value in sorted(values.items()):
        allowed = own.get(key, _VALUES.get(key)) if key in own or key in _VALUES else ()
        if key in _TAKEN_OVER or key in _NO_MEANING_HERE or allowed is None or value in allowed:
            continue
        if key == "rope_scaling" and _rope_is_handled(value):
            continue
        if key in _generic_defaults() and value == _generic_defaults()[key]:
            continue
        if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
            continue
        raise UnsupportedError(
            f"this value is not handled for {architecture}",
            field=key,
            value=value,
            hint=_HINTS.get(key)
            or (f"Handled: {_listed(allowed)}" if allowed else "Unknown to this version"),
        )
    return architecture


@cache
def _generic_defaults() -> dict[str, object]:
    """What every transformers configuration says unless told otherwise; older versions write all of it."""
    from transformers import PretrainedConfig

    return dict(PretrainedConfig().to_dict())


def unsupported_architecture(architecture: str) -> UnsupportedError:
    """The refusal of a model family, with the list of those that are handled."""
    return UnsupportedError(
        "this model architecture is not supported",
        field="architecture",
        value=architecture,
        hint=f"Supported: {', '.join(ARCHITECTURES)}",
    )


def _rope_is_handled(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and value.get("rope_type", value.get("type")) in _ROPE_TYPES


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join("absent" if value is None else str(value) for value in values)
