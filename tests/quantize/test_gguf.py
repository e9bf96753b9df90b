"""GGUF in: every family and every type, judged by what the model computes and by transformers' own reader."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
import torch
import transformers

from fedge.errors import DataError, UnsupportedError
from quantize.formats import BLOCK, FORMATS, converted, decode
from quantize.gguf_blocks import read_blocks
from quantize.gguf_families import FAMILIES, Fields, config_of
from quantize.gguf_source import read_model

K = gguf.GGMLQuantizationType
SIZES = {**tiny.SIZES, "head_dim": 16}
WINDOW = {"sliding_window": 8}
ALWAYS_TIED = ("gemma", "gemma2")
# What transformers' reader cannot know: it takes these from its defaults, whatever the file says.
THEIR_DEFAULTS: dict[str, dict[str, object]] = {"qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024}}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen2": transformers.Qwen2Config(**tiny.SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES),
    "phi3": transformers.Phi3Config(**tiny.SIZES, sliding_window=64),
    "gemma": transformers.GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "gemma2": transformers.Gemma2Config(**SIZES, **WINDOW, query_pre_attn_scalar=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=16),
    "gpt2": transformers.GPT2Config(
        vocab_size=304, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    ),
}


def make_model(family: str, **more: object) -> Any:
    """Random weights; norms and biases away from 1 and 0, or a mistake in them would not show."""
    config = CONFIGS[family].__class__.from_dict({**CONFIGS[family].to_dict(), **more})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for value in model.parameters():
            if value.dim() == 1:
                torch.nn.init.normal_(value, mean=0.5, std=0.2)
    return model


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """(model, exact parts), whether or not its family can be exported yet."""
    reader = gguf.GGUFReader(path)
    fields = Fields({name: value.contents() for name, value in reader.fields.items()})
    return read_model(reader, fields, config_of(fields, {tensor.name: tensor for tensor in reader.tensors}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(1, 41).reshape(2, 20)).logits
    return found


@pytest.mark.parametrize(
    ("family", "tied"),
    [(name, tied) for name in sorted(FAMILIES) for tied in (True, False) if tied or name not in ALWAYS_TIED],
)
def test_a_family_computes_what_its_model_computes(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    found, exact = read(tiny_gguf.write_gguf(tmp_path / "tiny.gguf", family, model))
    assert not exact
    assert found.config.tie_word_embeddings is tied
    assert (logits(found) - logits(model)).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_transformers_own_reader_finds_the_same_numbers(family: str, tmp_path: Path) -> None:
    model = make_model(family, **THEIR_DEFAULTS.get(family, {}))
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", family, model, lambda name: K.Q8_0)
    found = dict(read(path)[0].named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    for name, value in theirs.named_parameters():
        assert torch.equal(found[name], value), name


def random_matrix(rows: int = 48, columns: int = 512) -> np.ndarray:
    random = np.random.default_rng(5)
    size = np.exp(random.standard_normal((rows, columns // BLOCK, 1)))
    blocks = random.standard_normal((rows, columns // BLOCK, BLOCK)) * size * 0.02
    return (blocks + 0.01 * size).reshape(rows, columns).astype(np.float32)


def stored(kind: Any, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of 16 rows of 512 weights, what the gguf library says they mean). K types get random bytes."""
    if kind in (K.Q4_K, K.Q5_K):
        size, _ = gguf.GGML_QUANT_SIZES[kind][1], None
        data = np.random.default_rng(seed).integers(0, 256, (16, 2, size), dtype=np.uint8)
        scales = np.random.default_rng(seed).uniform(1e-4, 1e-3, (16, 2, 2)).astype(np.float16)
        data[..., :4] = scales.view(np.uint8)
        rows = data.reshape(16, -1)
    else:
        rows = np.asarray(gguf.quantize(random_matrix()[:16], kind))
    return rows, np.asarray(gguf.dequantize(rows, kind), np.float32)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (K.Q4_0, "int4d"),
        (K.Q4_1, "int4d"),
        (K.Q5_0, "int8g"),
        (K.Q5_1, "int8d"),
        (K.Q8_0, "int8g"),
    ],
    ids=str,
)
def test_a_grid_of_ours_comes_over_bit_for_bit(kind: Any, name: str) -> None:
    rows, expected = stored(kind)
    found = read_blocks(kind, rows)
    assert found is not None
    assert found[0] == name
    assert np.array_equal(decode(found[1], FORMATS[name]), expected)


@pytest.mark.parametrize(("kind", "name"), [(K.Q4_K, "int4d"), (K.Q5_K, "int8d")], ids=str)
def test_the_codes_of_k_types_stay_and_their_scales_are_rounded_to_halves(kind: Any, name: str) -> None:
    rows, expected = stored(kind)
    found = read_blocks(kind, rows)
    assert found is not None
    assert found[0] == name
    apart = np.abs(decode(found[1], FORMATS[name]) - expected).max(-1)
    assert (apart <= 2**-10 * np.abs(expected).max(-1)).all()


@pytest.mark.parametrize("kind", [K.F16, K.BF16, K.Q6_K, K.Q3_K, K.Q2_K], ids=str)
def test_other_types_have_no_grid_of_ours(kind: Any) -> None:
    assert read_blocks(kind, np.zeros((1, 512), np.uint8)) is None


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        (K.Q4_0, {"int4d", "int8g", "int8d"}),
        (K.Q4_1, {"int4d", "int8d"}),
        (K.Q5_0, {"int8g", "int8d"}),
        (K.Q5_1, {"int8d"}),
        (K.Q8_0, {"int8g", "int8d"}),
    ],
    ids=["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"],  # a set's text has another order in every process
)
def test_a_smaller_grid_goes_into_a_larger_one_without_change(kind: Any, held: set[str]) -> None:
    rows, expected = stored(kind)
    found = read_blocks(kind, rows)
    assert found is not None
    for name, fmt in FORMATS.items():
        parts = converted(*found, fmt)
        assert (parts is not None) == (name in held), name
        if parts is not None:
            assert {suffix: part.dtype.name for suffix, part in parts.items()} == {
                part.suffix: part.dtype for part in fmt.parts
            }
            assert np.array_equal(decode(parts, fmt), expected), name


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", "llama", make_model("llama"), lambda name: K.Q8_0)
    data = path.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # dimensions, two sizes, then the type
    assert data[at] == K.Q8_0
    path.write_bytes(data[:at] + bytes([K.Q8_1]) + data[at + 1 :])
    with pytest.raises((UnsupportedError, DataError)):
        read(path)


@pytest.mark.parametrize("family", ["mamba", "llama4", "nonsense"])
def test_an_architecture_without_rules_is_named(family: str) -> None:
    fields = Fields({"general.architecture": family})
    with pytest.raises(UnsupportedError, match=rf"{family} \(GGUF\)"):
        config_of(fields, {})


def test_llama_3_factors_are_recognised_and_others_refused(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**{**SIZES, "rope_theta": 500000.0, "rope_scaling": scaling})
    model = make_model("llama", **{k: config.to_dict()[k] for k in ("rope_theta", "rope_scaling")})
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() == pytest.approx(32)
    values = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "rope_theta": 500000.0}
    from quantize.gguf_families import _llama3_scaling

    assert _llama3_scaling(factors, {**values, "max_position_embeddings": 131072}) == scaling
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        _llama3_scaling(factors * 1.01, {**values, "max_position_embeddings": 131072})
