"""Loading: exact GGUF import, and every refusal by name before any work."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fedge.errors import ConfigError, DataError, NoInputError, UnsupportedError
from fedge.lora import LoraConfig
from quantize.blocks import adapted_modules, check_layers
from quantize.choice import choose
from quantize.formats import FORMATS, decode
from quantize.source import load
from quantize.supported import check_config
from quantize.weights import quantise

Q = gguf.GGMLQuantizationType
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows (its converter's `permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, kind: Any, change: Callable[[Any], None] = lambda writer: None
) -> Path:
    """A GGUF of a transformers Llama as llama.cpp's converter lays it out."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    letters = [chr(code) for code in range(0x100, 0x100 + config.vocab_size - 2)]
    letters.append(letters[0] + letters[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", *letters])
    writer.add_token_types([3] + [1] * len(letters))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(0)
    change(writer)
    for name, value in model.state_dict().items():
        weight = value.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, module = name.removesuffix(".weight").split(".", 3)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            target = f"blk.{layer}.{GGUF_NAMES[module]}.weight"
            weight = interleaved(weight, heads[GGUF_NAMES[module]]) if GGUF_NAMES[module] in heads else weight
        else:
            target = "token_embd.weight" if "embed" in name else "output_norm.weight"
        packed = kind if weight.ndim == 2 and target != "token_embd.weight" else None
        packed = Q.Q8_0 if target == "token_embd.weight" else packed
        if packed is None:
            writer.add_tensor(target, weight)
        else:
            writer.add_tensor(target, gguf.quantize(weight, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**tiny.SIZES)).eval()


@pytest.mark.parametrize(
    ("kind", "name"), [(Q.Q4_0, "int4d"), (Q.Q4_1, "int4d"), (Q.Q8_0, "int8g")], ids=lambda v: str(v)
)
def test_a_gguf_comes_over_exactly(kind: Any, name: str, llama: Any, tmp_path: Path) -> None:
    source = load(str(write_gguf(tmp_path / "tiny.gguf", llama, kind)))
    assert choose(source, None).format.name == name
    for parameter in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        weight = llama.model.layers[1].get_submodule(parameter).weight.detach().numpy()
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)  # rows do not change their quantisation
        full = f"model.layers.1.{parameter}.weight"
        found_format, parts = source.exact[full]
        found = decode(parts, FORMATS[found_format])
        assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max()
        assert np.array_equal(source.model.get_parameter(full).detach().numpy(), found)
    before = source.model(torch.arange(1, 20)[None]).logits
    quantise(source, FORMATS[name], lambda phase, fraction: None)
    assert torch.equal(source.model(torch.arange(1, 20)[None]).logits, before)


def test_a_gguf_computes_what_the_model_computes(llama: Any, tmp_path: Path) -> None:
    source = load(str(write_gguf(tmp_path / "tiny.gguf", llama, None)))
    twin, ids = copy.deepcopy(llama), torch.arange(1, 30)[None]
    twin.get_input_embeddings().weight.data = source.model.get_input_embeddings().weight.data  # Q8_0
    assert (source.model(ids).logits - twin(ids).logits).abs().max() < 1e-5
    assert choose(source, None).format.name == "int8g"
    assert (source.eos_id, source.pad_id, source.architecture) == (0, 0, "LlamaForCausalLM")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_expert_count(4), "llama.expert_count"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type"),
        (lambda w: w.add_rope_dimension_count(8), "llama.rope.dimension_count"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
        (lambda w: w.add_tokenizer_pre("unheard-of"), "gpt2/unheard-of"),
        (lambda w: w.add_tokenizer_model("bert"), "bert/smollm"),
    ],
)
def test_what_a_gguf_may_not_hold_is_named(change: Any, said: str, llama: Any, tmp_path: Path) -> None:
    def overwrite(writer: Any) -> None:
        for key in ("tokenizer.ggml.pre", "tokenizer.ggml.model"):
            if said.count("/"):
                writer.kv_data[0].pop(key)
                writer.add_string(
                    key,
                    dict(zip(("tokenizer.ggml.model", "tokenizer.ggml.pre"), said.split("/"), strict=True))[
                        key
                    ],
                )
        if not said.count("/"):
            change(writer)

    with pytest.raises(UnsupportedError, match=said):
        load(str(write_gguf(tmp_path / "tiny.gguf", llama, Q.Q4_1, overwrite)))


def test_a_missing_gguf_value_is_named(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", llama, Q.Q4_1, lambda w: w.kv_data[0].pop("llama.feed_forward_length")
    )
    with pytest.raises(DataError, match=r"llama\.feed_forward_length"):
        load(str(path))


def test_a_cut_off_gguf_is_refused(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, Q.Q4_1)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError):
        load(str(path))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def reconfigure(folder: Path, **values: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_interleaved", True),
        ("sliding_window", 16),
        ("final_logit_softcapping", 30.0),
        ("never_heard_of", 3),
        ("is_encoder_decoder", True),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
        ("pretraining_tp", 2),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_value_that_is_not_handled_is_named(folder: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load(reconfigure(folder, **{key: value}))
    assert (caught.value.field, caught.value.value) == (key, value)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "NeverSeenForCausalLM"])
def test_an_unknown_architecture_is_named_with_the_supported_ones(folder: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedError, match=f"{name}.*LlamaForCausalLM"):
        load(reconfigure(folder, architectures=[name]))


def test_an_architecture_of_another_kind_of_model_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedError, match=r"Gemma2ForCausalLM.*model_type.*llama"):
        load(reconfigure(folder, architectures=["Gemma2ForCausalLM"]))


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPTNeoX", "OPT", "Gemma", "Gemma2", "SmolLM3"]
)
def test_what_transformers_writes_for_a_plain_model_is_accepted(family: str) -> None:
    import transformers

    architecture = f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(architectures=[architecture])
    for use_diff in (False, True):  # older versions write every value, newer ones what is not the default
        assert check_config(json.loads(config.to_json_string(use_diff=use_diff))) == architecture


def test_missing_parts_of_a_folder_are_named(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "away")
    with pytest.raises(NoInputError, match=r"tokenizer\.json"):
        load(str(folder))
    (folder / "away").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="safetensors"):
        load(str(folder))


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="up_proj"):
        load(str(folder))


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"no numbers.*up_proj"):
        quantise(load(str(folder)), FORMATS["int8g"], lambda phase, fraction: None)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<new {n}>" for n in range(8)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match=r"304, 305"):
        load(str(folder))


def test_padding_and_truncation_are_taken_out_of_the_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    clean = Tokenizer.from_str(load(str(folder)).tokenizer.decode())
    assert len(clean.encode("the quick brown fox jumps over zzzz").ids) not in (4, 64)


def test_layers_that_differ_are_refused(llama: Any) -> None:
    odd = copy.deepcopy(llama)
    odd.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 128, bias=True)
    with pytest.raises(UnsupportedError, match="layer 1 differs from layer 0"):
        check_layers(odd)


def test_rows_that_are_no_multiple_of_a_block_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.SIZES, "intermediate_size": 120}))
    with pytest.raises(UnsupportedError, match=r"down_proj.*120"):
        check_layers(model)


@pytest.mark.parametrize(
    "lora", [LoraConfig(targets=("nope",)), LoraConfig(r=0), LoraConfig(r=33), LoraConfig(targets=())]
)
def test_an_adapter_that_cannot_be_is_refused(lora: LoraConfig, llama: Any) -> None:
    with pytest.raises(ConfigError):
        adapted_modules(llama, lora)
