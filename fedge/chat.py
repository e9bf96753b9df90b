"""How a model wants a conversation written, as a table that a device can follow without running a template.

A chat template is a program; none travels. When a bundle is made, the model's own template is run over many
conversations and this table is read off and checked against it, letter for letter (`quantize.chat`). What a table
cannot say is in `cannot`: such conversations are refused with the reason, never written some other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import msgspec

from fedge.errors import DataError

Said = tuple[str, str]  # role ("system", "user", "assistant", "tool"), text
SHAPES: Final = {
    "conversation": "user and assistant by turns",
    "system": "a system turn at the beginning",
    "system-later": "a system turn after the beginning",
    "system-alone": "nothing but the system",
    "assistant-first": "it begins with the assistant",
    "tool-first": "it begins with a tool",
    "users-in-a-row": "two user turns in a row",
    "assistants-in-a-row": "two assistant turns in a row",
    "tool": "a tool's turn",
    "tools-in-a-row": "two tool turns in a row",
    "empty-turn": "a turn without text",
    "outer-space": "white space at the ends of a text",
    "thought": "an answer with a thought in it (</think>)",
}


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands around the text of a turn, and at which of its ends white space is taken off."""

    prefix: str = ""
    suffix: str = ""
    strip: Literal["", "left", "right", "both"] = ""

    def text(self, text: str) -> str:
        """The text as it is written."""
        if self.strip == "both":
            return text.strip()
        return text.lstrip() if self.strip == "left" else text.rstrip() if self.strip == "right" else text


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation is `opening`, the system turn or else `default_system`, each turn in its frame, `ending`.

    Asking for an answer puts `generation` in the place of `ending`. A `system` turn that has no place of its own
    stands, in its frame, where the prefix of the first or last user turn would be.
    """

    opening: str = ""
    default_system: str = ""
    frames: dict[str, Frame]  # by role
    last_answer: Frame | None = None  # of an assistant turn in the last place, where that one is another
    system: Literal["turn", "first-user", "last-user"] = "turn"
    generation: str = ""
    ending: str = ""
    end: str = ""  # the part of the assistant's suffix that the model says itself, to end its answer
    end_ids: tuple[int, ...] = ()  # generation stops at any of these
    cannot: dict[str, str] = {}  # one of SHAPES -> why
    probes: int = 0  # conversations that the table was checked on


class Written(NamedTuple):
    """A conversation as text; `answers`: for each assistant turn, the characters (from, to) that the model says."""

    text: str
    answers: tuple[tuple[int, int], ...]


def shapes_of(said: Sequence[Said]) -> Iterator[str]:
    """Which of SHAPES a conversation has."""
    roles = [role for role, _ in said]
    spoken = [role for role in roles if role != "system"]
    yield "conversation"
    if roles[:1] == ["system"]:
        yield "system"
    if "system" in roles[1:]:
        yield "system-later"
    if spoken[:1] != ["user"]:
        yield f"{spoken[0]}-first" if spoken else "system-alone"
    if "tool" in roles:
        yield "tool"
    for role in ("user", "assistant", "tool"):
        if any(a == b == role for a, b in pairwise(spoken)):
            yield f"{role}s-in-a-row"
    if any(not text.strip() for _, text in said):
        yield "empty-turn"
    if any(text.strip() and text != text.strip() for _, text in said):
        yield "outer-space"
    if any(role == "assistant" and "</think>" in text for role, text in said):
        yield "thought"


def check(chat: ChatFormat, said: Sequence[Said]) -> None:
    """Raises DataError when the table cannot write this conversation as the model's template would."""
    for shape in shapes_of(said):
        if shape in chat.cannot:
            raise DataError(
                f"the model's chat template does not take this conversation: {SHAPES[shape]}",
                field="messages",
                value=shape,
                hint=chat.cannot[shape],
            )


def write(chat: ChatFormat, said: Sequence[Said], *, ask: bool = False) -> Written:
    """The conversation as the model's template writes it; `ask` for an answer to it. Raises DataError, as `check`."""
    check(chat, said)
    return write_unchecked(chat, said, ask=ask)


def write_unchecked(chat: ChatFormat, said: Sequence[Said], *, ask: bool = False) -> Written:
    """The same for a conversation whose shape is known to be right. Raises KeyError for a role without a frame."""
    pieces, answers = [chat.opening], list[tuple[int, int]]()
    place, system = -1, ""
    if not said or said[0][0] != "system":
        pieces.append(chat.default_system)
    elif chat.system != "turn":
        frame, text, said = chat.frames["system"], said[0][1], said[1:]
        place, system = _host(chat, said), frame.prefix + frame.text(text) + frame.suffix
    length = sum(map(len, pieces))
    for number, (role, text) in enumerate(said):
        own = chat.frames[role]
        if role == "assistant" and chat.last_answer is not None and number == len(said) - 1:
            own = chat.last_answer
        prefix = system if number == place else own.prefix
        pieces.append(prefix + own.text(text) + own.suffix)
        if role == "assistant":
            start = len(chat.generation) if prefix.startswith(chat.generation) else len(prefix)
            unsaid = len(own.suffix) - (len(chat.end) if own.suffix.startswith(chat.end) else 0)
            answers.append((length + start, length + len(pieces[-1]) - unsaid))
        length += len(pieces[-1])
    pieces.append(chat.generation if ask else chat.ending)
    return Written("".join(pieces), tuple(answers))


def _host(chat: ChatFormat, said: Sequence[Said]) -> int:
    """The user turn that the system's text stands in. Raises KeyError when there is none."""
    users = [number for number, (role, _) in enumerate(said) if role == "user"]
    if not users:
        raise KeyError("user")
    return users[0] if chat.system == "first-user" else users[-1]
