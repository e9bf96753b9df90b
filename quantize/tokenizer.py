"""tokenizer.json as the device reads it: the model's own text rules, no padding, no truncation.

A GGUF carries the vocabulary and the merges but only a *name* for the rule by which text is cut up before; reading it
by a general rule gets digits wrong and prepends tokens that the model never saw. So the names that are handled stand
in a table, each with the rule that its models' own tokenizer.json has, and any other name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fedge.errors import DataError, UnsupportedError

_UNKNOWN: Final = 2  # GGUF token types
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_BYTE: Final = 6
_SPACE: Final = "\u2581"  # how SentencePiece writes a space


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_alone() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _digits_up_to(count: int) -> Callable[[], Any]:
    """The pattern of tiktoken's cl100k, which Llama 3 and Qwen share but for how many digits stay together."""
    digits = r"\p{N}" if count == 1 else rf"\p{{N}}{{1,{count}}}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def make() -> Any:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([cut, whole])

    return make


# Name in `tokenizer.ggml.pre` -> (how text is cut, whether it is composed first (NFC), whether a whole piece of text
# that is in the vocabulary is taken without looking at the merges).
_RULES: Final[dict[str, tuple[Callable[[], Any], bool, bool]]] = {
    "gpt-2": (_byte_level, False, False),
    "smollm": (_digits_alone, False, False),
    "starcoder": (_digits_alone, False, False),
    "llama-bpe": (_digits_up_to(3), False, True),
    "qwen2": (_digits_up_to(1), True, False),
}


def from_gguf(fields: Mapping[str, Any]) -> bytes:
    """tokenizer.json of the vocabulary in GGUF metadata. Raises UnsupportedError for a kind that is not handled."""
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "gpt2" and rule in _RULES:
        tokenizer = _byte_pairs(fields, str(rule))
    elif kind == "llama" and fields.get("general.architecture") != "phi3":
        tokenizer = _sentence_piece(fields)
    else:
        raise UnsupportedError(
            "this tokenizer cannot be rebuilt from a GGUF",
            field="tokenizer",
            value=f"{kind}/{rule}",
            hint=f"Handled: llama, gpt2/{', gpt2/'.join(_RULES)}. Give the model folder with its tokenizer.json",
        )
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        first = int(fields["tokenizer.ggml.bos_token_id"])
        name = fields["tokenizer.ggml.tokens"][first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, first)]
        )
    return _canonical(tokenizer)


def _byte_pairs(fields: Mapping[str, Any], rule: str) -> Tokenizer:
    """Byte-level BPE: the file has the merges."""
    cut, composed, whole = _RULES[rule]
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=whole
    )
    tokenizer = Tokenizer(model)
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut()
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, fields["tokenizer.ggml.token_type"])
    return tokenizer


def _sentence_piece(fields: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: pieces with scores; a pair is merged earlier the higher the joined piece's score."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    types = fields["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(tokens, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = Tokenizer(model)
    leads = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if leads else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if leads else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_special(tokenizer, tokens, types)
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """All ways to join two pieces to a third, best score first; among equals as transformers orders them."""
    known = {token: index for index, token in enumerate(tokens)}
    ordinary = [n for n, kind in enumerate(types) if kind not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)]
    found: list[tuple[float, int, int, int, str, str]] = []
    for index in ordinary:
        piece = tokens[index]
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        joined = sorted(
            (pair for pair in pairs if pair[0] in known and pair[1] in known),
            key=lambda pair: (known[pair[0]], known[pair[1]]),
        )
        found += [
            (-scores[index], -len(left), -len(right), len(found) + order, left, right)
            for order, (left, right) in enumerate(joined)
        ]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, types, strict=True) if found == kind]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in added])


def from_file(data: bytes) -> bytes:
    """The same tokenizer without the padding and truncation that some model folders bake in."""
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception for any malformed file
        raise DataError("tokenizer.json cannot be read", field="tokenizer", value=str(error)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return _canonical(tokenizer)


def check_ids(tokenizer: bytes, rows: int) -> None:
    """Raise DataError when the tokenizer can produce an id that the embedding has no row for."""
    vocabulary = Tokenizer.from_str(tokenizer.decode()).get_vocab(with_added_tokens=True)
    beyond = sorted(index for index in vocabulary.values() if index >= rows)
    if beyond:
        raise DataError(
            f"the tokenizer has ids beyond the {rows} rows of the embedding",
            field="ids",
            value=beyond[:8],
            hint="Resize the model's embedding to its tokenizer and save both again",
        )


def _canonical(tokenizer: Tokenizer) -> bytes:
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")).encode()
