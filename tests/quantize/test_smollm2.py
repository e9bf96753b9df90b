"""The real SmolLM2-135M: its tokenizer by known answers, its weights without any loss."""

import json
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from fedge.release import MANIFEST, TOKENIZER, Manifest

pytestmark = pytest.mark.real

# Written by an implementation that shares no code with `tokenizers`: regular expressions and a merge loop over the
# vocabulary, with the digit rule of SmolLM2's own tokenizer.
KNOWN = json.loads((Path(__file__).parent / "tokenizer_ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(smollm2_bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_bundle / TOKENIZER))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: ascii(known["text"][:16]))
def test_the_tokenizer_gives_the_known_ids(known: dict[str, object], tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(known["text"]).ids == known["ids"]  # nothing is prepended or appended either
    assert tokenizer.decode(known["ids"], skip_special_tokens=False) == known["text"]


def test_quantising_lost_nothing(smollm2_bundle: Path) -> None:
    manifest = msgspec.json.decode((smollm2_bundle / MANIFEST).read_bytes(), type=Manifest)
    assert (manifest.weights_format, manifest.embedding_format) == ("int4d", "int8g")
    gates = manifest.gates
    assert abs(gates["quantised_loss"] - gates["source_loss"]) <= 1e-4
    assert gates["kl"] <= 1e-6
    assert gates["cut_gradient_error"] <= 1e-5
    assert gates["gradient_error"] <= 1e-3
    assert gates["decode_error"] <= 1e-5
    assert (manifest.layers, manifest.hidden, manifest.eos_id, manifest.pad_id) == (30, 576, 2, 2)
