"""Text to token ids by the bundle's tokenizer.json: the only user of the package `tokenizers`.

So another exact implementation may take its place; `tests/edge_agent/dataset/test_awkward_texts.py` says what exact is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.errors import IntegrityError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]


class TextEncoder:
    """Text -> ids, without the special tokens that the tokenizer would put around a text.

    Those are `before` and `after`: ids that the model has always seen at the two ends of a text, often none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        framed: list[int] = tokenizer.encode("x").ids
        # Without it, offsets are not trimmed of white space, and `encode` has no frame to add.
        tokenizer.post_processor = None
        bare = self("x")
        start = next(i for i in range(len(framed) + 1) if framed[i : i + len(bare)] == bare)
        self.before, self.after = framed[:start], framed[start + len(bare) :]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the characters (from, to) of `text` that it stands for."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens shown."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def plain_text(self, ids: list[int]) -> str:
        """The text of `ids` for people: special tokens are not shown."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stands_for_text(self, token: int) -> bool:
        """Whether the tokenizer knows this id; a model's table may have more rows."""
        return self._tokenizer.id_to_token(token) is not None


def load_encoder(path: Path) -> TextEncoder:
    """The encoder in a `tokenizer.json`. Raises IntegrityError when it cannot be read."""
    from tokenizers import Tokenizer  # 15 to 45 MB once it has parsed a file: not before it is needed

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises the bare class
        raise IntegrityError(f"tokenizer cannot be read: {error}", field="path", value=str(path)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextEncoder(tokenizer)
