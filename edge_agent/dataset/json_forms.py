"""The JSON objects that people keep examples in, each to the normal form; which one it is, its keys say.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}     content: text or parts
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}         ShareGPT
    {"instruction": "…", "input": "…", "output": "…"}                                           Alpaca
    {"prompt": "…", "completion": "…"}      either may be a list of messages
    {"text": "…"}      {"text": "…", "label": "…"}      {"audio": "PATH.wav", "label": "…"}

Any of them may name its `conversation` and its `system` text. Roles go by declaration, never by position. A turn that
cannot be kept (a picture, a call of a tool without text) is refused, not dropped. A refusal names the field and never
repeats the owner's words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NoReturn

import msgspec

from edge_agent.dataset.pair_names import GRADES, NEGATIVE, PAIR, pair_of
from edge_agent.dataset.pair_names import HINT as PAIR_HINT
from edge_agent.dataset.record import Conversation, Labelled, Pair, Passage, Record, Recording, Role, Turn
from fedge.errors import DataError

ALIASES: Final[dict[str, Role]] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
FORMS_HINT: Final = (
    'An example is {"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …}, '
    '{"instruction": …, "output": …}, {"text": …}, {"text": …, "label": …}, {"anchor": …, "positive": …} or '
    '{"audio": "PATH.wav", "label": …}'
)
_FORM_KEYS: Final = ("messages", "conversations", "instruction", "prompt", "text")
_ALSO: Final = {"instruction": ("output",), "prompt": ("completion",)}  # keys that a form cannot do without
_WORD_CHARS: Final = 24  # of a role word that a refusal shows
_UNSET: Final = msgspec.UNSET


class _Part(msgspec.Struct, frozen=True):
    type: str = "text"
    text: str | msgspec.UnsetType = _UNSET


_Content = str | list[_Part] | None | msgspec.UnsetType


class _Message(msgspec.Struct, frozen=True):
    role: str | msgspec.UnsetType = _UNSET
    from_: str | msgspec.UnsetType = msgspec.field(default=_UNSET, name="from")
    content: _Content = _UNSET
    value: _Content = _UNSET
    weight: float | None = None
    tool_calls: list[object] | None = None
    function_call: dict[str, object] | None = None


class Example(msgspec.Struct, frozen=True):
    """One JSON object, or one row of a table, as it stands. Other keys are the owner's business."""

    messages: list[_Message] | msgspec.UnsetType = _UNSET
    conversations: list[_Message] | msgspec.UnsetType = _UNSET
    instruction: str | msgspec.UnsetType = _UNSET
    input: str | None = None
    output: str | msgspec.UnsetType = _UNSET
    history: list[tuple[str, str]] | None = None
    prompt: str | list[_Message] | msgspec.UnsetType = _UNSET
    completion: str | list[_Message] | msgspec.UnsetType = _UNSET
    text: str | msgspec.UnsetType = _UNSET
    # A path where nothing else is there to learn; beside a text it is the owner's business.
    audio: object = _UNSET
    # So are these, the two texts of a pair, and whatever grades it.
    anchor: object = _UNSET
    positive: object = _UNSET
    negative: object = _UNSET
    score: object = _UNSET
    similarity: object = _UNSET
    label: str | int | None = None
    system: str | None = None
    conversation: str | int | None = None


class BadRecord(Exception):
    """What is wrong with one record, at which field; the reader knows file and line."""

    def __init__(self, what: str, field: str, *, hint: str = FORMS_HINT, value: object = None) -> None:
        super().__init__(what)
        self.what, self.field, self.hint, self.value = what, field, hint, value

    def at(self, place: str) -> DataError:
        """The same as the error that the owner sees."""
        return DataError(f"{place}: {self.what}", field=self.field, value=self.value, hint=self.hint)


_decoder: Final = msgspec.json.Decoder(Example)
_any: Final = msgspec.json.Decoder(dict[str, object])


def record_of_json(
    text: str, line: int, roles: Mapping[str, str], columns: Mapping[str, str] | None = None
) -> Record:
    """The record in one JSON object that begins in `line`; `columns`: field -> the key it has. Raises BadRecord."""
    try:
        if columns:
            found = _any.decode(text)
            missing = [key for key in columns.values() if key not in found]
            if missing:
                raise BadRecord(
                    "field is missing", missing[0], hint=f"It was named by --columns: {missing[0]}"
                )
            return record_of_row({field: found[key] for field, key in columns.items()}, line, roles)
        example = _decoder.decode(text)
        whole = {} if _has_form(example) else _any.decode(text)
        if named := pair_of(whole):  # under other names than ours
            return record_of_row({field: whole[key] for field, key in named.items()}, line, roles)
    except msgspec.ValidationError as error:
        _refuse_shape(error)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadRecord(
            f"not JSON: {error}" if "surrogate" not in str(error) else "not JSON: half a letter", "record"
        ) from error
    return record_of(example, line, roles)


def record_of_row(row: Mapping[str, object], line: int, roles: Mapping[str, str]) -> Record:
    """The record in the row of a table, by field name. Raises BadRecord."""
    try:
        example = msgspec.convert(row, Example)
    except msgspec.ValidationError as error:
        _refuse_shape(error)
    return record_of(example, line, roles)


