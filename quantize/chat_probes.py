"""Conversations of every shape, which a chat template and its table must write alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Final

from fedge.chat import Said

# Each odd shape is met alone before it meets others, so that it is known which one a difference comes from.
_ODD: Final = (
    "usa uasua susua a au aua auaua sa saua uua uauua uu suua uaa uaaua suaa "
    "uat uata uatau suata uatta uattau s t ta tua st"
)
ROLES: Final = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
_TEXTS: Final = (
    "hi", "What is 17 + 25?", "Grüß dich, schöne Welt", "你好，世界！今天怎么样？", "שלום מה שלומך",
    "\U0001f469\U0001f3fd\u200d\U0001f680 e\u0301 ﬁ", "two\nlines", "a\n\n\nb", "<b>&amp;</b> \"quoted\" 'so'",
    "{{ braces }} {% if %} {# no #}", "```py\nx = [1]\n```", "tabs\tand  inner   spaces", "x" * 300,
    "no-break\u00a0space\u2028and", "[INST] not mine [/INST]", "C:\\path\\file $HOME",
)  # fmt: skip


def conversations() -> Iterator[list[Said]]:
    """Conversations of every shape, plain ones first."""
    texts = cycle(_TEXTS)

    def said(roles: str) -> list[Said]:
        return [(ROLES[kind], next(texts)) for kind in roles]

    for roles in ("u", "ua", "uau", "uaua", "uauau", "uauaua", "ua" * 6):
        yield said(roles)
    for text in _TEXTS:
        yield [("user", text), ("assistant", text)]
    for roles in ("su", "sua", "suau", "suaua", "suauaua"):
        yield said(roles)
    for roles in _ODD.split():
        yield said(roles)
    for empty in ("", " ", "\n"):
        yield [("user", empty), ("assistant", "yes")]
        yield [("user", "yes"), ("assistant", empty), ("user", "no"), ("assistant", "so")]
        yield [("system", empty), ("user", "yes"), ("assistant", "no")]
    for spaced in (" {}", "{} ", "\n{}", "{}\n\n", "  {}\t"):
        for roles in ("u", "uaua", "sua", "suaua"):
            yield [(role, spaced.format(text)) for role, text in said(roles)]
    thought = "<think>\nwell\n</think>\n\nyes"
    yield [("user", "a"), ("assistant", thought)]
    yield [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought)]
