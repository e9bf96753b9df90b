"""The choice of a format: what is exact first, then what fits, and always with a reason."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import tiny_gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedge.errors import UnsupportedError
from quantize.choice import choose, kept_by, weight_bytes
from quantize.formats import FORMATS
from quantize.source import Source, load

K = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(
            LlamaConfig(**{**tiny.SIZES, "intermediate_size": 256, "hidden_size": 256})
        ).eval()


def source(path: Path, model: Any, *kinds: Any) -> Source:
    """A GGUF whose matrices have these types in turn."""
    turn = iter(range(1000))
    return load(
        str(
            tiny_gguf.write_gguf(path / "tiny.gguf", "llama", model, lambda _: kinds[next(turn) % len(kinds)])
        )
    )


@pytest.mark.parametrize(
    ("kinds", "name", "exact"),
    [
        ((K.Q4_0,), "int4d", True),
        ((K.Q4_1,), "int4d", True),
        ((K.Q4_0, K.Q4_1), "int4d", True),
        ((K.Q5_0,), "int8g", True),
        ((K.Q4_0, K.Q5_0, K.Q8_0), "int8g", True),
        ((K.Q5_1,), "int8d", True),
        ((K.Q4_1, K.Q8_0), "int8d", True),
        ((K.Q5_1, K.F16), "int8g", False),
        ((K.F16,), "int8g", False),
        ((K.BF16,), "int8g", False),
    ],
    ids=str,
)
def test_the_smallest_format_that_keeps_everything_is_taken(
    kinds: tuple[Any, ...], name: str, exact: bool, llama: Any, tmp_path: Path
) -> None:
    choice = choose(source(tmp_path, llama, *kinds))
    assert (choice.format.name, choice.exact) == (name, exact)
    assert name in choice.reason


def test_a_small_board_gets_fewer_bits_and_is_told_so(llama: Any, tmp_path: Path) -> None:
    found = source(tmp_path, llama, K.Q8_0)
    sizes = {name: weight_bytes(found, FORMATS[name]) for name in ("int8g", "int4d", "int4gz")}
    assert sizes["int8g"] > sizes["int4d"] > sizes["int4gz"]
    for name, size in sizes.items():
        choice = choose(found, memory_bytes=2 * size + 2)
        assert choice.format.name == name
    assert choose(found, memory_bytes=2 * sizes["int4d"] + 2).exact is False
    assert "would keep the source exactly but does not fit" in choose(found, memory_bytes=1000).reason
    assert "smallest" in choose(found, memory_bytes=1000).reason


def test_what_is_asked_for_is_taken(llama: Any, tmp_path: Path) -> None:
    found = source(tmp_path, llama, K.Q4_0)
    assert kept_by(found) == {"int4d", "int8g", "int8d"}
    assert choose(found, "auto").format.name == "int4d"
    assert (choose(found, "int8g").format.name, choose(found, "int8g").exact) == ("int8g", True)
    assert (choose(found, "nf4").format.name, choose(found, "nf4").exact) == ("nf4", False)
    with pytest.raises(UnsupportedError, match="int3x"):
        choose(found, "int3x")


def test_sizes_that_do_not_fit_a_format_are_named(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**tiny.SIZES, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    )
    found = source(tmp_path, LlamaForCausalLM(config).eval(), None)
    with pytest.raises(UnsupportedError, match=r"nf4 needs rows of a multiple of 64.*96"):
        choose(found, "nf4")
