"""An adapter in the words of PEFT (Hugging Face's adapter format): names, config, and what may come in.

The rule: no path exists on which a file counts as loaded while some of it was not used. Every tensor in the file
and every slot in the model is accounted for, and a config value that would change the function computed, and that
we do not compute, stops the import by its field name. Files are `fedge/io/peft_folder.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fedge.errors import DataError, UnsupportedError
from fedge.lora import ALL_LINEAR, DENSE, LAYER_PATH, AdapterLayout, LoraConfig

CONFIG_FILE: Final = "adapter_config.json"
TENSOR_FILE: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."

_READ: Final = frozenset(
    str.split(
        """
        peft_type r lora_alpha use_rslora target_modules rank_pattern alpha_pattern layers_to_transform
        layers_pattern modules_to_save
        """
    )
)
# Fields that say nothing about the function computed. `fan_in_fan_out` is how the base's matrices lie, which PEFT
# reads from the modules themselves; A and B are the same either way.
_NEUTRAL: Final = frozenset(
    str.split(
        """
        auto_mapping base_model_name_or_path revision task_type inference_mode lora_dropout runtime_config
        megatron_core peft_version qalora_group_size fan_in_fan_out
        """
    )
)
# Fields of PEFT 0.21 that change the function; here they may only say "off".
_KNOWN: Final = frozenset(
    str.split(
        """
        alora_invocation_tokens arrow_config bias corda_config ensure_weight_tying eva_config exclude_modules
        init_lora_weights kasa_config layer_replication loftq_config lora_bias lora_ga_config megatron_config
        monteclora_config target_parameters trainable_token_indices use_bdlora use_dora use_qalora velora_config
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


def peft_name(name: str, layer_path: str = LAYER_PATH) -> str:
    """`L3/self_attn.q_proj.A` -> `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight`.

    `dense/classifier.bias` -> `base_model.model.classifier.bias`.
    """
    if name.startswith(DENSE):
        return _PREFIX + name.removeprefix(DENSE)
    layer, _, rest = name.partition("/")
    path, _, letter = rest.rpartition(".")
    return f"{_PREFIX}{layer_path}.{layer[1:]}.{path}.lora_{letter}.weight"


def peft_config(
    config: LoraConfig,
    base_model_name: str,
    *,
    layout: AdapterLayout | None = None,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
) -> dict[str, object]:
    """The content of `adapter_config.json`: alpha and `use_rslora` are kept, so that PEFT computes our scale.

    `all-linear` means more in PEFT than the matrices of the layers, so it is written as the paths of `layout`.
    """
    targets: object = config.targets if isinstance(config.targets, str) else sorted(config.targets)
    if config.targets == ALL_LINEAR:
        if layout is None:
            raise DataError("names of all matrices are needed", field="targets", value=ALL_LINEAR)
        targets = [path for path, _, _ in layout.modules]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": list(config.layers) or None,
        "modules_to_save": list(config.modules_to_save) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
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
    return _config(fields), tuple(notices)


def _config(fields: Mapping[str, object]) -> LoraConfig:
    r, alpha, rslora = fields.get("r"), fields.get("lora_alpha"), fields.get("use_rslora", False)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise DataError("rank must be a positive whole number", field="r", value=r)
    if not _is_number(alpha):
        raise DataError("alpha must be a number", field="lora_alpha", value=alpha)
    if not isinstance(rslora, bool):
        raise DataError("flag must be true or false", field="use_rslora", value=rslora)
    pattern = fields.get("layers_pattern")
    if pattern not in _OFF:
        raise UnsupportedError("layers are told by number alone", field="layers_pattern", value=pattern)
    targets = fields.get("target_modules")
    return LoraConfig(
        r=r,
        alpha=float(alpha),  # type: ignore[arg-type]  # `_is_number` has looked
        targets=targets if isinstance(targets, str) else _names("target_modules", targets),
        rslora=rslora,
        rank_pattern={name: int(value) for name, value in _pattern(fields, "rank_pattern", int).items()},
        alpha_pattern=_pattern(fields, "alpha_pattern", float),
        layers=_layers(fields.get("layers_to_transform")),
        modules_to_save=_names("modules_to_save", fields.get("modules_to_save") or []),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UnsupportedError("must be names, or one pattern", field=field, value=value)
    return tuple(sorted(value))


def _pattern(fields: Mapping[str, object], field: str, kind: type) -> dict[str, float]:
    value = fields.get(field) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError("must map patterns to numbers", field=field, value=value)
    for number in value.values():
        if not _is_number(number) or (kind is int and (not isinstance(number, int) or number < 1)):
            raise DataError("must map patterns to numbers", field=field, value=value)
    return {name: float(number) for name, number in value.items()}


def _layers(value: object) -> tuple[int, ...]:
    numbers = [value] if isinstance(value, int) else [] if value is None else value
    if not isinstance(numbers, list | tuple) or not all(type(n) is int and n >= 0 for n in numbers):
        raise DataError("must be numbers of layers", field="layers_to_transform", value=value)
    return tuple(sorted(numbers))


def match_names(found: Iterable[str], layout: AdapterLayout) -> NameMatch:
    """Account for every tensor of a file and every slot of the layout. Raises DataError naming what is left over.

    Names made on the bare model (one `model.` less) are mapped, with a notice; a mixture of both is refused.
    """
    names = sorted(found)
    ours = [*layout.a_shapes, *layout.shapes]
    expected = {peft_name(name, layout.layer_path): name for name in ours}
    bare_path = layout.layer_path.partition(".")[2]
    bare = {peft_name(name, bare_path): name for name in ours}
    notices: tuple[str, ...] = ()
    if bare_path and names and all(name in bare for name in names):
        expected, notices = bare, ("adapter was made on the bare model; its names were mapped",)
    unmatched = [name for name in names if name not in expected]
    if unmatched:
        is_lora = ".lora_" in unmatched[0]
        whole = [name for name in expected if ".lora_" not in name]
        raise DataError(
            f"{len(unmatched)} tensors of the adapter belong nowhere",
            field=unmatched[0],
            value=unmatched[1:3],
            hint=f"A name here looks like {next(iter(expected))}"
            if is_lora
            else f"Trained in full here: {', '.join(whole) or 'nothing, by this bundle and the modules_to_save'}",
        )
    missing = sorted(set(expected) - set(names))
    if missing:
        raise DataError(f"{len(missing)} tensors of the adapter are missing", field=missing[0])
    return NameMatch({name: expected[name] for name in names}, notices)