def record_of(example: Example, line: int, roles: Mapping[str, str]) -> Record:
    """The normal form of `example`. Raises BadRecord."""
    form = _form_of(example)
    name = "" if example.conversation is None else str(example.conversation)
    if form == "text":
        assert isinstance(example.text, str)
        if example.label is None:
            return Passage(line, name, example.text)
        return Labelled(line, name, example.text, example.label)
    if form == "audio":
        if not isinstance(example.audio, str):
            raise BadRecord("the path of a sound file is meant", "audio")
        if example.label is None:
            raise BadRecord("field is missing", "label")
        return Recording(line, name, example.audio, example.label)
    if form == "pair":
        return _pair(example, line, name)
    turns = [Turn("system", example.system)] if example.system else []
    turns += _TURNS_OF[form](example, roles)
    return Conversation(line, name, tuple(turns))


def _form_of(example: Example) -> str:
    forms = [key for key in _FORM_KEYS if getattr(example, key) is not _UNSET]
    if len(forms) > 1:
        raise BadRecord("both normal forms at once", forms[0], value=forms)
    if not forms and example.audio is not _UNSET:
        return "audio"
    if not forms and example.anchor is not _UNSET:
        return "pair"
    if not forms:
        lone = [key for key in ("completion", "output") if getattr(example, key) is not _UNSET]
        missing = {"completion": "prompt", "output": "instruction"}[lone[0]] if lone else "messages"
        raise BadRecord("field is missing", missing)
    for key in _ALSO.get(forms[0], ()):
        if getattr(example, key) is _UNSET:
            raise BadRecord("field is missing", key)
    return forms[0]


def _has_form(example: Example) -> bool:
    return any(getattr(example, key) is not _UNSET for key in (*_FORM_KEYS, "audio", "anchor"))


def _pair(example: Example, line: int, name: str) -> Pair:
    texts: list[str] = []
    for field in (*PAIR, NEGATIVE):
        value = getattr(example, field)
        missing = value is _UNSET or value is None
        if missing and field == NEGATIVE:
            value = ""
        if not isinstance(value, str):
            raise BadRecord("field is missing" if missing else "a text is meant", field, hint=PAIR_HINT)
        texts.append(value)
    for field in GRADES:
        if getattr(example, field) not in (_UNSET, None):
            raise BadRecord(
                "a pair with a grade: only what belongs together is learnt",
                field,
                hint="Keep the pairs that belong together, and leave the grade out",
            )
    return Pair(line, name, *texts)


def _from_messages(example: Example, roles: Mapping[str, str]) -> Iterator[Turn]:
    assert isinstance(example.messages, list)
    return _turns(example.messages, "messages", roles)


def _from_sharegpt(example: Example, roles: Mapping[str, str]) -> Iterator[Turn]:
    assert isinstance(example.conversations, list)
    return _turns(example.conversations, "conversations", roles)


def _from_alpaca(example: Example, roles: Mapping[str, str]) -> Iterator[Turn]:
    for question, answer in example.history or ():
        yield Turn("user", question)
        yield Turn("assistant", answer)
    asked = f"{example.instruction}\n\n{example.input}" if example.input else str(example.instruction)
    yield Turn("user", asked)
    yield Turn("assistant", str(example.output))


def _from_pair(example: Example, roles: Mapping[str, str]) -> Iterator[Turn]:
    if isinstance(example.prompt, list):
        for turn in _turns(example.prompt, "prompt", roles):
            yield Turn(turn.role, turn.text, learnt=False)
    else:
        yield Turn("user", str(example.prompt))
    if isinstance(example.completion, list):
        yield from _turns(example.completion, "completion", roles)
    else:
        yield Turn("assistant", str(example.completion))


_TURNS_OF: Final = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
    "prompt": _from_pair,
}


def _turns(messages: list[_Message], key: str, roles: Mapping[str, str]) -> Iterator[Turn]:
    for number, message in enumerate(messages):
        where = f"{key}[{number}]"
        role = _role(message, where, roles)
        if message.tool_calls or message.function_call:
            raise BadRecord("the call of a tool cannot be kept as text", f"{where}.tool_calls")
        yield Turn(role, _content(message, where), learnt=message.weight is None or message.weight > 0)


def _role(message: _Message, where: str, roles: Mapping[str, str]) -> Role:
    word = message.role if message.role is not _UNSET else message.from_
    if not isinstance(word, str):
        raise BadRecord("field is missing", f"{where}.role")
    found = roles.get(word) or ALIASES.get(word.lower())
    if found is None:
        shown = word if len(word) <= _WORD_CHARS else f"{word[:_WORD_CHARS]}…"
        raise BadRecord(
            "who is this",
            f"{where}.role",
            value=shown,
            hint=f"Say it: --roles {shown}=user (or assistant, system, tool)",
        )
    return ALIASES[found]


def _content(message: _Message, where: str) -> str:
    name = "content" if message.content is not _UNSET else "value"
    content = getattr(message, name)
    if content is None or content is _UNSET:
        raise BadRecord("field is missing", f"{where}.content")
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for number, part in enumerate(content):
        if part.type != "text" or not isinstance(part.text, str):
            raise BadRecord(
                "only text can be learnt", f"{where}.{name}[{number}].type", value=part.type[:_WORD_CHARS]
            )
        texts.append(part.text)
    return "".join(texts)


def _refuse_shape(error: msgspec.ValidationError) -> NoReturn:
    what, _, where = str(error).partition(" - at ")
    field = where.strip("`").removeprefix("$").lstrip(".") or "record"
    raise BadRecord(what, field) from error
