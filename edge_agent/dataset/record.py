"""The normal form of private data: what every reader makes of a file, whatever the file looked like.

A `Conversation` is a list of (role, text): `system`, `user`, `assistant`, `tool`. A `Passage` is text that is learnt as
it stands. A `Labelled` text has the name or the number of its class, and so has a `Recording`, which is a sound file.
A `Pair` is two texts that belong together.
Nothing here knows tokens or templates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["system", "user", "assistant", "tool"]
_PASSAGE_CHARS: Final = 400  # about one example of the usual window


@dataclass(frozen=True, slots=True)
class Turn:
    """Something said. `learnt` is False where the owner's file says that this answer is only context."""

    role: Role
    text: str
    learnt: bool = True


@dataclass(frozen=True, slots=True)
class TextExample:
    """What is answered to, and the answer that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """`line` (from 1) is where it begins in its file; `conversation` is the owner's name for what belongs together."""

    line: int
    conversation: str
    turns: tuple[Turn, ...]

    @property
    def examples(self) -> tuple[TextExample, ...]:
        """One example for each learnt `assistant` turn: its prompt is the last run of `user` turns before it."""
        return self._examples()[0]

    @property
    def turns_unused(self) -> int:
        """How many turns no example uses: system and tool turns, a last question without an answer."""
        return len(self.turns) - self._examples()[1]

    @property
    def samples(self) -> int:
        """How many answers there are to learn."""
        return sum(turn.role == "assistant" and turn.learnt for turn in self.turns)

    def _examples(self) -> tuple[tuple[TextExample, ...], int]:
        examples: list[TextExample] = []
        prompt: list[str] = []
        used = 0
        answered = False
        for turn in self.turns:
            if turn.role == "user":
                prompt = [turn.text] if answered else [*prompt, turn.text]
                answered = False
            elif turn.role == "assistant":
                if turn.learnt:
                    examples.append(TextExample("\n".join(prompt), turn.text))
                    used += 1 + (0 if answered else len(prompt))
                answered = True
        return tuple(examples), used


@dataclass(frozen=True, slots=True)
class Passage:
    """Text that is learnt as it stands. `ends` is False for a piece of a longer text that goes on."""

    line: int
    conversation: str
    text: str
    ends: bool = True

    @property
    def samples(self) -> int:
        """About how many windows it fills."""
        return 1 + len(self.text) // _PASSAGE_CHARS


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class: the name of the label, or its number where the file has a number."""

    line: int
    conversation: str
    text: str
    label: str | int

    @property
    def samples(self) -> int:
        """One."""
        return 1


@dataclass(frozen=True, slots=True)
class Recording:
    """A sound file and its class; `audio` is its path, relative to the folder of the list that names it."""

    line: int
    conversation: str
    audio: str
    label: str | int

    @property
    def samples(self) -> int:
        """One."""
        return 1


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that belong together: a question and its answer, two ways to say one thing. `negative` is one that
    seems to and does not, "" = none.
    """

    line: int
    conversation: str
    anchor: str
    positive: str
    negative: str = ""

    @property
    def samples(self) -> int:
        """One."""
        return 1


Record = Conversation | Passage | Labelled | Recording | Pair


def normal_form(record: Record) -> dict[str, object]:
    """The record as the object that stands for it in JSON Lines; reading that line gives the record again."""
    named: dict[str, object] = {"conversation": record.conversation} if record.conversation else {}
    if isinstance(record, Conversation):
        return {"messages": [_message(turn) for turn in record.turns], **named}
    if isinstance(record, Recording):
        return {"audio": record.audio, "label": record.label, **named}
    if isinstance(record, Labelled):
        return {"text": record.text, "label": record.label, **named}
    if isinstance(record, Pair):
        others = {"negative": record.negative} if record.negative else {}
        return {"anchor": record.anchor, "positive": record.positive, **others, **named}
    return {"text": record.text, **named}


def joined(record: Record) -> Record:
    """The record with turns of one role in a row made one. An answer that is only context stays one by itself."""
    if not isinstance(record, Conversation):
        return record
    turns: list[Turn] = []
    for turn in record.turns:
        if turns and (turns[-1].role, turns[-1].learnt) == (turn.role, turn.learnt):
            turns[-1] = Turn(turn.role, f"{turns[-1].text}\n{turn.text}", turn.learnt)
        else:
            turns.append(turn)
    return Conversation(record.line, record.conversation, tuple(turns))


def _message(turn: Turn) -> dict[str, object]:
    message: dict[str, object] = {"role": turn.role, "content": turn.text}
    return message if turn.learnt else {**message, "weight": 0}
