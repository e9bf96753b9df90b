"""Private data as token rows: a template makes text of an example, the bundle's tokenizer makes numbers of it.

Only the completion is learnt. It ends with the end-of-text token, which *is* a label, even where the padding token
has the same number: labels and the attention mask decide, never the value of an id. Rows that do not fit are left
out and counted, by reason; a data set without a usable row is refused, because a mean over nothing is not zero.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.jobs import Counts
from edge_agent.records import TextExample, read_records
from fedge.errors import ConfigError, DataError, IntegrityError
from fedge.messages import Template

IGNORE: Final = -100  # label of a position that is not learnt, as torch's cross-entropy has it
Encode = Callable[[str], list[int]]
Ints = NDArray[np.int64]
POOL_BATCHES: Final = 16  # 198 padded tokens a batch become 150, of which 146 are text; 32 would save 2 more


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens; those from `prompt_tokens` on are learnt."""

    ids: NDArray[np.int32]
    prompt_tokens: int
    conversation: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """The usable rows of a data file, in its order, and the count of everything else."""

    rows: tuple[Row, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows padded on the right to S. All arrays are int64 [B, S]; `labels` are already shifted by one."""

    ids: Ints
    mask: Ints  # 1 = a real token
    labels: Ints  # the next token, or IGNORE


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


def load_encoder(path: Path) -> Encode:
    """Text -> ids by a `tokenizer.json`, without the special tokens that it would put around a text.

    The only user of the package `tokenizers`, so that another exact implementation may take its place.
    """
    from tokenizers import Tokenizer  # 15 to 45 MB once it has parsed a file: not before it is needed

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises the bare class
        raise IntegrityError(f"tokenizer cannot be read: {error}", field="path", value=str(path)) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def load_dataset(path: Path, template: Template, encode: Encode, *, eos_id: int, window: int) -> Dataset:
    """Rows of fewer than `window` tokens. Raises DataError when none is left, and what `read_records` raises."""
    check_template(template)
    rows: list[Row] = []
    records = examples = empty = unused = 0
    for record in read_records(path):
        records += 1
        unused += record.turns_unused
        for example in record.examples:
            examples += 1
            if not example.completion.strip():
                empty += 1
                continue
            prompt, completion = render(template, example)
            prompt_ids = encode(prompt)
            ids = [*prompt_ids, *encode(completion), eos_id]
            if len(ids) < window:
                rows.append(Row(np.array(ids, np.int32), len(prompt_ids), record.conversation))
    counts = Counts(records, examples, len(rows), examples - empty - len(rows), empty, unused)
    if not rows:
        raise DataError(
            f"{path}: no usable example",
            field="examples",
            value=msgspec.to_builtins(counts),
            hint=f"An example needs a completion, and fewer than {window} tokens with its prompt",
        )
    return Dataset(tuple(rows), counts)


def make_batch(rows: Sequence[Row], pad_id: int) -> Batch:
    """The rows, padded on the right to the longest of them. A row's first token is never a label."""
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        n, first = len(row.ids), max(row.prompt_tokens, 1)
        ids[i, :n] = row.ids
        mask[i, :n] = 1
        labels[i, first - 1 : n - 1] = row.ids[first:]
    return Batch(ids, mask, labels)


def batches(rows: Sequence[Row], *, size: int, seed: int, pad_id: int, start: int = 0) -> Iterator[Batch]:
    """Batches for ever: the rows in a new order each time through, the same for the same seed.

    Rows of like length travel together, because padding costs as much as text: the rows of POOL_BATCHES batches are
    drawn at random, cut by length, and the batches shuffled again. On chat lines that is a quarter of the work.
    `start` = batches already used, so that a later round goes on where an earlier one ended.
    """
    draw = random.Random(seed)  # noqa: S311 - an order of rows, not a secret
    order = _endless_order(len(rows), draw)
    together = size * max(1, min(POOL_BATCHES, len(rows) // size))
    while True:
        pool = sorted(islice(order, together), key=lambda i: len(rows[i].ids))
        cut = [pool[at : at + size] for at in range(0, len(pool), size)]
        draw.shuffle(cut)
        for chosen in cut[start:]:
            yield make_batch([rows[i] for i in chosen], pad_id)
        start = max(0, start - len(cut))


def _endless_order(n: int, draw: random.Random) -> Iterator[int]:
    while True:
        order = list(range(n))
        draw.shuffle(order)
        yield from order


def evaluation_batches(rows: Sequence[Row], *, size: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, rows of like length together; with each batch the indices of its rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        yield chosen, make_batch([rows[i] for i in chosen], pad_id)
