"""One JSON list over many lines, or objects laid out over many lines, cut into objects as they come.

Only one object is in memory at a time, and none may be above the limit of a line. Brackets and quotes are all that is
looked at here; whether an object is JSON, its reader finds out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from edge_agent.dataset.lines import Line
from fedge.errors import DataError
from fedge.limits import DATA_LINE_BYTES_MAX

_OUTSIDE: Final = re.compile(r'["{}\[\]]')
_INSIDE: Final = re.compile(r'["\\]')
_SPACE: Final = " \t\r\ufeff"
_ONE_EACH: Final = "`jq -c '.NAME[]' FILE > FILE.jsonl` makes a line of each example of the list called NAME"


def json_objects(path: Path, lines: Iterable[Line | DataError]) -> Iterator[Line | DataError]:
    """Each object of a top-level list, or of a row of objects, as a Line of its own. Lines may come in pieces.

    After an error nothing more is read: where the next object would begin is not known.
    """
    cutter = _Cutter(path)
    for line in lines:
        if isinstance(line, DataError):
            yield line
            return
        for found in cutter.feed(line):
            yield found
            if isinstance(found, DataError):
                return
    if cutter.depth:
        yield cutter.refuse("not JSON: the object that begins here has no end")


class _Cutter:
    """How deep in brackets the scan is, whether inside quotes, and the object so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.depth, self._quoted, self._escaped = 0, False, False
        self._listed: bool | None = None  # not known before the first sign
        self._parts: list[str] = []
        self._began = self._size = 0

    def feed(self, line: Line) -> Iterator[Line | DataError]:
        text, at = line.text, 0
        while True:
            if not self.depth:
                at = self._gap(text, at)
                if at == len(text):
                    return
                self._began, self._size, self._parts = line.number, 0, []
                if text[at] != "{":
                    yield self.refuse("Expected `object`")
                    return
            end = self._scan(text, at)
            self._parts.append(text[at:end])
            self._size += end - at
            if self._size > DATA_LINE_BYTES_MAX:
                yield self.refuse("an object is too long", f">{DATA_LINE_BYTES_MAX}", _ONE_EACH)
                return
            if self.depth:
                self._parts.append("\n" if line.ends else "")
                return
            yield Line(self._began, line.byte, "".join(self._parts))
            at = end

    def refuse(self, what: str, value: object = None, hint: str = "") -> DataError:
        return DataError(f"{self._path}, line {self._began}: {what}", field="record", value=value, hint=hint)

    def _gap(self, text: str, at: int) -> int:
        """Where the next object should begin: behind spaces and what holds a list together."""
        while at < len(text):
            if self._listed is None and text[at] == "[":
                self._listed = True
            elif text[at] not in _SPACE and not (self._listed and text[at] in ",]"):
                self._listed = bool(self._listed)
                break
            at += 1
        return at

    def _scan(self, text: str, at: int) -> int:
        """Goes on from `at` until all brackets are closed or the piece ends; returns where it stopped."""
        if self._escaped:
            self._escaped, at = False, at + 1
        while found := (_INSIDE if self._quoted else _OUTSIDE).search(text, at):
            sign, at = found[0], found.end()
            if sign == "\\":
                self._escaped = at == len(text)
                at += 1
            elif sign == '"':
                self._quoted = not self._quoted
            else:
                self.depth += 1 if sign in "{[" else -1
                if not self.depth:
                    return at
        return len(text)


def is_json(text: str) -> bool:
    """Whether `text` is one whole JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
