"""Tokenizers out of GGUF metadata: the same ids as the reference rules give, on awkward strings."""

import itertools
import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from fedge.errors import UnsupportedError
from quantize.tokenizer import from_gguf

SPACE = "\u2581"
LETTERS = "abcdefghij"
AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "It's we'll they'd I'M",
    "2026-11-30 at 12:34567, 3.14159",
    "tabs\tand\nnew\r\nlines\n\n\n  indented",
    "e\u0301 \u00e9 caf\u00e9 \u212b \u1e9b\u0323",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea !!! ... ???",
    "def f(x):\n    return x**2  # <end> not special? <end>",
    "\u0000\u0007\ufeff\u200b",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 2000,
]


def byte_pairs() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for text in AWKWARD if len(text) < 100] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def fields(rule: str) -> dict[str, Any]:
    tokens, merges = byte_pairs()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.bos_token_id": 0,
    }


def test_qwen_reads_as_transformers_own_converter_does() -> None:
    from transformers.convert_slow_tokenizer import Qwen2Converter

    given = fields("qwen2")
    vocabulary = {token: index for index, token in enumerate(given["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in given["tokenizer.ggml.merges"]]
    reference = Qwen2Converter(None).converted(vocabulary, merges)
    reference.add_special_tokens([AddedToken("<end>", normalized=False, special=True)])
    found = Tokenizer.from_str(from_gguf(given).decode())
    for text in AWKWARD:
        assert (
            found.encode(text, add_special_tokens=False).ids
            == reference.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["It", "'s", "\u0120in", "\u01202026", "\u0120!"]),
        ("smollm", ["It", "'s", "\u0120in", "\u0120", "2", "0", "2", "6", "\u0120!"]),
        ("starcoder", ["It", "'s", "\u0120in", "\u0120", "2", "0", "2", "6", "\u0120!"]),
        ("llama-bpe", ["It", "'s", "\u0120in", "\u0120", "202", "6", "\u0120!"]),
        ("qwen2", ["It", "'s", "\u0120in", "\u0120", "2", "0", "2", "6", "\u0120!"]),
    ],
)
def test_each_rule_cuts_digits_its_own_way(rule: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_str(from_gguf(fields(rule)).decode())
    assert tokenizer.pre_tokenizer is not None
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("It's in 2026 !")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "starcoder", "llama-bpe"])
def test_every_text_survives(rule: str) -> None:
    tokenizer = Tokenizer.from_str(from_gguf(fields(rule)).decode())
    for text in AWKWARD:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_first_token_is_added_only_where_the_file_says_so() -> None:
    plain = Tokenizer.from_str(from_gguf(fields("smollm")).decode())
    first = Tokenizer.from_str(from_gguf(fields("smollm") | {"tokenizer.ggml.add_bos_token": True}).decode())
    assert first.encode("It").ids == [0, *plain.encode("It").ids]
    assert first.encode("It", add_special_tokens=False).ids == plain.encode("It").ids


def sentence_piece() -> dict[str, Any]:
    """Pieces with distinct scores; every byte has one, as Llama's vocabulary has."""
    draw = random.Random(0)
    pieces = [SPACE, *LETTERS]
    for _ in range(60):
        joined = draw.choice(pieces) + draw.choice(pieces)
        if joined not in pieces and SPACE not in joined[1:]:
            pieces.append(joined)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [
        -float(place) if len(piece) > 1 else -1e6 - place for place, piece in enumerate(pieces)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
    }


def merged(text: str, given: dict[str, Any]) -> list[int]:
    """SentencePiece's algorithm: of all neighbours join those whose piece has the highest score, the leftmost first."""
    tokens = given["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, given["tokenizer.ggml.scores"], strict=True))
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list((SPACE + text.replace(" ", SPACE)) if text else "")
    while True:
        pairs = [(score[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        index
        for part in parts
        for index in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


def test_sentence_pieces_are_joined_by_score() -> None:
    given = sentence_piece()
    tokenizer, draw = Tokenizer.from_str(from_gguf(given).decode()), random.Random(1)
    texts = ["".join(draw.choices(LETTERS + "  ", k=draw.randrange(1, 40))) for _ in range(200)]
    differ = [
        text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids != merged(text, given)
    ]
    assert not differ
    for text in ["\u00e9\u4f60 \U0001f469 a!", "a\nb\tc"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == merged(text, given)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("ab").ids[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.pre": "tekken"},
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.model": "llama", "general.architecture": "phi3"},
    ],
)
def test_a_rule_that_is_not_known_is_named(change: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="cannot be rebuilt"):
        from_gguf(fields("smollm") | change)
