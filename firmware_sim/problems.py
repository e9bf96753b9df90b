"""What is wrong with a TOML file of typed tables: every problem at once, in the words of whoever wrote the file.

A decoder stops at the first mistake and speaks of types. Here each problem names the key, the value, what would have
been right, the line where it can be found, and the nearest known name where one was probably meant.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

Path = tuple[str | int, ...]
Names = Mapping[tuple[type, str], Callable[[], Iterable[str]]]

LOW_HIGH: Final = "low-high"  # title of a pair whose first number is the lower one
_HEADER: Final = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]")
_KEY: Final = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_WORD: Final = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: the path of its key, the value found, and what is wrong with it."""

    path: Path
    value: object
    text: str

    @property
    def key(self) -> str:
        """The path as people write it: groups[0].link.kind."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")


def problems_of(values: object, kind: type, names: Names = types.MappingProxyType({})) -> list[Problem]:
    """All that keeps plain `values` from being a `kind`, a msgspec struct of structs, tuples, dicts and plain fields.

    `names` gives the keys that a dict field may have, where not all are allowed.
    """
    return list(_table(values, kind, (), names))


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean "…"?` with the nearest of the `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f', did you mean "{close[0]}"?' if close else ""


def lines_of(text: str) -> dict[Path, int]:
    """The line, from 1, of every table and key that stands at the beginning of a line of TOML."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _opened(_words(header[2]), header[1] == "[[", counts)
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            found.setdefault((*table, *_words(key[1])), number)
    return found


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """The line of `path`, or of the nearest table or key around it."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)


def _opened(words: Path, is_array: bool, counts: dict[Path, int]) -> Path:
    """The path of a table header: a name that is an array of tables means its newest element."""
    path: Path = ()
    for place, word in enumerate(words):
        path = (*path, word)
        if is_array and place == len(words) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def _words(text: str) -> Path:
    return tuple(word.strip("\"'") for word in _WORD.findall(text))


# ---------------------------------------------------------------- the walk
def _table(values: object, kind: type, path: Path, names: Names) -> typing.Iterator[Problem]:
    if not isinstance(values, dict):
        yield Problem(path, values, "must be a table")
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            yield Problem((*path, key), value, f"unknown key{nearest(key, fields) or _known(fields)}")
            continue
        known = names.get((kind, key))
        yield from _value(value, hints[key], (*path, key), names, known() if known else None)
    for name, field in fields.items():
        if field.required and name not in values:
            yield Problem((*path, name), None, f"is missing; it must be {_rule(hints[name])}")


def _value(
    value: object, hint: Any, path: Path, names: Names, keys: Iterable[str] | None
) -> typing.Iterator[Problem]:
    bare = _bare(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        yield from _table(value, bare, path, names)
    elif origin is tuple and arguments[-1] is Ellipsis and isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield from _value(entry, arguments[0], (*path, index), names, None)
    elif origin is dict and isinstance(value, dict):
        for key, entry in value.items():
            if keys is not None and key not in (known := sorted(keys)):
                yield Problem((*path, key), entry, f"unknown name{nearest(key, known) or _known(known)}")
            else:
                yield from _value(entry, arguments[1], (*path, key), names, None)
    else:
        yield from _leaf(value, hint, path)


def _leaf(value: object, hint: Any, path: Path) -> typing.Iterator[Problem]:
    try:
        msgspec.convert(value, hint)
        right = not (_title(hint) == LOW_HIGH and _falls(value))
    except msgspec.ValidationError:
        right = False
    if not right:
        literal = typing.get_origin(_bare(hint)) is Literal
        close = nearest(value, typing.get_args(_bare(hint))) if literal and isinstance(value, str) else ""
        yield Problem(path, value, f"must be {_rule(hint)}{close}")


def _falls(value: object) -> bool:
    return isinstance(value, list) and value[0] > value[1]


# ---------------------------------------------------------------- words
def _rule(hint: Any) -> str:
    """What a value of this type must be."""
    bare, metas = _bare(hint), _metas(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if origin is Literal:
        return "one of " + ", ".join(f'"{word}"' for word in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if _title(hint) == LOW_HIGH:
            return f"two numbers, the lower one first, each {_rule(arguments[0])}"
        return "[" + ", ".join(map(_rule, arguments)) + "]"
    if origin is tuple:
        return "a list of at least one table"
    if origin is dict:
        return "a table of names and numbers"
    if bare is str:
        return _text_rule(metas)
    if bare is bool:
        return "true or false"
    return ("a whole number" if bare is int else "a number") + _bounds(metas)


def _bounds(metas: list[Meta]) -> str:
    for meta in metas:
        low, high = meta.ge, meta.le
        if low is not None and high is not None:
            return f" from {low:,} to {high:,}"
        if meta.gt is not None and high is not None:
            return f" above {meta.gt:,} and at most {high:,}"
    return ""


def _text_rule(metas: list[Meta]) -> str:
    rule = next((meta.description for meta in metas if meta.description), "text")
    longest = next((meta.max_length for meta in metas if meta.max_length), None)
    return f"{rule} of at most {longest:,} characters" if longest else rule


def _known(names: Iterable[str]) -> str:
    return "; known: " + ", ".join(sorted(names))


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _metas(hint: Any) -> list[Meta]:
    return (
        [part for part in typing.get_args(hint)[1:] if isinstance(part, Meta)]
        if _bare(hint) is not hint
        else []
    )


def _title(hint: Any) -> str | None:
    return next((meta.title for meta in _metas(hint) if meta.title), None)
