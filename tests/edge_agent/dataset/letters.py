"""A tokenizer that a reader can check by eye, one token for a letter; and small words for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_agent.dataset import Conversation, Reading, Record, read_records
from fedge.chat import ChatFormat, Frame

EOS = 2


class Letters:
    """Text to code points and back."""

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self(text), [(i, i + 1) for i in range(len(text))]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


# A bundle's chat format that is short to read: S(…) U(…) A(…)
BRACKETS = ChatFormat(
    frames={
        "system": Frame("S(", ")"),
        "user": Frame("U(", ")"),
        "assistant": Frame("A(", ")\n"),
        "tool": Frame("T(", ")"),
    },
    generation="A(",
    end=")",
    end_ids=(ord(")"),),
)


def wrote(folder: Path, data: bytes | str | list[Any], name: str = "private.data") -> Path:
    """A file of these bytes, this text, or a JSON line for each of these objects."""
    path = folder / name
    if isinstance(data, list):
        data = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in data)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def records(path: Path, **how: Any) -> list[Record]:
    """All records of a file."""
    return list(read_records(path, Reading(**how)))


def said(path: Path, **how: Any) -> list[list[tuple[str, str]]]:
    """Each conversation of a file as (first letter of the role, text)."""
    found = records(path, **how)
    assert all(isinstance(record, Conversation) for record in found)
    return [
        [(turn.role[0], turn.text) for turn in record.turns]
        for record in found
        if isinstance(record, Conversation)
    ]
