"""500 texts that tokenizers disagree on, always the same; and two tokenizers written out plainly to compare with."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import regex

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[CLS]", "[SEP]", "[MASK]", "<unk>")
WORDS = (
    "hello", "World", "don't", "I'LL", "we've", "naïve", "Straße", "ﬁne", "x²", "3.14", "1234567890", "007", "½", "Ⅷ",
    "东京", "こんにちは", "안녕하세요", "สวัสดี", "नमस्ते", "مرحبا", "שלום", "Ελλάδα", "Привет", "İstanbul", "ǅ",
    "👍", "👩🏽\u200d🚀", "🇪🇺", "e\u0301", "q\u0323\u0307", "Z\u0335\u0321", "\u202eabc\u202c", "a\u00adb", "\u200b",
    "\ufeff",
    "def f(x):", "return x**2", "&amp;", "<b>", "https://a.b/c?d=e#f", "C:\\dir", "$HOME", "{}[]()", "--", "...", "'''",
)  # fmt: skip
SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u2028",
    "\x85",
    "\x0b",
    "",
)
CONTROL = (*map(chr, range(32)), "\x7f", "\x80", "\x9f")


def texts() -> list[str]:
    """All of them."""
    draw = random.Random(2)
    found = [
        "",
        " ",
        "\n",
        "a",
        "A",
        "'",
        "''s",
        "'s 'S 't",
        "\0",
        "\ufffd",
        "ab" * 10_000,
        "don't x " * 99,
        " " * 300,
        "\n" * 90,
        "é" * 500,
    ]
    found += [f"{a}{b}{c}" for a in ("", "x", " ") for b in SPACES for c in ("", "y", " z", "\n")][:150]
    found += [f"{word}{token}{word}" for token in SPECIAL for word in ("", " ", "a")]
    found += ["".join(draw.choices(CONTROL, k=draw.randint(1, 6))) + draw.choice(WORDS) for _ in range(40)]
    found += [_mixed(draw) for _ in range(150)]
    found += ["".join(_letters(draw)) for _ in range(500 - len(found))]
    assert len(found) == 500
    return found


def _mixed(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) + draw.choice(SPACES) for _ in range(draw.randint(1, 12)))


def _letters(draw: random.Random) -> Iterator[str]:
    """Code points from everywhere that this Python and older tables agree on: assigned, no surrogates."""
    for _ in range(draw.randint(1, 30)):
        while True:
            letter = chr(
                draw.choice((draw.randrange(0x250), draw.randrange(0x3000), draw.randrange(0x20000)))
            )
            if (
                unicodedata.category(letter) not in ("Cn", "Cs", "Co")
                and unicodedata.ucd_3_2_0.category(letter) != "Cn"
            ):
                yield letter
                break


# ---------------------------------------------------------------- byte-level BPE (Radford et al. 2019)
_WORD = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


@cache
def byte_letters() -> list[str]:
    """The printable letter that stands for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


class PlainBpe:
    """A tokenizer.json of byte-level BPE: special tokens first, then digits alone where it says so, words, merges."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        model = tokenizer["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        self.added: dict[str, int] = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ]
        self.rank = {pair: number for number, pair in enumerate(merges)}
        rules = tokenizer["pre_tokenizer"]
        self.digits = any(rule["type"] == "Digits" for rule in rules.get("pretokenizers", [rules]))

    def __call__(self, text: str) -> list[int]:
        if not self.added:
            return self._plain(text)
        tokens = sorted(self.added, key=len, reverse=True)
        ids: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, tokens)) + ")", text):
            ids += [self.added[piece]] if piece in self.added else self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        pieces = regex.findall(r"\p{N}|[^\p{N}]+", text) if self.digits else [text]
        return [token for piece in pieces for word in _WORD.findall(piece) for token in self._word(word)]

    def spells(self, text: str) -> bool:
        """Whether the vocabulary has every byte of `text`; SmolLM2's lacks some control characters."""
        return all(byte_letters()[byte] in self.vocabulary for byte in text.encode())

    def _word(self, word: str) -> list[int]:
        parts = [byte_letters()[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, 1 << 30))
            if best not in self.rank:
                break
            at, merged = 0, []
            while at < len(parts):
                joined = tuple(parts[at : at + 2]) == best
                merged.append("".join(best) if joined else parts[at])
                at += 2 if joined else 1
            parts = merged
        return [self.vocabulary[part] for part in parts if part in self.vocabulary]


def wordpiece(vocabulary: Sequence[str]) -> Any:
    """A BERT tokenizer (lower case, accents off) of these pieces, as the package `tokenizers` makes it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {piece: number for number, piece in enumerate(vocabulary)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made
