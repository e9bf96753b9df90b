"""`fedge adapter`: what leaves for PEFT, llama.cpp and transformers computes what the adapter says.

Oracles: stock peft over the same float model, dense products in numpy, and a GGUF read by the `gguf` library and
applied row by row as llama.cpp does (field cases F01, F02, F03, F04, F06).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_gguf import tensor_name, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from fedge.cli import main
from fedge.errors import DataError, FedgeError, NoInputError, UnsupportedError, UsageError
from fedge.io.adapter_file import Adapter, adapter_of, write_adapter
from fedge.io.peft_folder import write_peft
from fedge.lora import LoraConfig
from fedge.peft import TENSOR_FILE
from fedge.release import FORMAT, Manifest
from quantize.interop.gguf_lora import FAMILIES, read_gguf_lora, write_gguf_lora
from quantize.interop.merging import merge
from quantize.interop.opening import open_adapter

SEED = bytes(range(16))
IDS = torch.arange(1, 40)[None]
HIDDEN, KEYS = tiny.SIZES["hidden_size"], 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "mlp.down_proj": (HIDDEN, tiny.SIZES["intermediate_size"]),
}
NAMES = tuple(name.rpartition(".")[2] for name in SHAPES)
LORA = LoraConfig(r=4, alpha=8.0, targets=NAMES)


def manifest(lora: LoraConfig = LORA, shapes: Any = SHAPES, **fields: Any) -> Manifest:
    """What the bundle of the tiny model would say."""
    known = {
        "format": FORMAT, "model": "tiny", "architecture": "LlamaForCausalLM", "licence": "mit",
        "source_sha256": "", "weights_format": "int4d", "embedding_format": "int8g", "layers": 2, "hidden": HIDDEN,
        "vocabulary": 304, "heads": 4, "kv_heads": 2, "head_dim": 16, "positions_max": 128, "head_tied": True,
        "eos_id": 0, "pad_id": 0, "lora": lora, "lora_shapes": shapes, "aux": (), "head_rows": 8, "operators": (),
        "runtime_min": "1.23.2", "tensors": {}, "files": {}, "gates": {}, "publisher": "",
    }  # fmt: skip
    return Manifest(**{**known, **fields})


def adapter(lora: LoraConfig = LORA, seed: int = 0, size: float = 0.3, **fields: Any) -> Adapter:
    made = manifest(lora, **fields)
    numbers = np.random.default_rng(seed).standard_normal(made.layout.numbers) * size
    return adapter_of(made, numbers.astype(np.float32), a_seed=SEED, steps=3)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "mine", adapter())
    return tmp_path / "mine"


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    made = adapter()
    write_peft(tmp_path / "peft", made.tensors, made.header.lora, "tiny")
    return tmp_path / "peft"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["adapter", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# ---------------------------------------------------------------- show and diff
def test_show_says_what_dense_products_say(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, made = said(capsys, "show", mine), adapter()
    assert (found["kind"], found["model"], found["ranks"], found["steps"], found["layers"]) == (
        "fedge", "tiny", [4], 3, 2,
    )  # fmt: skip
    assert len(found["modules"]) == 6
    for row in found["modules"]:
        change = 2.0 * made.tensors[row["module"] + ".B"] @ made.tensors[row["module"] + ".A"]
        assert (row["out"], row["in"], row["rank"], row["scale"]) == (*change.shape, 4, 2.0)
        assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert row["largest"] == pytest.approx(np.linalg.norm(change, 2), rel=1e-5)
    assert main(["adapter", "show", str(mine)]) == 0
    assert "L1/self_attn.q_proj" in capsys.readouterr().out


def test_one_adapter_is_the_same_in_three_kinds_of_file(
    mine: Path, peft_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the rows that llama.cpp wants in another order: put back wrongly, the cosine would not be 1."""
    write_gguf_lora(tmp_path / "mine.gguf", adapter())
    for other in (peft_folder, tmp_path / "mine.gguf"):
        found = said(capsys, "diff", mine, other)
        assert (found["modules_compared"], found["only_in_a"], found["only_in_b"]) == (6, [], [])
        assert found["relative"] < 1e-5
        assert all(row["cosine"] == pytest.approx(1.0) for row in found["modules"])


