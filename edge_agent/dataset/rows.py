"""Records to token rows: what a model reads, and which of it is learnt.

Only the owner's own words are learnt: the completion of a prompt, the answers of a conversation, a passage as a whole.
An answer ends with the token that ends answers, which *is* a label, even where the padding token has the same number:
labels and the attention mask decide, never the value of an id.

Where an example is longer than the window, its answer is kept and its prompt is shortened from the left; a text with a
label loses its end; a passage is cut into windows. An answer that does not fit even so is left out. All of it is
counted; a file without a usable row is refused, because a mean over nothing is not zero.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.chat_rows import ChatRows, SpanEncoder
from edge_agent.dataset.choices import Reading
from edge_agent.dataset.encoding import Encode
from edge_agent.dataset.pair_names import HINT as PAIR_HINT
from edge_agent.dataset.pair_rows import PAIRS_MIN, different, pair_row
from edge_agent.dataset.reading import Tally, read_records
from edge_agent.dataset.record import Conversation, Labelled, Pair, Passage, Record, Recording, TextExample
from edge_agent.dataset.row import Row, Seen, longest
from edge_agent.jobs import Counts
from fedge.chat import ChatFormat
from fedge.errors import ConfigError, DataError
from fedge.messages import Template

_CLASSES_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class Dataset:
    """The usable rows of a data file, in its order, and the count of everything else."""

    rows: tuple[Row, ...]
    counts: Counts


def check_template(template: Template) -> Template:
    """The template, when each format holds its own placeholder once and no other. Raises ConfigError."""
    for field in ("prompt", "completion"):
        text = getattr(template, field)
        try:
            parts = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise ConfigError(f"template cannot be read: {error}", field=field, value=text) from error
        if parts != [(field, "", None)]:
            raise ConfigError(
                f"template must hold {{{field}}} once and nothing else in braces", field=field, value=text
            )
    return template


def render(template: Template, example: TextExample) -> tuple[str, str]:
    """Prompt and completion as text. A long prompt keeps its end; an empty one is the template's own word."""
    prompt = example.prompt[-template.prompt_chars_max :] or template.empty_prompt
    return template.prompt.format(prompt=prompt), template.completion.format(completion=example.completion)


def load_dataset(
    path: Path,
    template: Template,
    encode: Encode,
    *,
    eos_id: int,
    window: int,
    reading: Reading | None = None,
    chat: ChatFormat | None = None,
    classes: Sequence[str] = (),
    pairs: bool = False,
    tally: Tally | None = None,
) -> Dataset:
    """Rows of fewer than `window` tokens. `chat` and `classes` are the bundle's, and whether it learns from pairs;
    `tally` is told what was read.

    Raises DataError when none is left, ConfigError when the bundle cannot do what the template asks, and what
    `read_records` raises.
    """
    how, tally = reading or Reading(), tally if tally is not None else Tally()
    maker = RowMaker(template, encode, eos_id=eos_id, window=window, chat=chat, classes=classes, pairs=pairs)
    rows: list[Row] = []
    for record in read_records(path, how, tally):
        try:
            rows += maker.rows(record)
        except DataError as error:
            tally.refused(placed(error, path, record.line), how)
    counts = maker.counts(tally)
    if not rows:
        raise DataError(
            f"{path}: no usable example",
            field="examples",
            value=msgspec.to_builtins(counts),
            hint=f"An example needs an answer of fewer than {window} tokens, and some room for what is answered",
        )
    if pairs and different(rows) < PAIRS_MIN:
        raise DataError(
            f"{path}: a pair by itself has nothing to be told from",
            field="examples",
            value=len(rows),
            hint=f"At least {PAIRS_MIN} pairs of different texts are needed",
        )
    return Dataset(tuple(rows), counts)


def placed(error: DataError, path: Path, line: int) -> DataError:
    """The same error, with where in the file it is."""
    return DataError(
        f"{path}, line {line}: {error.what}", field=error.field, value=error.value, hint=error.hint
    )


