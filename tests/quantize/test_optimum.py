"""`optimum.onnxruntime` loads the inference graph and generates, greedily, what fedge generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edge_agent.bundle import open_bundle
from edge_agent.generator.adapter import adapter_feeds
from edge_agent.generator.decoding import Decoding
from fedge.cli import main
from fedge.errors import UnsupportedError
from fedge.io.adapter_file import Adapter, adapter_of, write_adapter
from quantize.interop.bundle_weights import read_manifest
from quantize.interop.optimum_folder import write_optimum

pytest.importorskip("optimum.onnxruntime", reason="the extra `optimum` is not installed")

PROMPT = [5, 9, 30, 44, 17]


@pytest.fixture(scope="module")
def adapter(tiny_bundle: Path) -> Adapter:
    manifest = read_manifest(tiny_bundle)
    numbers = np.random.default_rng(3).standard_normal(manifest.layout.numbers) * 0.3
    return adapter_of(manifest, numbers.astype(np.float32), a_seed=bytes(range(16)))


@pytest.fixture(scope="module")
def folders(tiny_bundle: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine` with the adapter folded in, `none` without."""
    home = tmp_path_factory.mktemp("optimum")
    write_adapter(home / "a", adapter)
    for name, given in (("mine", str(home / "a")), ("none", "none")):
        words = ["--bundle", str(tiny_bundle), "--to", "optimum", str(home / name)]
        assert main(["adapter", "export", given, *words]) == 0
    return home


def loaded(folder: Path) -> Any:
    from optimum.onnxruntime import ORTModelForCausalLM

    return ORTModelForCausalLM.from_pretrained(folder)


def decoding(bundle: Path, adapter: Adapter | None) -> Decoding:
    opened = open_bundle(bundle)
    feeds = adapter_feeds(opened.layout, None if adapter is None else adapter.tensors)
    return Decoding(opened, adapter=feeds)


@pytest.mark.parametrize("name", ["mine", "none"])
def test_greedy_text_and_logits_are_ours(
    name: str, folders: Path, tiny_bundle: Path, adapter: Adapter
) -> None:
    ours = decoding(tiny_bundle, adapter if name == "mine" else None)
    model, ids = loaded(folders / name), torch.tensor([PROMPT])
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    np.testing.assert_allclose(theirs, ours.read_all(PROMPT), atol=1e-5)
    ours.reset()
    logits, expected = ours.read(PROMPT), list(PROMPT)
    for _ in range(20):
        expected.append(int(logits.argmax()))
        logits = ours.read(expected[-1:])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
    )
    assert made[0].tolist() == expected


def test_the_adapter_makes_a_difference(folders: Path) -> None:
    ids = torch.tensor([PROMPT])
    one, other = (
        loaded(folders / name)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        for name in ("mine", "none")
    )
    assert (one - other).abs().max() > 0.1


def test_rows_of_one_length_go_together_and_padding_is_never_silently_wrong(folders: Path) -> None:
    model, rows = loaded(folders / "mine"), torch.tensor([PROMPT, PROMPT[::-1]])
    both = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    for row, alone in zip(both, rows, strict=True):
        single = model(input_ids=alone[None], attention_mask=torch.ones(1, 5, dtype=torch.int64)).logits[0]
        assert (row - single).abs().max() < 1e-5
    mask = torch.ones_like(rows)
    mask[1, 0] = 0
    assert model(input_ids=rows, attention_mask=mask).logits.isnan().all()


def test_the_folder_is_whole_and_shares_the_weights(folders: Path, tiny_bundle: Path) -> None:
    from transformers import AutoTokenizer

    weights = folders / "mine" / "weights.bin"
    assert weights.read_bytes() == (tiny_bundle / "weights.bin").read_bytes()
    assert not weights.is_symlink()
    tokenizer = AutoTokenizer.from_pretrained(folders / "mine")
    ids = tokenizer("how are you")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "how are you"
    assert tokenizer.eos_token == "<end>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "BertModel"}, "causal"),
        ({"architecture": "Phi3ForCausalLM"}, "another cache"),
        ({"head_dim": 64}, "another cache"),
        ({"files": {}}, "no inference graph"),
    ],
)
def test_what_optimum_would_get_wrong_is_refused(
    change: dict[str, Any], said: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = msgspec.structs.replace(read_manifest(tiny_bundle), **change)
    with pytest.raises(UnsupportedError, match=said):
        write_optimum(tmp_path / "out", tiny_bundle, manifest, None)
    assert list(tmp_path.iterdir()) == []