def test_diff_measures_changes_and_not_factors(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of B and twice the scale are the same change; another seed is another one."""
    made, other = adapter(), adapter(seed=1)
    halved = {n: t / 2 if n.endswith(".B") else t for n, t in made.tensors.items()}
    write_peft(tmp_path / "same", halved, msgspec.structs.replace(LORA, alpha=16.0), "tiny")
    assert said(capsys, "diff", mine, tmp_path / "same")["relative"] < 1e-6
    write_adapter(tmp_path / "other", other)
    key = "L1/mlp.down_proj"
    one, two = (2.0 * a.tensors[key + ".B"] @ a.tensors[key + ".A"] for a in (made, other))
    row = next(r for r in said(capsys, "diff", mine, tmp_path / "other")["modules"] if r["module"] == key)
    assert row["relative"] == pytest.approx(np.linalg.norm(one - two) / np.linalg.norm(one), rel=1e-4)
    assert row["cosine"] == pytest.approx(
        (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-5
    )


def test_an_adapter_without_effect_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F03: everything matched, and still nothing happens."""
    write_adapter(tmp_path / "zero", adapter(size=0.0))
    assert "no effect" in said(capsys, "show", tmp_path / "zero")["notices"][0]


# ---------------------------------------------------------------- what comes in
def test_parts_of_a_peft_folder_that_would_not_be_used_stop_it(peft_folder: Path) -> None:
    """F03, F04: half a pair, a tensor that is no LoRA, a rank that is not the config's."""
    whole = load_file(peft_folder / TENSOR_FILE)
    name = next(n for n in whole if "layers.1.self_attn.q_proj.lora_B" in n)
    for change, refusal in (
        ({n: v for n, v in whole.items() if n != name}, "half of a pair.*q_proj.lora_B"),
        ({**whole, "base_model.model.lm_head.weight": whole[name].clone()}, "no part of a LoRA.*lm_head"),
        ({**whole, name: whole[name][:, :2].contiguous()}, "the rank is not"),
    ):
        save_file(change, peft_folder / TENSOR_FILE)
        with pytest.raises(DataError, match=refusal):
            open_adapter(peft_folder)


def test_what_is_no_adapter_is_refused(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "letter").write_text("dear all")
    refused = {"nowhere": NoInputError, "letter": DataError, "": NoInputError}
    for name, error in refused.items():
        with pytest.raises(error):
            open_adapter(tmp_path / name)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(FedgeError):
        open_adapter(tmp_path / "cut.gguf")


# ---------------------------------------------------------------- merging
CONFIGS = {
    "plain": LORA,
    "rank-stabilised": msgspec.structs.replace(LORA, rslora=True),  # F01: 4 times as strong
    "patterns": msgspec.structs.replace(
        LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 3.0}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_is_the_model_under_peft(name: str, tiny_model: Path, tmp_path: Path) -> None:
    made = adapter(CONFIGS[name])
    write_peft(tmp_path / "peft", made.tensors, made.header.lora, "tiny")
    write_adapter(tmp_path / "mine", made)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "peft")))
    assert (expected - plain).abs().max() > 0.1
    for kind in ("mine", "peft"):
        out = tmp_path / f"m-{kind}"
        assert main(["adapter", "merge", str(tmp_path / kind), str(out), "--base", str(tiny_model)]) == 0
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert (logits(merged) - expected).abs().max() < 1e-4
    assert (tmp_path / "m-mine" / "tokenizer.json").read_bytes() == (
        tiny_model / "tokenizer.json"
    ).read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_a_gpt2_is_merged_the_right_way_round(tmp_path: Path, tiny_model: Path) -> None:
    """F06: GPT-2's matrices lie (in, out), and only its square `c_proj` would hide a mistake."""
    sizes = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=304, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    tiny.write_model(tmp_path / "gpt2", sizes)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    shapes = {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64)}
    lora = msgspec.structs.replace(LORA, targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc"))
    made = adapter(lora, shapes=shapes, architecture="GPT2LMHeadModel", layer_path="transformer.h")
    write_adapter(tmp_path / "mine", made)
    with torch.no_grad():
        for slot in made.header.layout.slots:
            weight = base.get_parameter(f"transformer.h.{slot.layer}.{slot.path}.weight")
            change = 2.0 * made.tensors[f"{slot.name}.B"] @ made.tensors[f"{slot.name}.A"]
            weight += torch.from_numpy(change.T)
    done = merge(open_adapter(tmp_path / "mine"), str(tmp_path / "gpt2"), tmp_path / "out")
    assert done.matrices == 6
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(base)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_is_the_bases_or_the_one_asked_for(
    dtype: str, tiny_model: Path, mine: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype)).save_pretrained(half)
    merge(open_adapter(mine), str(half), tmp_path / "as-base")
    merge(open_adapter(mine), str(half), tmp_path / "wide", dtype="float32")
    types = [
        {str(t.dtype) for t in load_file(tmp_path / out / "model.safetensors").values()}
        for out in ("as-base", "wide")
    ]
    assert types == [{f"torch.{dtype}"}, {"torch.float32"}]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32
    narrow, wide = (load_file(tmp_path / out / "model.safetensors") for out in ("as-base", "wide"))
    for name, values in wide.items():  # rounded once, at the end
        assert torch.equal(values.to(getattr(torch, dtype)), narrow[name])


