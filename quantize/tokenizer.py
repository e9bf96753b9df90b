"""tokenizer.json as the device reads it: the model's own text rules, no padding, no truncation.

A GGUF carries the vocabulary and the merges but only a *name* for the pre-tokenizer; reading it by a general rule
gets digits wrong and prepends tokens that the model never saw. So the names that are handled stand in a table, each
with the rule its model was trained with, and any other name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedge.errors import DataError, UnsupportedError

_CONTROL: Final = 3  # GGUF token types: 3 control, 4 user-defined
_USER_DEFINED: Final = 4


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_alone() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_PRE_TOKENIZERS: Final[dict[str, Callable[[], Any]]] = {"smollm": _digits_alone, "gpt-2": _byte_level}


def from_gguf(fields: Mapping[str, Any]) -> bytes:
    """tokenizer.json of a byte-level BPE vocabulary in GGUF metadata. Raises UnsupportedError for any other kind."""
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            "this tokenizer cannot be rebuilt from a GGUF",
            field="tokenizer",
            value=f"{kind}/{rule}",
            hint=f"Handled: gpt2/{', gpt2/'.join(_PRE_TOKENIZERS)}. Give the model folder with its tokenizer.json",
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    for kind_id, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, token_type in zip(tokens, types, strict=True) if token_type == kind_id]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in added])
    return _canonical(tokenizer)


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
