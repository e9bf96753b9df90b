"""A model's chat template as the table that a device follows, read off by probing and checked letter for letter.

Words that occur nowhere else are put into conversations; what stands between them is the table. Then the table and the
template write the same many conversations of every shape, and a shape on which they differ, or which the template
refuses, is noted as one that a device must refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from tokenizers import Tokenizer

from fedge.chat import SHAPES, ChatFormat, Frame, Said, shapes_of, write_unchecked
from fedge.errors import DataError, UnsupportedError
from quantize.chat_probes import ROLES, conversations
from quantize.chat_template import ChatTemplate, TemplateRefused

_INEXPRESSIBLE: Final = "the model's template writes it in a way that no table of prefixes can"


def chat_format(template: str, tokens: Mapping[str, str], tokenizer: bytes, eos_id: int) -> ChatFormat | None:
    """The checked table of a chat template; None where the model has no template.

    A template that no table can say gives a table without frames, whose `cannot` says why.
    """
    if not template:
        return None
    try:
        model = ChatTemplate(template, tokens)
        draft = _Reader(model, tokens).draft()
    except (DataError, TemplateRefused, UnsupportedError) as error:
        return ChatFormat(frames={}, cannot={"conversation": str(error)})
    chat = _with_ends(draft, Tokenizer.from_str(tokenizer.decode()), eos_id)
    cannot, probes = _gate(model, chat)
    if "conversation" in cannot:
        return ChatFormat(frames={}, cannot={"conversation": cannot["conversation"]})
    return msgspec.structs.replace(chat, cannot=cannot, probes=probes)


def _with_ends(chat: ChatFormat, tokenizer: Tokenizer, eos_id: int) -> ChatFormat:
    """What ends an answer: the assistant's suffix up to its first special token."""
    suffix = chat.frames["assistant"].suffix
    ends = [
        (suffix.index(token.content) + len(token.content), number)
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and token.content and token.content in suffix
    ]
    end, number = min(ends, default=(0, eos_id))
    return msgspec.structs.replace(chat, end=suffix[:end], end_ids=tuple(sorted({number, eos_id})))


