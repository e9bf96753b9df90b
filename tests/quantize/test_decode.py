"""The inference graph of each kind of family: the loss of torch, a cache that changes nothing, and when it is fused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch

from fedge.errors import UnsupportedError
from fedge.lora import LoraConfig
from fedge.release import MANIFEST, SIGNATURE, open_manifest
from quantize import gates
from quantize.bundle import quantize
from quantize.decode import LEVEL_EXACT, LEVEL_INT8, at_level, inference_graph
from quantize.decode_start import check_arguments
from quantize.formats import FORMATS
from quantize.graph import operators
from quantize.reference import Batch, random_adapter, torch_gradients
from quantize.runner import Decoder
from quantize.source import Source, build_model
from quantize.weights import quantise, write_weights

FUSED = "com.microsoft:GroupQueryAttention"


def families() -> dict[str, tuple[Any, tuple[str, ...], bool]]:
    """Name -> configuration, adapted modules, whether the layers are written in fused operators."""
    import transformers as tr

    small = dict(tiny.SIZES)
    gpt2 = {"vocab_size": 304, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 0}
    gemma = {
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 10.0,
        "head_dim": 32,
    }
    return {
        "qwen3, norms over heads, an untied head": (
            tr.Qwen3Config(**small | {"tie_word_embeddings": False}, head_dim=32),
            ("q_proj", "v_proj"),
            True,
        ),
        "phi3, packed matrices": (tr.Phi3Config(**small), ("qkv_proj", "down_proj"), True),
        "gemma2, two kinds of layers and soft-caps": (
            tr.Gemma2Config(**small, **gemma, query_pre_attn_scalar=32),
            ("q_proj", "v_proj"),
            False,
        ),
        "gpt2, learned positions": (tr.GPT2Config(**gpt2), ("c_attn",), False),
    }


def source_of(config: Any) -> Source:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(value, std=0.1)
            elif value.dim() == 1:
                torch.nn.init.normal_(value, mean=1.0, std=0.1)
    return Source(model, "", b"", "", "", "", 0, 0)


@pytest.mark.parametrize("name", list(families()))
def test_decoding_gives_the_loss_of_torch_and_its_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    """40 tokens, past a window of 8."""
    config, targets, is_fused = families()[name]
    source, lora, fmt = source_of(config), LoraConfig(r=4, targets=targets), FORMATS["int4d"]
    places = write_weights(tmp_path / "weights.bin", quantise(source, fmt, lambda phase, fraction: None))
    graph = at_level(inference_graph(source.anatomy, lora, fmt, places), LEVEL_EXACT)
    assert (FUSED in operators(graph)) is is_fused
    (tmp_path / "infer.onnx").write_bytes(graph.SerializeToString())
    random = np.random.default_rng(0)
    adapter = random_adapter(source.model, lora, random, scale=0.05)
    ids = random.integers(1, 300, (1, 40))
    batch = Batch.of(ids.tolist(), pad=0)
    expected, _ = torch_gradients(source.model, lora, adapter, batch)
    decoder = Decoder(tmp_path / "infer.onnx", adapter)
    logits, _ = decoder.step(ids, decoder.start(1))
    found = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]), torch.from_numpy(ids[0, 1:]))
    assert abs(float(found) - expected) / expected <= 1e-5
    cache, rows = decoder.start(1), []
    for part in (ids[:, :17], ids[:, 17:25], *np.split(ids[:, 25:], 15, axis=1)):
        step, cache = decoder.step(part, cache)
        rows.append(step)
    assert np.abs(np.concatenate(rows, 1) - logits).max() / np.abs(logits).max() <= 1e-4


@pytest.mark.parametrize(
    ("aux", "cache", "said"),
    [(("mask", "alibi"), "cache", "alibi"), (("mask",), None, "take no key")],
)
def test_what_cannot_be_decoded_is_refused_with_its_reason(
    aux: tuple[str, ...], cache: object, said: str
) -> None:
    odd = SimpleNamespace(aux=aux, call=SimpleNamespace(cache=cache), layers_path="model.layers", model=None)
    with pytest.raises(UnsupportedError, match=said):
        check_arguments(odd)  # type: ignore[arg-type]


@pytest.mark.xdist_group("formats of the tiny model")
@pytest.mark.usefixtures("traced_once")
def test_where_eight_bits_do_not_hold_the_activations_only_the_head_rounds_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "DECODE_CHANGE_GOAL", -1.0)
    quantize(str(tiny_model), tmp_path / "out", tiny.PUBLISHER, lora=tiny.LORA, weights_format="int4d")
    open_manifest((tmp_path / "out" / MANIFEST).read_bytes(), (tmp_path / "out" / SIGNATURE).read_bytes())
    graph = onnx.load(str(tmp_path / "out" / "infer.onnx"), load_external_data=False).graph
    levels: dict[bool, set[int]] = {True: set(), False: set()}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            level = next(attribute.i for attribute in node.attribute if attribute.name == "accuracy_level")
            levels[node.input[1] == "HEAD.q"].add(level)
    assert levels == {True: {LEVEL_INT8}, False: {LEVEL_EXACT}}