def test_an_adapter_of_another_model_is_refused_and_nothing_stays(
    tiny_model: Path, tmp_path: Path, mine: Path
) -> None:
    write_adapter(tmp_path / "deep", adapter(layers=3))
    wide = {**SHAPES, "mlp.down_proj": (HIDDEN, 256)}
    write_adapter(tmp_path / "wide", adapter(shapes=wide))
    for name, refusal in (("deep", r"no such tensor.*layers\.2"), ("wide", "does not fit")):
        with pytest.raises(DataError, match=refusal):
            merge(open_adapter(tmp_path / name), str(tiny_model), tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        merge(open_adapter(mine), str(tiny_model), tmp_path)
    with pytest.raises(UsageError, match="float32, float16"):
        merge(open_adapter(mine), str(tiny_model), tmp_path / "out", dtype="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "mine", "wide"]


def test_a_gguf_base_becomes_a_model_folder(tiny_model: Path, mine: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    base = write_gguf(tmp_path / "base.gguf", "llama", model)
    merge(open_adapter(mine), str(base), tmp_path / "out")
    merge(open_adapter(mine), str(tiny_model), tmp_path / "float")
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("out", "float"))
    for name, value in expected.named_parameters():
        assert torch.allclose(found.get_parameter(name), value, atol=1e-6), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out") is not None


# ---------------------------------------------------------------- GGUF
def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows (its converter's `permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def undone(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows back to transformers'; the inverse of its converter's `permute`."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_lora_applied_as_llama_cpp_does_gives_pefts_logits(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    """W + alpha / r * b a on the rows as llama.cpp has them, with r from the tensor and one alpha for all."""
    made = adapter(CONFIGS[name])
    write_gguf_lora(tmp_path / "lora.gguf", made)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {key: value.contents() for key, value in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 12

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    heads = {"attn_q": 4, "attn_k": 2}
    for layer in range(2):
        for path in SHAPES:
            full = f"model.layers.{layer}.{path}.weight"
            matrix = tensor_name("llama", full).split(".")[2]
            a, b = (tensors[f"blk.{layer}.{matrix}.weight.lora_{half}"] for half in "ab")
            parameter = model.get_parameter(full)
            weight = parameter.detach().numpy()
            weight = interleaved(weight, heads[matrix]) if matrix in heads else weight
            weight = weight + fields["adapter.lora.alpha"] / b.shape[1] * b @ a
            weight = undone(weight, heads[matrix]) if matrix in heads else weight
            parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    write_peft(tmp_path / "peft", made.tensors, made.header.lora, "tiny")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "peft"))
    assert (logits(model) - logits(peft)).abs().max() < 1e-4


def test_every_family_has_a_name_for_each_of_its_modules() -> None:
    for family in FAMILIES.values():
        names = family.tensors(2)
        assert len(names) == 2 * len(family.modules)
        assert len(set(names.values())) == len(names)


def test_neox_rows_are_told_apart(tmp_path: Path) -> None:
    """Per head query, key and value in transformers; all queries, all keys, all values in llama.cpp."""
    shapes = {"attention.query_key_value": (3 * HIDDEN, HIDDEN)}
    lora = LoraConfig(r=2, alpha=2.0, targets=("query_key_value",))
    made = adapter(lora, shapes=shapes, architecture="GPTNeoXForCausalLM", layer_path="gpt_neox.layers")
    write_gguf_lora(tmp_path / "l.gguf", made)
    b = made.tensors["L0/attention.query_key_value.B"].reshape(4, 3, 16, 2)
    expected = np.concatenate([b[:, part].reshape(-1, 2) for part in range(3)])
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "l.gguf").tensors}
    np.testing.assert_array_equal(found["blk.0.attn_qkv.weight.lora_b"], expected)
    key = "L0/attention.query_key_value"
    np.testing.assert_array_equal(
        read_gguf_lora(tmp_path / "l.gguf").factors[key].b, made.tensors[f"{key}.B"]
    )


def test_what_a_gguf_lora_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"OPTForCausalLM.*LlamaForCausalLM"):
        write_gguf_lora(tmp_path / "l.gguf", adapter(architecture="OPTForCausalLM"))
    odd = {"self_attn.odd_proj": (HIDDEN, HIDDEN)}
    with pytest.raises(UnsupportedError, match="odd_proj"):
        write_gguf_lora(tmp_path / "l.gguf", adapter(LoraConfig(r=2, targets=("odd_proj",)), shapes=odd))
    assert list(tmp_path.iterdir()) == []