class _Reader:
    """Puts words that occur nowhere else into conversations and looks at what stands between them."""

    def __init__(self, model: ChatTemplate, tokens: Mapping[str, str]) -> None:
        self._model, self._tokens = model, tokens

    def draft(self) -> ChatFormat:
        """All but what ends an answer. Raises TemplateRefused, or UnsupportedError when like turns are not alike."""
        head, *between, _ = self._split("uauaua")
        after_user, after_answer = self._split("u")[-1], self._split("ua")[-1]
        first_answer, second_answer, last_answer = between[0], between[2], between[4]
        next_user = between[1]
        if first_answer != second_answer or next_user != between[3]:
            raise _not_alike()
        ending = next(
            (
                text
                for text in ("", *self._tokens.values())
                if after_user.endswith(text)
                and after_answer.endswith(text)
                and first_answer.startswith(_without(after_user, text))
                and next_user.startswith(_without(after_answer, text))
            ),
            None,
        )
        if ending is None:
            raise _not_alike()
        user_suffix, suffix = _without(after_user, ending), _without(after_answer, ending)
        user_prefix, prefix = next_user[len(suffix) :], first_answer[len(user_suffix) :]
        if not head.endswith(user_prefix) or not last_answer.startswith(user_suffix):
            raise _not_alike()
        frames = {
            "user": Frame(user_prefix, user_suffix, self._strip("u", "u")),
            "assistant": Frame(prefix, suffix, self._strip("ua", "a")),
        }
        last = last_answer[len(user_suffix) :]
        asked = self._split("u", ask=True)[-1]
        if not asked.startswith(user_suffix):
            raise _not_alike()
        opening, default, system = self._system(_without(head, user_prefix), user_prefix, frames)
        self._tool(frames)
        return ChatFormat(
            opening=opening,
            default_system=default,
            frames=frames,
            last_answer=None if last == prefix else Frame(last, suffix, frames["assistant"].strip),
            system=system,
            generation=asked[len(user_suffix) :],
            ending=ending,
        )

    def _system(
        self, head: str, user_prefix: str, frames: dict[str, Frame]
    ) -> tuple[str, str, Literal["turn", "first-user", "last-user"]]:
        """What opens every conversation, what stands for a system turn where there is none, and where one stands."""
        bos = self._tokens.get("bos_token", "")
        bos = "" if user_prefix.startswith(bos) else bos  # where it opens every turn, it opens nothing else
        try:
            text = self._model.write(_said("suaua"))
        except TemplateRefused:
            opening = bos if head.startswith(bos) else ""
            return opening, head[len(opening) :], "turn"
        words = [_word(kind, number) for number, kind in enumerate("suaua")]
        at = [text.find(word) for word in words]
        if min(at) < 0:  # the system's words are nowhere: left out without a word
            opening = bos if head.startswith(bos) else ""
            return opening, head[len(opening) :], "turn"
        before, behind = text[: at[0]], text[at[0] + len(words[0]) :]
        if at[0] < at[1]:
            between = behind[: behind.index(words[1])]
            opening = bos if head.startswith(bos) and before.startswith(bos) else ""
            own = between.endswith(user_prefix) and user_prefix and not before.endswith(user_prefix)
            strip = self._strip("su", "s")
            if own:
                frames["system"] = Frame(before[len(opening) :], _without(between, user_prefix), strip)
                return opening, head[len(opening) :], "turn"
            frames["system"] = Frame(before[len(opening) :], between, strip)
            return opening, head[len(opening) :], "first-user"
        # Between the first answer and the last question.
        start = text.rindex(words[2], 0, at[0]) + len(words[2]) + len(frames["assistant"].suffix)
        frames["system"] = Frame(
            text[start : at[0]], behind[: behind.index(words[3])], self._strip("su", "s")
        )
        return head, "", "last-user"

    def _tool(self, frames: dict[str, Frame]) -> None:
        """The frame of a tool's turn, where the template has one."""
        answer = frames["assistant"]
        try:
            pieces = self._split("uatau")
        except (TemplateRefused, UnsupportedError):
            return
        before, behind = pieces[2], pieces[3]
        if before.startswith(answer.suffix) and behind.endswith(answer.prefix):
            frames["tool"] = Frame(
                before[len(answer.suffix) :], _without(behind, answer.prefix), self._strip("uat", "t")
            )

    def _split(self, roles: str, *, ask: bool = False) -> list[str]:
        """What stands before, between and behind the words of a conversation of these roles."""
        text = self._model.write(_said(roles), ask=ask)
        pieces = []
        for number, kind in enumerate(roles):
            before, found, text = text.partition(_word(kind, number))
            if not found:
                raise UnsupportedError(
                    "the chat template leaves a turn out", field="chat_template", value=kind
                )
            pieces.append(before)
        return [*pieces, text]

    def _strip(self, roles: str, kind: str) -> Literal["", "left", "right", "both"]:
        """Which ends of the last turn of this kind lose their white space."""
        number = roles.rindex(kind)
        said, word = _said(roles), _word(kind, number)
        said[number] = (said[number][0], f" \n{word}\t ")
        spaced = self._model.write(said)
        left, right = f" \n{word}" not in spaced, f"{word}\t " not in spaced
        return "both" if left and right else "left" if left else "right" if right else ""


def _not_alike() -> UnsupportedError:
    return UnsupportedError("the chat template writes like turns in unlike ways", field="chat_template")


def _word(kind: str, number: int) -> str:
    return f"Q{kind}{number}w"


def _said(roles: str) -> list[Said]:
    return [(ROLES[kind], _word(kind, number)) for number, kind in enumerate(roles)]


def _without(text: str, end: str) -> str:
    return text[: len(text) - len(end)]


def _gate(model: ChatTemplate, chat: ChatFormat) -> tuple[dict[str, str], int]:
    """Shapes on which table and template differ, each with the reason; and how many conversations agreed."""
    cannot: dict[str, str] = {}
    proven: set[str] = set()
    agreed = 0
    for said in conversations():
        shapes = set(shapes_of(said))
        if shapes & cannot.keys():
            continue
        asks = (False, True) if said[-1][0] in ("user", "tool") else (False,)
        reason = next(filter(None, (_difference(model, chat, said, ask) for ask in asks)), "")
        if reason:
            order = [shape for shape in SHAPES if shape in shapes]
            blamed = [shape for shape in order if shape not in proven] or order
            cannot[blamed[-1]] = reason
        else:
            proven |= shapes
            agreed += 1
    return cannot, agreed


def _difference(model: ChatTemplate, chat: ChatFormat, said: Sequence[Said], ask: bool) -> str:
    """Why the table does not write this conversation as the template does; "" when it does."""
    try:
        wanted = model.write(said, ask=ask)
    except TemplateRefused as error:
        return str(error)
    try:
        return "" if write_unchecked(chat, said, ask=ask).text == wanted else _INEXPRESSIBLE
    except KeyError:
        return _INEXPRESSIBLE
