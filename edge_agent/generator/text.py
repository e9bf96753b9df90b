"""Tokens to text as they come: no half characters, and nothing shown that may turn out to be a stop string.

A token of a byte-level vocabulary may be part of a character, and a token of a word-piece vocabulary may have its
space only after another token. So the text of a new token is the difference between the text of a few tokens with it
and without it, and a text that ends within a character waits. What is shown, joined, is the text of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

_CUT: Final = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_WAIT_TOKENS_MAX: Final = 8  # a character has at most four bytes; whoever waits longer is no character
_BEFORE_TOKENS: Final = 6  # of a prompt, that decide how the first token looks


class Detokenizer:
    """`decode` turns ids into text; `before` are the ids that the new ones follow, their text is not shown."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-_BEFORE_TOKENS:])
        self._start, self._shown = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that is certain now, often of this one token, sometimes none."""
        self._ids.append(token)
        known, text = self._texts()
        waiting = len(self._ids) - self._shown
        if text.endswith(_CUT) and waiting < _WAIT_TOKENS_MAX:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """What was still waiting, as it is."""
        known, text = self._texts()
        self._start = self._shown = len(self._ids)
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        window = self._ids[self._start :]
        return self._decode(window[: self._shown - self._start]), self._decode(window)


class StopStrings:
    """Lets text through until one of `stops` appears in it; the stop string itself is not shown."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.met: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now. Nothing more comes once `met` says which string ended it."""
        if self.met is not None:
            return ""
        held = self._held + text
        found = [(place, stop) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            place, self.met = min(found, key=lambda entry: entry[0])
            self._held = ""
            return held[:place]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be ordinary."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
