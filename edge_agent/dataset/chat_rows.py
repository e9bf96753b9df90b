"""A conversation to token rows, written as the model's own chat template writes it; only the answers are learnt.

A conversation that fits the window is one row. A longer one is cut so that every answer is learnt once, each with as
much of what came before as fits: the system turn stays, the oldest turns go first, and where one question is too long
by itself its beginning goes. The ids are those of the whole text, so a row is what a reference tokenizer gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Protocol, runtime_checkable

import numpy as np

from edge_agent.dataset.record import Conversation, Turn
from edge_agent.dataset.row import Row, Seen, longest
from fedge.chat import ChatFormat, check, write_unchecked
from fedge.errors import DataError

_SYSTEM_SHARE: Final = 2  # a system turn gets at most this part of the window: one half
_JOIN: Final = "--join-runs makes one turn of those that follow each other"
_SKIP: Final = "--skip-bad N passes over up to N such conversations"
_HELP: Final[dict[object, str]] = {
    **dict.fromkeys(("users-in-a-row", "assistants-in-a-row", "tools-in-a-row"), f"{_JOIN}; {_SKIP}"),
    **dict.fromkeys(
        ("system-later", "system-alone", "assistant-first", "tool-first", "tool", "empty-turn", "thought"),
        _SKIP,
    ),
}


@runtime_checkable
class SpanEncoder(Protocol):
    """What is asked of a tokenizer here."""

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and the characters (from, to) that each stands for."""
        ...


@dataclass(slots=True)
class _Piece:
    """Turns that fit the window together, as ids; and for each answer in them the tokens (from, to) it is."""

    ids: list[int]
    answers: list[tuple[int, int]]


class ChatRows:
    """Makes the rows of conversations with one format, tokenizer and window."""

    def __init__(self, chat: ChatFormat, encode: SpanEncoder, *, eos_id: int, most: int) -> None:
        self._chat, self._encode, self._eos, self._most = chat, encode, eos_id, most
        self._trim = "outer-space" in chat.cannot

    def rows(self, conversation: Conversation, seen: Seen) -> Iterator[Row]:
        """The rows of a conversation, counted in `seen`. Raises DataError when its shape cannot be written."""
        turns = [replace(turn, text=turn.text.strip()) if self._trim else turn for turn in conversation.turns]
        self._check(turns)
        seen.trimmed += sum(map(self._loses_space, conversation.turns))
        wanted = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learnt]
        seen.examples += len(wanted)
        todo = [i for i in wanted if turns[i].text.strip()]
        seen.empty += len(wanted) - len(todo)
        seen.unused += len(turns) - 1 - (todo[-1] if todo else -1)  # what comes after the last answer
        while todo:
            found = self._fitting(turns, todo)
            if found is None:
                seen.too_long += 1
                todo = todo[1:]
                continue
            piece, shown, learnt = found
            seen.kept += len(learnt)
            seen.shortened += len(learnt) if shown else 0
            yield self._row(piece, conversation.conversation)
            todo = todo[len(learnt) :]

    def _check(self, turns: Sequence[Turn]) -> None:
        """Raises DataError, with what the owner can do about it, when the template cannot write this shape."""
        try:
            check(self._chat, [(turn.role, turn.text) for turn in turns])
        except DataError as error:
            if error.value not in _HELP:
                raise
            hint = f"{error.hint.rstrip('. ')}. {_HELP[error.value]}".removeprefix(". ")
            raise DataError(error.what, field=error.field, value=error.value, hint=hint) from error

    def _loses_space(self, turn: Turn) -> bool:
        """Whether white space at an end of a turn's text is not written: the template takes it off."""
        text, frame = turn.text, self._chat.frames.get(turn.role)
        if not text.strip():
            return False
        return (text.strip() if self._trim or frame is None else frame.text(text)) != text

    def _fitting(self, turns: list[Turn], todo: list[int]) -> tuple[_Piece, bool, list[int]] | None:
        """The row that learns the first of `todo` and as many after it as fit; whether something was left out."""
        first = todo[0]
        system = turns[:1] if turns[0].role == "system" else []
        asked = (i for i in range(len(system), first) if turns[i].role == "user")
        starts = sorted({len(system), *asked})
        start, best = first, None
        for at in reversed(starts):  # from the nearest question back
            piece = self._piece([*system, *turns[at : first + 1]], {first - at + len(system)})
            if piece is None:
                break
            start, best = at, piece
        if best is None:
            piece = self._shortened(system, turns[starts[-1] : first + 1])
            return None if piece is None else (piece, True, [first])
        learnt = [first]
        for last in todo[1:]:
            more = {i - start + len(system) for i in (*learnt, last)}
            piece = self._piece([*system, *turns[start : last + 1]], more)
            if piece is None:
                break
            best, learnt = piece, [*learnt, last]
        return best, start > len(system), learnt

    def _shortened(self, system: list[Turn], turns: list[Turn]) -> _Piece | None:
        """The last answer with its question's beginning left out, and the system's where that takes over half."""
        if system:
            said, room = system[0].text, self._most // _SYSTEM_SHARE

            def alone(letters: int) -> bool:
                return len(self._encode.spans(said[len(said) - letters :])[0]) <= room

            system = [replace(system[0], text=said[len(said) - longest(len(said), alone) :])]
        asked = next((i for i in reversed(range(len(turns) - 1)) if turns[i].role == "user"), None)
        if asked is None:
            return None
        text = turns[asked].text

        def with_end(letters: int) -> _Piece | None:
            cut = replace(turns[asked], text=text[len(text) - letters :])
            kept = [*system, cut, *turns[asked + 1 :]]
            return self._piece(kept, {len(kept) - 1})

        letters = longest(len(text), lambda letters: with_end(letters) is not None)
        return with_end(letters) if letters else None

    def _piece(self, turns: Sequence[Turn], learnt: set[int]) -> _Piece | None:
        """These turns as tokens up to the end of the last answer in `learnt`; None when they do not fit."""
        text, spans = write_unchecked(self._chat, [(turn.role, turn.text) for turn in turns])
        places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        said = [span for place, span in zip(places, spans, strict=True) if place in learnt]
        ids, offsets = self._encode.spans(text)
        answers = []
        for start, end in said:
            inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
            if not inside:
                return None
            answers.append((inside[0], inside[-1] + 1))
        ids = ids[: answers[-1][1]]
        if not self._chat.end:
            ids.append(self._eos)
            answers[-1] = answers[-1][0], len(ids)
        return _Piece(ids, answers) if len(ids) <= self._most else None

    def _row(self, piece: _Piece, conversation: str) -> Row:
        first = piece.answers[0][0]
        gaps = tuple((end, start) for (_, end), (start, _) in pairwise(piece.answers) if end < start)
        return Row(np.array(piece.ids, np.int32), first, conversation, gaps)
