"""What a PEFT config and its tensor names may say: everything is used, or refused by name."""

import pytest

from fedge.errors import DataError, UnsupportedError
from fedge.lora import AdapterLayout, LoraConfig
from fedge.peft import lora_config, match_names, peft_config, peft_name

LAYOUT = AdapterLayout.of(2, {"self_attn.q_proj": (12, 16)}, 4)
NAMES = [peft_name(name) for name in [*LAYOUT.a_shapes, *LAYOUT.b_shapes]]


def test_names_are_those_of_peft() -> None:
    assert peft_name("L3/self_attn.q_proj.A") == (
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_config_round_trip_keeps_the_scale(rslora: bool) -> None:
    config = LoraConfig(r=16, alpha=16, targets=("q_proj", "v_proj"), rslora=rslora)
    back, notices = lora_config(peft_config(config, "base"))
    assert back == config
    assert back.scale == (4.0 if rslora else 1.0)
    assert notices == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("peft_type", "ADALORA"),
        ("init_lora_weights", "pissa"),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("invented_next_year", True),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=field):
        lora_config({**peft_config(LoraConfig(), "base"), field: value})


@pytest.mark.parametrize("value", [None, False, {}])
def test_an_unknown_setting_that_is_off_is_accepted_with_a_notice(value: object) -> None:
    _, notices = lora_config({**peft_config(LoraConfig(), "base"), "invented_next_year": value})
    assert len(notices) == 1
    assert "invented_next_year" in notices[0]


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", True), ("lora_alpha", "x"), ("use_rslora", 1)])
def test_senseless_numbers_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(DataError, match=field):
        lora_config({**peft_config(LoraConfig(), "base"), field: value})


def test_every_name_is_matched() -> None:
    match = match_names(NAMES, LAYOUT)
    assert set(match.ours.values()) == {*LAYOUT.a_shapes, *LAYOUT.b_shapes}
    assert match.notices == ()


def test_names_of_the_bare_model_are_mapped_with_a_notice() -> None:
    bare = [name.replace("model.model.", "model.", 1) for name in NAMES]
    match = match_names(bare, LAYOUT)
    assert set(match.ours.values()) == {*LAYOUT.a_shapes, *LAYOUT.b_shapes}
    assert len(match.notices) == 1


def test_one_missing_one_surplus_or_a_mixture_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"missing.*layers\.1\.self_attn\.q_proj\.lora_B"):
        match_names(NAMES[:-1], LAYOUT)
    with pytest.raises(DataError, match=r"belong nowhere.*lora_magnitude"):
        match_names(
            [*NAMES, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"], LAYOUT
        )
    with pytest.raises(DataError, match="belong nowhere"):
        match_names([NAMES[0].replace("model.model.", "model.", 1), *NAMES[1:]], LAYOUT)
    with pytest.raises(DataError, match="missing"):
        match_names([], LAYOUT)
