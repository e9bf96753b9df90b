"""Plain text as passages: cut at empty lines, or at a line's end when none comes for long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edge_agent.dataset.lines import Line
from edge_agent.dataset.record import Passage, Record
from fedge.errors import DataError

PASSAGE_CHARS: int = 4_096  # cut at the next empty line
PASSAGE_CHARS_MAX: int = 16_384  # cut at the next line


def passages(lines: Iterable[Line | DataError]) -> Iterator[Record | DataError]:
    """The text in pieces that together are the whole; the last one ends it."""
    held: list[str] = []
    began = size = 0
    ready: Passage | None = None
    for line in lines:
        if isinstance(line, DataError):
            yield line
            continue
        text = line.text + "\n"
        full = size >= PASSAGE_CHARS_MAX or (size >= PASSAGE_CHARS and not line.text.strip())
        if full:
            if ready is not None:
                yield ready
            ready = Passage(began, "", "".join(held), ends=False)
            held, size = [], 0
        if not held:
            began = line.number
        held.append(text)
        size += len(text)
    last = "".join(held).rstrip("\n")
    if last.strip():
        if ready is not None:
            yield ready
        yield Passage(began, "", last)
    elif ready is not None:
        yield Passage(ready.line, "", ready.text.rstrip("\n"))
