"""Real people for the fleet: BYU chit-chat (MIT) as one private data set for each person.

A device is one person. Every fifth *conversation* of a person is held out, never single lines of one, and what is
held out for one chosen person is held out for all, because the other side of that conversation may be chosen too.
Messages to choose by are held out as well: of a conversation whose other side was trained on, they flatter the fleet.
The draws are seeded, so everyone measures on the same held-out messages. A person's words are private even here:
files are written with mode 0600, and no error repeats a line.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.dataset import TextExample, render
from fedge.errors import DataError, NoInputError
from fedge.io import durable
from fedge.messages import Template

PROMPT_CHARS_MAX: Final = 300  # of what the partner said; a template cuts further
ROWS_MAX: Final = 3_000  # of one person: two wrote over 20,000 lines
HOLD_EVERY: Final = 5
HELDOUT_ROWS: Final = 24
VALIDATION_ROWS: Final = 24  # eight decide between adapters by chance: they have some 115 tokens
TRAIN_ROWS_MIN: Final = 150
HELDOUT_CONVERSATIONS_MIN: Final = 5
WORDS_MIN: Final = 4  # shorter lines ("haha", "yeah same") say little about how a person writes

DEFAULT_TEMPLATE: Final = Template()

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a person, and what the partner said just before (empty at the start)."""

    conversation: str
    timestamp: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PersonSplit:
    """One person's messages: to train on, to choose by, and to be measured on."""

    person: str
    train: tuple[Turn, ...]
    validation: tuple[Turn, ...]
    heldout: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    person: str
    train: list[Turn]
    test: list[Turn]
    held: frozenset[str]


class _Message(msgspec.Struct, frozen=True):
    text: str
    timestamp: str
    sender: str


class _Conversation(msgspec.Struct, frozen=True):
    messages: list[list[_Message]]  # runs of messages by one sender


def read_people(path: Path) -> dict[str, list[Turn]]:
    """Everyone in the package's `dataset.json`, named `user0000` and on by characters written, most first.

    Raises NoInputError, DataError.
    """
    try:
        conversations = msgspec.json.decode(path.read_bytes(), type=dict[str, _Conversation])
    except FileNotFoundError as error:
        raise NoInputError("data set does not exist", field="path", value=str(path)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not the chit-chat data set: {error}",
            hint="Fetch it: fedge data pull chitchat --verify",
        ) from error
    written: dict[str, list[Turn]] = {}
    for name, conversation in conversations.items():
        for sender, turn in _turns(name[:8], conversation.messages):
            written.setdefault(sender, []).append(turn)
    order = sorted(written, key=lambda sender: -sum(len(turn.completion) for turn in written[sender]))
    return {f"user{place:04d}": written[sender] for place, sender in enumerate(order)}


def split_people(
    people: Mapping[str, Sequence[Turn]],
    devices: int,
    unseen: int,
    *,
    encode: Encode,
    template: Template = DEFAULT_TEMPLATE,
    window: int = 64,
) -> tuple[list[PersonSplit], list[PersonSplit]]:
    """The first `devices` people who wrote enough, and the next `unseen`, who only measure.

    A message counts when it has `WORDS_MIN` words and fewer than `window` tokens with its prompt and the end token.
    Raises DataError when too few people wrote enough.
    """
    chosen: list[_Candidate] = []
    for person, turns in people.items():
        if len(chosen) == devices + unseen:
            break
        candidate = _candidate(person, turns[:ROWS_MAX], lambda turn: _fits(turn, encode, template, window))
        if candidate is not None:
            chosen.append(candidate)
    if len(chosen) < devices + unseen:
        raise DataError(
            "too few people wrote enough",
            field="people",
            value=len(chosen),
            hint=f"Ask for at most {len(chosen)} devices and unseen people together",
        )
    banned = frozenset[str]().union(*(candidate.held for candidate in chosen))
    splits = [_draw(candidate, banned) for candidate in chosen]
    return splits[:devices], splits[devices:]


def write_person(folder: Path, split: PersonSplit) -> None:
    """`train.jsonl`, `validation.jsonl` and `heldout.jsonl`, as the agent reads them. Raises StorageError."""
    durable.make_folder(folder, secret=True)
    for name in ("train", "validation", "heldout"):
        lines = _lines(getattr(split, name))
        durable.write_bytes(folder / f"{name}.jsonl", lines, secret=True)


def _turns(name: str, runs: Sequence[Sequence[_Message]]) -> Iterable[tuple[str, Turn]]:
    """Sender and turn for each message; the prompt is the last run of anybody else, joined."""
    for place, run in enumerate(runs):
        for message in run:
            others = (
                other for other in reversed(runs[:place]) if other and other[0].sender != message.sender
            )
            prompt = " ".join(said.text for said in next(others, ()))[-PROMPT_CHARS_MAX:]
            yield message.sender, Turn(name, message.timestamp, prompt, message.text)


def _candidate(person: str, turns: Sequence[Turn], fits: Callable[[Turn], bool]) -> _Candidate | None:
    held = frozenset(sorted({turn.conversation for turn in turns})[::HOLD_EVERY])
    if len(held) < HELDOUT_CONVERSATIONS_MIN:
        return None
    usable = [turn for turn in turns if fits(turn)]
    train = [turn for turn in usable if turn.conversation not in held]
    test = [turn for turn in usable if turn.conversation in held]
    if len(set(test)) < HELDOUT_ROWS + VALIDATION_ROWS or len(train) < TRAIN_ROWS_MIN:
        return None
    return _Candidate(person, train, test, held)


def _fits(turn: Turn, encode: Encode, template: Template, window: int) -> bool:
    if len(turn.completion.split()) < WORDS_MIN:
        return False
    prompt, completion = render(template, TextExample(turn.prompt, turn.completion))
    return len(encode(prompt)) + len(encode(completion)) + 1 < window


def _draw(candidate: _Candidate, banned: frozenset[str]) -> PersonSplit:
    # Two draws of twelve, because the first twelve alone are the set of the published pooled baseline (4.616).
    half = HELDOUT_ROWS // 2
    heldout = random.Random(1).sample(candidate.test, half)  # noqa: S311 - a fixed draw, not a secret
    rest = [turn for turn in candidate.test if turn not in heldout]
    heldout += random.Random(2).sample(rest, half)  # noqa: S311
    train = [turn for turn in candidate.train if turn.conversation not in banned]
    random.Random(3).shuffle(train)  # noqa: S311
    validation = _validation(candidate.test, heldout)
    return PersonSplit(candidate.person, tuple(train), tuple(validation), tuple(heldout))


def _validation(test: Sequence[Turn], heldout: Sequence[Turn]) -> list[Turn]:
    """Messages that are not measured on, as far as they go of conversations that no measured one is of."""
    measured, conversations = set(heldout), {turn.conversation for turn in heldout}
    rest = [turn for turn in dict.fromkeys(test) if turn not in measured]
    random.Random(4).shuffle(rest)  # noqa: S311
    rest.sort(key=lambda turn: turn.conversation in conversations)  # stable: the draw decides among alike
    return rest[:VALIDATION_ROWS]


def _lines(turns: Sequence[Turn]) -> bytes:
    encoder = msgspec.json.Encoder()
    rows = (
        {"prompt": turn.prompt, "completion": turn.completion, "conversation": turn.conversation}
        for turn in turns
    )
    return encoder.encode_lines(list(rows))
