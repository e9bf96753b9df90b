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
        ("exclude_modules", ["v_proj"]),
        ("target_modules", None),
        ("layers_pattern", "h"),
        ("trainable_token_indices", [1, 2]),
        ("invented_next_year", True),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=field):
        lora_config({**peft_config(LoraConfig(), "base"), field: value})


def test_everything_that_names_modules_goes_both_ways() -> None:
    """F01, F05: patterns, layers and heads are part of the function."""
    config = LoraConfig(
        r=16,
        targets=("q_proj", "score"),
        rank_pattern={"q_proj": 4},
        alpha_pattern={r"1\.mlp": 0.5},
        layers=(1, 3),
        modules_to_save=("classifier",),
    )
    assert lora_config(peft_config(config, "base")) == (config, ())
    regex = LoraConfig(targets=r".*\.(1|2)\..*q_proj")
    assert lora_config(peft_config(regex, "base"))[0] == regex


def test_all_linear_is_written_as_the_matrices_that_it_means_here() -> None:
    """In PEFT the word also means matrices outside of the layers: a pooler, for one."""
    fields = peft_config(LoraConfig(targets="all-linear"), "base", layout=LAYOUT)
    assert fields["target_modules"] == ["self_attn.q_proj"]
    with pytest.raises(DataError, match="targets"):
        peft_config(LoraConfig(targets="all-linear"), "base")


def test_how_the_base_keeps_its_matrices_does_not_change_a_and_b() -> None:
    """F06: PEFT sets the flag itself from the module that it finds."""
    fields = peft_config(LoraConfig(), "base", fan_in_fan_out=True)
    assert fields["fan_in_fan_out"] is True
    assert lora_config(fields) == (LoraConfig(), ())


def test_names_follow_the_models_own_paths_and_heads_are_matched() -> None:
    """F05: a head is in the file, or the file is refused."""
    layout = AdapterLayout.of(
        1, {"attn.c_attn": (48, 16)}, 4, layer_path="transformer.h", dense={"score.weight": (3, 16)}
    )
    names = [peft_name(name, layout.layer_path) for name in [*layout.a_shapes, *layout.shapes]]
    assert names[0] == "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert names[-1] == "base_model.model.score.weight"
    assert set(match_names(names, layout).ours.values()) == {*layout.a_shapes, *layout.shapes}
    bare = [name.replace("transformer.", "", 1) for name in names]
    assert match_names(bare, layout).notices
    with pytest.raises(DataError, match=r"missing.*score\.weight"):
        match_names(names[:-1], layout)


def test_modules_to_save_are_found_as_peft_finds_them() -> None:
    """F05: by the end of a module's path, letter by letter; what the config does not save is no part of the file."""
    dense = {
        f"{module}.{kind}": (3,) for module in ("pre_classifier", "head.score") for kind in ("weight", "bias")
    }
    layout = AdapterLayout.of(1, {"attn.c_attn": (48, 16)}, 4, dense=dense)

    def saved(*modules: str) -> set[str]:
        config = LoraConfig(r=4, targets="all-linear", modules_to_save=modules)
        return {name.rpartition(".")[0] for name, _ in layout.like(config).dense}

    assert saved() == saved("lm_head") == saved("weight") == set()
    assert saved("classifier", "score") == {"pre_classifier", "head.score"}
    assert saved("pre_classifier") == {"pre_classifier"}
    assert saved("head") == saved("head.score") == {"head.score"}


def test_a_whole_matrix_that_is_not_trained_here_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"lm_head\.weight.*in full here: nothing"):
        match_names([*NAMES, "base_model.model.lm_head.weight"], LAYOUT)


@pytest.mark.parametrize("value", [None, False, {}])
def test_an_unknown_setting_that_is_off_is_accepted_with_a_notice(value: object) -> None:
    _, notices = lora_config({**peft_config(LoraConfig(), "base"), "invented_next_year": value})
    assert len(notices) == 1
    assert "invented_next_year" in notices[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", True),
        ("lora_alpha", "x"),
        ("use_rslora", 1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "4"}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", "all"),
    ],
)
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
