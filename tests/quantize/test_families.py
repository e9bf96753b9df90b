"""Families other than the tiny bundle's: the shipped graphs against transformers' own modules, and what is refused.

Cases F06 (matrices the other way round), F07 (soft-caps, windows, two rotary tables) and F08 (four counts).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from torch_twin import torch_twin

from edge_agent.bundle import open_bundle
from fedge.errors import DataError, UnsupportedError
from fedge.io.weight_file import map_weights
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, open_manifest
from quantize.anatomy import dissect
from quantize.bundle import quantize
from quantize.reference import Batch, random_adapter, torch_gradients
from quantize.runner import Runner
from quantize.source import build_model, check_counts, load

SHAPES = ((1, 5), (3, 40), (2, 64))  # the longer ones reach far beyond the window of 16


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> tuple[str, Path]:
    return request.param, family_folder(request.param)


def manifest_of(folder: Path) -> Manifest:
    bundle = folder / "bundle"
    return open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())


def runner_of(folder: Path) -> Runner:
    manifest, bundle = manifest_of(folder), folder / "bundle"
    return Runner(
        bundle,
        map_weights(bundle / WEIGHTS, manifest.tensors),
        manifest.layers,
        manifest.head_rows,
        kinds=manifest.layer_kinds,
        cap=manifest.logit_cap,
    )


def test_a_family_passes_its_gates(family: tuple[str, Path]) -> None:
    name, folder = family
    manifest = manifest_of(folder)
    for gate in ("cut_gradient_error", "gradient_error", "position_error"):
        assert manifest.gates[gate] <= 1e-5, gate
    for gate in ("loss_error", "aux_error"):
        assert manifest.gates[gate] <= 1e-5, gate
    assert manifest.gates["decode_error"] <= 1e-6
    assert {path.rpartition(".")[2] for path in manifest.lora_shapes} == set(families.FAMILIES[name].targets)


def test_gradients_are_those_of_torch_beyond_the_window_too(family: tuple[str, Path]) -> None:
    """Loss at every position and the gradient of every A and B, by hooks on transformers' untouched modules."""
    _, folder = family
    manifest, runner = manifest_of(folder), runner_of(folder)
    twin = torch_twin(open_bundle(folder / "bundle"), folder / "model")
    adapter = random_adapter(twin, manifest.lora, np.random.default_rng(3), scale=0.05)
    for count, width in SHAPES:
        draw = np.random.default_rng(width)
        batch = Batch.of([draw.integers(2, 300, width - 3 * row).tolist() for row in range(count)], pad=0)
        loss, expected = torch_gradients(twin, manifest.lora, adapter, batch)
        found_loss, found = runner.gradients(batch.ids, batch.mask, batch.labels, adapter)
        assert abs(found_loss - loss) <= 1e-5
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert np.linalg.norm(value) > 1e-7, tensor  # a vanishing gradient would prove nothing
            assert np.linalg.norm(found[tensor] - value) <= 1e-5 * np.linalg.norm(value), tensor


@pytest.mark.parametrize(
    ("name", "kinds", "cap", "tied", "aux"),
    [
        ("llama", (), 0.0, False, {"mask", "cos", "sin"}),
        ("gpt2", (), 0.0, True, {"mask"}),
        ("gemma2", ("sliding", "full"), 3.0, True, {"mask@sliding", "mask@full", "cos", "sin"}),
        (
            "gemma3",
            ("sliding", "sliding", "full"),
            0.0,
            True,
            {f"{n}@{kind}" for n in ("mask", "cos", "sin") for kind in ("sliding", "full")},
        ),
    ],
)
def test_the_manifest_says_what_is_special(
    name: str,
    kinds: tuple[str, ...],
    cap: float,
    tied: bool,
    aux: set[str],
    family_folder: Callable[[str], Path],
) -> None:
    manifest = manifest_of(family_folder(name))
    assert (manifest.layer_kinds, manifest.logit_cap, manifest.head_tied) == (kinds, cap, tied)
    assert set(manifest.aux) == aux
    assert ("HEAD.q" in manifest.tensors) is not tied
    assert ("POS" in manifest.tensors) == (name == "gpt2")
    assert manifest.positions_max == 128


def config_of(name: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**{**tiny.SIZES, **values})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lambda: config_of("MixtralConfig"), r"layers\.0 cannot be traced.*MixtralDecoderLayer"),
        (lambda: config_of("CohereConfig"), "after its output layer.*CohereForCausalLM"),
        (lambda: config_of("PhiConfig", tie_word_embeddings=False), "output layer with a bias"),
        (lambda: config_of("OPTConfig", ffn_dim=128, word_embed_proj_dim=32), "between the last layer"),
    ],
    ids=["experts", "scaled logits", "biased head", "projected embedding"],
)
def test_what_cannot_be_taken_apart_is_refused_by_name(config: Callable[[], Any], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        dissect(build_model(config()))


def test_layers_that_compute_different_things_are_refused(tmp_path: Path) -> None:
    """One scale per layer number: the pattern layer's code does not stand for the others'."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=304, n_embd=64, n_layer=2, n_head=4, n_positions=128, scale_attn_by_inverse_layer_idx=True
    )
    config.initializer_range, config.eos_token_id = 0.15, 0
    with pytest.raises(UnsupportedError, match=r"h\.1 computes something else than transformer\.h\.0"):
        quantize(
            str(tiny.write_model(tmp_path / "model", config)),
            tmp_path / "out",
            tiny.PUBLISHER,
            lora=tiny.LORA,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_looks_ahead_is_no_causal_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(config_of("LlamaConfig"))
    layer = model.model.layers[0]
    plain = type(layer).forward

    def unmasked(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, **words: Any) -> Any:
        return plain(self, hidden_states, attention_mask * 0, **words)

    monkeypatch.setattr(type(layer), "forward", unmasked)
    with pytest.raises(UnsupportedError, match="no causal LM"):
        dissect(model)


def test_counts_that_disagree_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """F08: rows in, rows out, tokenizer and configuration; more rows than ids are ordinary, all of them are kept."""
    model = load(str(tiny_model)).model
    model.config.vocab_size = 300
    with pytest.raises(DataError, match=r"different vocabularies.*300.*304"):
        check_counts(model, eos=0)
    model.config.vocab_size = 304
    with pytest.raises(DataError, match="eos_token_id"):
        check_counts(model, eos=304)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 305}))
    with pytest.raises(DataError):
        load(str(folder))