class RowMaker:
    """Makes the rows of one record after the other, and counts what becomes of them in `seen`."""

    def __init__(
        self,
        template: Template,
        encode: Encode,
        *,
        eos_id: int,
        window: int,
        chat: ChatFormat | None = None,
        classes: Sequence[str] = (),
        pairs: bool = False,
    ) -> None:
        self._template, self._encode, self._eos = check_template(template), encode, eos_id
        self._most = window - 1  # as the reference figures have it
        self._before: list[int] = list(getattr(encode, "before", ()))
        self._after: list[int] = list(getattr(encode, "after", ()))
        self._classes, self._of_pairs = list(classes), pairs
        self._chat = _chat_rows(chat, encode, eos_id, self._most) if template.kind == "chat" else None
        self.seen = Seen()

    def counts(self, tally: Tally) -> Counts:
        """What became of everything so far."""
        seen = self.seen
        return Counts(
            tally.records,
            seen.examples,
            seen.kept,
            seen.too_long,
            seen.empty,
            seen.unused,
            seen.shortened,
            tally.bad,
            seen.trimmed,
        )

    def rows(self, record: Record) -> list[Row]:
        """The usable rows of `record`. Raises DataError for a record that is of no use to this bundle."""
        if isinstance(record, Recording):
            raise DataError("this bundle reads texts, and hears nothing", field="audio")
        if isinstance(record, Pair) or self._of_pairs:
            return self._pair(record)
        if isinstance(record, Labelled):
            return list(self._labelled(record))
        if self._classes:
            raise DataError(
                "this bundle tells classes of texts",
                field="label",
                hint='It learns from {"text": …, "label": …}',
            )
        if isinstance(record, Passage):
            return list(self._windows(record))
        if self._chat is not None:
            return list(self._chat.rows(record, self.seen))
        return list(self._pairs(record))

    def _pairs(self, record: Conversation) -> Iterator[Row]:
        """A row for each learnt answer with the question before it, if it has text and fits."""
        self.seen.unused += record.turns_unused
        for example in record.examples:
            self.seen.examples += 1
            if not example.completion.strip():
                self.seen.empty += 1
                continue
            prompt, completion = render(self._template, example)
            answer = [*self._encode(completion), self._eos]
            room = self._most - len(answer) - len(self._before)
            asked = self._encode(prompt)
            short = asked if len(asked) <= room else self._shortened(example.prompt, room)
            if short is None:
                self.seen.too_long += 1
                continue
            self.seen.kept += 1
            ids = [*self._before, *short, *answer]
            yield Row(np.array(ids, np.int32), len(ids) - len(answer), record.conversation)

    def _shortened(self, prompt: str, room: int) -> list[int] | None:
        """The ids of the template with as much of the prompt's end as fits; None when not one letter does."""
        prompt = prompt[-self._template.prompt_chars_max :]

        def ids(letters: int) -> list[int]:
            return self._encode(self._template.prompt.format(prompt=prompt[len(prompt) - letters :]))

        letters = longest(len(prompt), lambda letters: len(ids(letters)) <= room)
        self.seen.shortened += letters > 0
        return ids(letters) if letters else None

    def _windows(self, passage: Passage) -> Iterator[Row]:
        """Windows that overlap by one token, so that every token but the first is learnt once."""
        if not passage.text.strip():
            self.seen.examples, self.seen.empty = self.seen.examples + 1, self.seen.empty + 1
            return
        ids = [*self._before, *self._encode(passage.text), *([self._eos] if passage.ends else ())]
        for start in range(0, max(len(ids) - 1, 1), self._most - 1):
            self.seen.examples, self.seen.kept = self.seen.examples + 1, self.seen.kept + 1
            yield Row(np.array(ids[start : start + self._most], np.int32), 1, passage.conversation)

    def _labelled(self, record: Labelled) -> Iterator[Row]:
        """A text with its class; what is too long loses its end."""
        number = self._class_of(record.label)
        self.seen.examples += 1
        if not record.text.strip():
            self.seen.empty += 1
            return
        framed, cut = self._framed(record.text)
        self.seen.shortened += cut
        self.seen.kept += 1
        yield Row(framed, len(framed), record.conversation, label=number)

    def _pair(self, record: Record) -> list[Row]:
        """Two texts that belong together; what is too long loses its end."""
        if not isinstance(record, Pair):
            raise DataError("this bundle learns from pairs of texts", field="anchor", hint=PAIR_HINT)
        if not self._of_pairs:
            raise DataError(
                "a pair of texts, for a bundle that makes no vectors of them",
                field="anchor",
                hint="To learn answers: --columns prompt=A,completion=B. For vectors: fedge quantize --task embed",
            )
        self.seen.examples += 1
        if not (record.anchor.strip() and record.positive.strip()):
            self.seen.empty += 1
            return []
        texts = (record.anchor, record.positive, record.negative)
        framed = [self._framed(text) for text in texts if text.strip()]
        self.seen.shortened += any(cut for _, cut in framed)
        self.seen.kept += 1
        (anchor, positive), others = [ids for ids, _ in framed[:2]], [ids for ids, _ in framed[2:]]
        return [pair_row(anchor, positive, record.conversation, negative=others[0] if others else None)]

    def _framed(self, text: str) -> tuple[NDArray[np.int32], bool]:
        """A text as the model is used to see it, and whether it lost its end."""
        ids, room = self._encode(text), self._most - len(self._before) - len(self._after)
        return np.array([*self._before, *ids[: max(room, 0)], *self._after], np.int32), len(ids) > room

    def _class_of(self, label: str | int) -> int:
        if not self._classes:
            raise DataError(
                "a text with a label, for a bundle that tells no classes",
                field="label",
                hint='Leave the label out, or rename it: {"text": …} is learnt as it stands',
            )
        return class_of(label, self._classes)


def class_of(label: str | int, classes: Sequence[str]) -> int:
    """The number of a class by its name or number. Raises DataError when there is none."""
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    if label in classes:
        return classes.index(str(label))
    raise DataError(
        "no such class in this bundle",
        field="label",
        value=label,
        hint=f"Its classes: {', '.join(classes[:_CLASSES_SHOWN])}"
        + (f" and {len(classes) - _CLASSES_SHOWN} more" if len(classes) > _CLASSES_SHOWN else ""),
    )


def _chat_rows(chat: ChatFormat | None, encode: Encode, eos_id: int, most: int) -> ChatRows:
    reason = "the model has no chat template" if chat is None else chat.cannot.get("conversation", "")
    if chat is None or reason:
        raise ConfigError(
            f"conversations cannot be written for this bundle: {reason}",
            field="template.kind",
            value="chat",
            hint="Use the template kind `text`, with a prompt and a completion",
        )
    if not isinstance(encode, SpanEncoder):
        raise ConfigError("this tokenizer does not say where its tokens are", field="encode")
    return ChatRows(chat, encode, eos_id=eos_id, most=most)
