"""An adapter in the words of PEFT (Hugging Face's adapter format): names, config, and what may come in.

The rule: no path exists on which a file counts as loaded while some of it was not used. Every tensor in the file
and every slot in the model is accounted for, and a config value that would change the function computed, and that
we do not compute, stops the import by its field name. Files are `hub/peft.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedge.errors import DataError, UnsupportedError
from fedge.lora import AdapterLayout, LoraConfig

CONFIG_FILE: Final = "adapter_config.json"
TENSOR_FILE: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."

_READ: Final = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"})
# Fields that say nothing about the function computed.
_NEUTRAL: Final = frozenset(
    str.split(
        """
        auto_mapping base_model_name_or_path revision task_type inference_mode lora_dropout runtime_config
        megatron_core peft_version qalora_group_size
        """
    )
)
# Fields of PEFT 0.21 that change the function; here they may only say "off".
_KNOWN: Final = frozenset(
    str.split(
        """
        alora_invocation_tokens alpha_pattern arrow_config bias corda_config ensure_weight_tying eva_config
        exclude_modules fan_in_fan_out init_lora_weights kasa_config layer_replication layers_pattern
        layers_to_transform loftq_config lora_bias lora_ga_config megatron_config modules_to_save monteclora_config
        rank_pattern target_parameters trainable_token_indices use_bdlora use_dora use_qalora velora_config
        """
    )
)
_OFF: Final[tuple[object, ...]] = (None, False, "none", "", [], {})
_PLAIN_STARTS: Final = (True, False, "gaussian")  # the other ways to start rewrite the base model


@dataclass(frozen=True, slots=True)
class NameMatch:
    """Which tensor of a file is which of ours, and what the operator should be told about it."""

    ours: dict[str, str]  # name in the file -> `L{i}/{module}.A` or `.B`
    notices: tuple[str, ...]


def peft_name(name: str) -> str:
    """`L3/self_attn.q_proj.A` -> `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`."""
    layer, _, rest = name.partition("/")
    path, _, letter = rest.rpartition(".")
    return f"{_PREFIX}model.layers.{layer[1:]}.{path}.lora_{letter}.weight"


def peft_config(config: LoraConfig, base_model_name: str) -> dict[str, object]:
    """The content of `adapter_config.json`: the flag `use_rslora` is kept, so PEFT computes our scale."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": sorted(config.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def lora_config(fields: Mapping[str, object]) -> tuple[LoraConfig, tuple[str, ...]]:
    """Our config of a PEFT config, and notices. Raises UnsupportedError naming the first field we do not compute."""
    if fields.get("peft_type") != "LORA":
        raise UnsupportedError(
            "only LoRA adapters are read", field="peft_type", value=fields.get("peft_type")
        )
    notices = []
    for field in sorted(fields.keys() - _READ - _NEUTRAL):
        value = fields[field]
        if value not in _OFF and not (field == "init_lora_weights" and value in _PLAIN_STARTS):
            raise UnsupportedError(
                "adapter uses a setting that is not computed here",
                field=field,
                value=value,
                hint="Train or convert the adapter without it",
            )
        if field not in _KNOWN:
            notices.append(f"config field {field} is not known here; its value {value!r} means off")
    return _numbers(fields), tuple(notices)


def _numbers(fields: Mapping[str, object]) -> LoraConfig:
    r, alpha, rslora = fields.get("r"), fields.get("lora_alpha"), fields.get("use_rslora", False)
    targets = fields.get("target_modules")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise DataError("rank must be a positive whole number", field="r", value=r)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise DataError("alpha must be a number", field="lora_alpha", value=alpha)
    if not isinstance(rslora, bool):
        raise DataError("flag must be true or false", field="use_rslora", value=rslora)
    if not isinstance(targets, list | tuple) or not all(isinstance(t, str) for t in targets):
        raise UnsupportedError("targets must be a list of names", field="target_modules", value=targets)
    return LoraConfig(r=r, alpha=float(alpha), targets=tuple(sorted(targets)), rslora=rslora)


def match_names(found: Iterable[str], layout: AdapterLayout) -> NameMatch:
    """Account for every tensor of a file and every slot of the layout. Raises DataError naming what is left over.

    Names made on the bare model (one `model.` less) are mapped, with a notice; a mixture of both is refused.
    """
    names = sorted(found)
    expected = {peft_name(name): name for name in [*layout.a_shapes, *layout.b_shapes]}
    bare = {name.replace(f"{_PREFIX}model.", _PREFIX, 1): ours for name, ours in expected.items()}
    notices: tuple[str, ...] = ()
    if names and all(name in bare for name in names):
        expected, notices = bare, ("adapter was made on the bare model; its names were mapped",)
    unmatched = [name for name in names if name not in expected]
    if unmatched:
        raise DataError(
            f"{len(unmatched)} tensors of the adapter belong nowhere",
            field=unmatched[0],
            value=unmatched[1:3],
            hint=f"A name here looks like {next(iter(expected))}",
        )
    missing = sorted(set(expected) - set(names))
    if missing:
        raise DataError(f"{len(missing)} tensors of the adapter are missing", field=missing[0])
    return NameMatch({name: expected[name] for name in names}, notices)
