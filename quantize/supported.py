"""What is refused from a configuration alone; everything else the gates decide.

A model is not accepted for looking like Llama: its own code is traced, and the traced graphs must give what that
code gives, at every position and beyond any window (`quantize.gates`). So no list of architectures is kept here.
What stands here is what a gate cannot see, because transformers itself would not compute what the checkpoint means:
code that came with the model, weights that are quantised already, a key that this version of transformers does not
know; and values whose graphs would be right only for the lengths at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from fedge.errors import UnsupportedError

Config = Mapping[str, object]
Kind = Literal["generate", "classify", "encode"]
_MAPPINGS: Final[dict[Kind, tuple[str, ...]]] = {
    "generate": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "classify": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    "encode": ("MODEL_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
}

# Notes of training and of other tools; none of them changes what the model computes.
_NO_MEANING_HERE: Final = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "transformers.js_config", "unsloth_version",
    "unsloth_fixed", "is_llama_config", "tokenizer_class", "auto_map", "quantization_config", "use_cache",
    "_attn_implementation_autoset", "_sliding_window_pattern", "max_window_layers", "rope_interleaved",
    "gradient_checkpointing",
    "pretraining_tp",
}  # fmt: skip

_ABSENT: Final = ("quantization_config", "auto_map")
# The only values handled for keys of which transformers reads no other, or reads them in other code than we trace.
_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "rope_interleaved": (False, None),
    "pretraining_tp": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "use_bidirectional_attention": (False, None),
}
_HINTS: Final = {
    "quantization_config": "Give the unquantised checkpoint, or a GGUF",
    "auto_map": "The model needs code of its own, which is never run",
    "rope_type": "Its frequencies depend on the length of the text at hand; set the scaling for one length",
}
# Rotary scalings whose frequencies depend on how long a text is.
_ROPE_BY_LENGTH: Final = ("dynamic", "longrope", "su")
_ROPE_KEYS: Final = ("rope_scaling", "rope_parameters")
_EARLIER_KEYS: Final = {"rope_theta", "rope_scaling", "rope_local_base_freq"}  # read from older checkpoints


def check_config(config: Config) -> str:
    """The architecture of a config.json. Raises UnsupportedError that names the key, its value and what is handled."""
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else str(named)
    check_plain(architecture, config)
    for key, allowed in _VALUES.items():
        if key in config and config[key] not in allowed:
            raise _refused(architecture, key, config[key])
    if kind_of(architecture) is None:
        raise unsupported_architecture(architecture)
    _check_kind(architecture, config.get("model_type"))
    check_keys(architecture, config)
    return architecture


def check_plain(architecture: str, config: Config) -> None:
    """Raises UnsupportedError for weights that are quantised already, and for a model with code of its own."""
    for key in _ABSENT:
        if config.get(key) is not None:
            raise _refused(architecture, key, config[key])


def check_keys(architecture: str, config: Config) -> None:
    """Raises UnsupportedError for a key whose meaning is not known, and for a scaling by length."""
    known = _known_keys(config)
    for key, value in sorted(config.items()):
        if key in _ROPE_KEYS:
            _check_rope(architecture, key, value)
        if key not in known and key not in _NO_MEANING_HERE and value is not None:
            raise _refused(architecture, key, value)


def kind_of(architecture: str) -> Kind | None:
    """What the installed transformers has it for: a causal LM, a classifier, or an encoder that needs a head."""
    from transformers.models.auto import modeling_auto as auto

    for kind, mappings in _MAPPINGS.items():
        for mapping in mappings:
            names: Mapping[str, Any] = getattr(auto, mapping)
            if any(architecture in _as_tuple(value) for value in names.values()):
                return kind
    return None


def unsupported_architecture(architecture: str) -> UnsupportedError:
    """The refusal of a model family that transformers has neither a causal LM nor an encoder for."""
    return UnsupportedError(
        "this model architecture is not supported",
        field="architecture",
        value=architecture,
        hint="Supported are causal LMs and encoders of transformers whose graphs pass the gates, LlamaForCausalLM, "
        "GPT2LMHeadModel, BertForSequenceClassification and others in docs/models.md",
    )


def _check_kind(architecture: str, kind: object) -> None:
    """transformers builds what `model_type` says, whatever the architecture is called."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    homes = {home for home, value in NAMES.items() if architecture in _as_tuple(value)}
    if homes and kind not in homes:
        raise UnsupportedError(f"{architecture} is of another kind of model", field="model_type", value=kind)


def _known_keys(config: Config) -> set[str]:
    """Keys that the model's own configuration class reads or writes; an unknown one may mean anything."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnsupportedError("this kind of model is not known here", field="model_type", value=kind)
    made = CONFIG_MAPPING[kind]()
    known = set(made.to_dict()) | set(vars(made)) | set(getattr(made, "attribute_map", {}))
    if "rope_parameters" in known:
        known |= _EARLIER_KEYS
    return known | {"architectures", "model_type"}


def _check_rope(architecture: str, key: str, value: object) -> None:
    for kind in _rope_types(value):
        if kind in _ROPE_BY_LENGTH:
            raise UnsupportedError(
                f"this value is not handled for {architecture}",
                field=key,
                value=value,
                hint=_HINTS["rope_type"],
            )


def _rope_types(value: object) -> Iterator[object]:
    """The type of a scaling, or of each kind of layer's."""
    if isinstance(value, dict):
        yield value.get("rope_type", value.get("type"))
        for inner in value.values():
            yield from _rope_types(inner)


def _refused(architecture: str, key: str, value: object) -> UnsupportedError:
    allowed = ", ".join("absent" if one is None else str(one) for one in _VALUES.get(key, ()))
    hint = _HINTS.get(key) or (
        f"Handled: {allowed}" if allowed else "This version of transformers does not know it; a newer one may"
    )
    return UnsupportedError(
        f"this value is not handled for {architecture}", field=key, value=value, hint=hint
    )


def _as_tuple(value: object) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (str(value),)
