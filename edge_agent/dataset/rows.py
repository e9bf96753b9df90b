"""Records to token rows: what a model reads, and which of it is learnt.

Only the owner's own words are learnt: the completion of a prompt, the answers of a conversation, a passage as a whole.
An answer ends with the token that ends answers, which *is* a label, even where the padding token has the same number:
labels and the attention mask decide, never the value of an id.

Where an example is longer than the window, its answer is kept and its prompt is shortened from the left. An answer that
does not fit even so is left out. Both are counted; a file without a usable row is refused, because a mean over nothing
is not zero.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.dataset.choices import Reading
from edge_agent.dataset.encoding import Encode
from edge_agent.dataset.reading import Tally, read_records
from edge_agent.dataset.record import Conversation, Passage, Record, TextExample
from edge_agent.jobs import Counts
from fedge.errors import ConfigError, DataError
from fedge.messages import Template


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; those from `prompt_tokens` on are learnt, but for the spans `unlearnt` (from, to).

    `label` is the class of a labelled text, -1 = none.
    """

    ids: NDArray[np.int32]
    prompt_tokens: int
    conversation: str
    unlearnt: tuple[tuple[int, int], ...] = ()
    label: int = -1


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
) -> Dataset:
    """Rows of fewer than `window` tokens. Raises DataError when none is left, and what `read_records` raises."""
    check_template(template)
    tally = Tally()
    maker = RowMaker(template, encode, eos_id=eos_id, window=window)
    rows = [row for record in read_records(path, reading, tally) for row in maker.rows(record)]
    counts = maker.counts(tally)
    if not rows:
        raise DataError(
            f"{path}: no usable example",
            field="examples",
            value=msgspec.to_builtins(counts),
            hint=f"An example needs an answer of fewer than {window} tokens, and some room for what is answered",
        )
    return Dataset(tuple(rows), counts)


class RowMaker:
    """Makes the rows of one record after the other, and counts what becomes of them."""

    def __init__(self, template: Template, encode: Encode, *, eos_id: int, window: int) -> None:
        self._template, self._encode, self._eos = template, encode, eos_id
        self._most = window - 1  # as the reference figures have it
        self._before: list[int] = list(getattr(encode, "before", ()))
        self.examples = self.kept = self.too_long = self.empty = self.shortened = self.unused = 0

    def counts(self, tally: Tally) -> Counts:
        """What became of everything so far."""
        return Counts(tally.records, self.examples, self.kept, self.too_long, self.empty, self.unused)

    def rows(self, record: Record) -> Iterator[Row]:
        """The usable rows of `record`."""
        if isinstance(record, Conversation):
            self.unused += record.turns_unused
            for example in record.examples:
                yield from self._pair(example, record.conversation)
        elif isinstance(record, Passage):
            yield from self._windows(record)

    def _pair(self, example: TextExample, conversation: str) -> Iterator[Row]:
        """The row of one prompt and its completion, if it has text and fits."""
        self.examples += 1
        if not example.completion.strip():
            self.empty += 1
            return
        prompt, completion = render(self._template, example)
        answer = [*self._encode(completion), self._eos]
        room = self._most - len(answer) - len(self._before)
        asked = self._encode(prompt)
        short = asked if len(asked) <= room else self._shortened(example.prompt, room)
        if short is None:
            self.too_long += 1
            return
        self.kept += 1
        ids = [*self._before, *short, *answer]
        yield Row(np.array(ids, np.int32), len(ids) - len(answer), conversation)

    def _shortened(self, prompt: str, room: int) -> list[int] | None:
        """The ids of the template with as much of the prompt's end as fits; None when not one letter does."""

        prompt = prompt[-self._template.prompt_chars_max :]

        def ids(letters: int) -> list[int]:
            return self._encode(self._template.prompt.format(prompt=prompt[len(prompt) - letters :]))

        letters = longest(len(prompt), lambda letters: len(ids(letters)) <= room)
        self.shortened += letters > 0
        return ids(letters) if letters else None

    def _windows(self, passage: Passage) -> Iterator[Row]:
        """Windows that overlap by one token, so that every token but the first is learnt once."""
        ids = [*self._before, *self._encode(passage.text)]
        if passage.ends:
            ids.append(self._eos)
        for start in range(0, max(len(ids) - 1, 1), self._most - 1):
            self.examples += 1
            if len(ids) < 2 or not passage.text.strip():
                self.empty += 1
                continue
            self.kept += 1
            window = np.array(ids[start : start + self._most], np.int32)
            yield Row(window, 1, passage.conversation)


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1 to `most` that fits, 0 when 1 does not; found by halving, so `fits` should not mind order."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
