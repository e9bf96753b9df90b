"""What people call the two texts of a pair: the column names of data sets for sentence encoders.

Two names say it together; one by itself is a word like any other. A grade beside them says that not every pair belongs
together, so it is no example of what does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PAIR: Final = ("anchor", "positive")
PAIR_NAMES: Final = (
    PAIR,
    ("query", "positive"),
    ("query", "document"),
    ("query", "passage"),
    ("query", "answer"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)
NEGATIVE: Final = "negative"
GRADES: Final = ("score", "similarity", "label")
HINT: Final = (
    'A pair is {"anchor": …, "positive": …}; or query, document; question, answer; sentence1, sentence2'
)


def pair_of(names: Iterable[str]) -> dict[str, str]:
    """Field -> the name that it has among `names`, whatever their case; empty where no two are a pair's."""
    known = {name.strip().lower(): name for name in names}
    for first, second in PAIR_NAMES:
        if first in known and second in known:
            found = dict(zip(PAIR, (known[first], known[second]), strict=True))
            more = {field: known[field] for field in (NEGATIVE, *GRADES, "conversation") if field in known}
            return found | more
    return {}
