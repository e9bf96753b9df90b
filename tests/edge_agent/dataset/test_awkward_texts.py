"""The device's tokenizer gives the reference's ids on 500 awkward texts, whichever package computes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from awkward import PlainBpe, texts, wordpiece

from edge_agent.dataset import load_encoder

TEXTS = texts()


def test_the_texts_are_awkward_and_always_the_same() -> None:
    assert texts() == TEXTS
    assert len(set(TEXTS)) > 450
    assert max(map(len, TEXTS)) == 20_000


def assert_alike(path: Path) -> None:
    encode, reference = load_encoder(path), PlainBpe(json.loads(path.read_bytes()))
    different = [text for text in TEXTS if encode(text) != reference(text)]
    assert different == []


def test_byte_level_bpe(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tiny.write_tokenizer(path)
    assert_alike(path)


@pytest.mark.real
def test_the_tokenizer_of_smollm2_from_its_gguf(tmp_path: Path) -> None:
    from gguf import GGUFReader

    from fedge.io.model_source import resolve_model
    from quantize.tokenizer import from_gguf

    file = resolve_model("smollm2-135m").path
    assert file is not None
    fields = {name: value.contents() for name, value in GGUFReader(file).fields.items()}
    path = tmp_path / "tokenizer.json"
    path.write_bytes(from_gguf(fields))
    assert_alike(path)
    encode, reference = load_encoder(path), PlainBpe(json.loads(path.read_bytes()))
    spelt = [text for text in TEXTS if reference.spells(text)]
    assert len(spelt) > 450
    assert all(encode.decode(encode(text)) == text for text in spelt)


def test_wordpiece_is_that_of_transformers(tmp_path: Path) -> None:
    """MiniLM's kind: lower case, accents off, pieces; its frame [CLS] … [SEP] is kept apart from the text."""
    bert = pytest.importorskip(
        "transformers.models.bert.tokenization_bert", reason="transformers is not installed"
    )
    if not hasattr(bert, "WordpieceTokenizer"):
        pytest.skip("this transformers has no tokenizer of its own for BERT")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz0123456789.,'<>|&",
    ]
    vocabulary += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary += [
        "hello",
        "world",
        "don",
        "def",
        "return",
        "##ll",
        "##ing",
        "na",
        "##ive",
        "stras",
        "##se",
        "京",
        "东",
        "مرحبا",
    ]
    vocabulary += [
        "привет",
        "\u03b5",
        "##\u03bb",
        "##λαδα",
        "안녕",
        "##하세요",
        "👍",
        "x",
        "##²",
        "½",
        "こ",
        "##ん",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    reference = bert.BertTokenizer(str(tmp_path / "vocab.txt"))
    path = tmp_path / "tokenizer.json"
    made = wordpiece(vocabulary)
    made.enable_padding(length=128)
    made.enable_truncation(128)
    made.save(str(path))
    encode = load_encoder(path)  # padding and truncation that a file bakes in are not ours
    assert (encode.before, encode.after) == ([2], [3])
    different = [text for text in TEXTS if encode(text) != reference.encode(text, add_special_tokens=False)]
    assert different == []


def test_where_tokens_stand_covers_the_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tiny.write_tokenizer(path)
    encode = load_encoder(path)
    for text in TEXTS:
        ids, spans = encode.spans(text)
        assert ids == encode(text)
        covered = {letter for start, end in spans for letter in range(start, end)}
        assert covered == set(range(len(text)))
