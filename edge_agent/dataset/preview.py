"""What would be learnt from a data file, shown to its owner before anything is: counts, lengths, and whole examples.

The learnt part of an example stands in [[ ]], or in colour on a terminal. Nothing leaves the device, and control
characters in the owner's words do not reach the terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from edge_agent.dataset.audio_rows import load_recordings
from edge_agent.dataset.choices import Reading
from edge_agent.dataset.pair_rows import PairRow
from edge_agent.dataset.reading import Tally, read_records
from edge_agent.dataset.row import Row
from edge_agent.dataset.rows import Dataset, load_dataset
from edge_agent.jobs import Counts
from fedge.audio import AudioInput
from fedge.chat import ChatFormat
from fedge.messages import Template

EXAMPLES: Final = 3
_BARS: Final = 8
_BAR_CHARS: Final = 40
_LEARNT: Final = "\033[32m{}\033[0m", "[[{}]]"  # on a terminal, and elsewhere
_KINDS: Final = {
    "Conversation": "conversations",
    "Passage": "texts",
    "Labelled": "texts with a label",
    "Recording": "recordings",
    "Pair": "pairs of texts",
}


class Encoder(Protocol):
    """A tokenizer that goes both ways."""

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens shown."""
        ...


class Part(msgspec.Struct, frozen=True):
    """A stretch of an example, and whether it is learnt."""

    text: str
    learnt: bool


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedge agent data` found. `lengths` = tokens of each row; `tokens`, `learnt` = of all rows together."""

    path: str
    form: str
    kinds: dict[str, int]
    counts: Counts
    first_bad: str
    window: int = 0
    lengths: list[int] = []
    tokens: int = 0
    learnt: int = 0
    examples: list[list[Part]] = []
    labels: dict[str, int] = {}
    seconds: float = 0.0  # that are heard of a recording


def look(path: Path, reading: Reading) -> Preview:
    """The file alone, without a model: what it is and how many records it has. Raises as `read_records`."""
    tally = Tally()
    samples = sum(record.samples for record in read_records(path, reading, tally))
    counts = Counts(records=tally.records, examples=samples, bad=tally.bad)
    return _of_file(path, tally, counts)


def preview(
    path: Path,
    template: Template,
    encode: Encoder,
    *,
    eos_id: int,
    window: int,
    reading: Reading,
    chat: ChatFormat | None = None,
    classes: Sequence[str] = (),
    pairs: bool = False,
) -> Preview:
    """The same with a bundle's tokenizer: exactly the rows that training would use. Raises as `load_dataset`."""
    tally = Tally()
    dataset = load_dataset(
        path,
        template,
        encode,
        eos_id=eos_id,
        window=window,
        reading=reading,
        chat=chat,
        classes=classes,
        pairs=pairs,
        tally=tally,
    )
    rows = dataset.rows
    places = sorted({0, len(rows) // 2, len(rows) - 1})[:EXAMPLES]
    return msgspec.structs.replace(
        _of_rows(path, tally, dataset, classes),
        window=window,
        lengths=[row.tokens for row in rows],
        tokens=sum(sum(map(len, row.texts)) if isinstance(row, PairRow) else len(row.ids) for row in rows),
        learnt=sum(end - start for row in rows for start, end in learnt_spans(row)),
        examples=[list(parts(rows[place], encode)) for place in places],
    )


def preview_of_recordings(path: Path, audio: AudioInput, classes: Sequence[str], reading: Reading) -> Preview:
    """The same for a bundle that hears. Raises as `load_recordings`."""
    tally = Tally()
    dataset = load_recordings(path, audio, classes, reading=reading, tally=tally, kept_bytes_max=0)
    found = _of_rows(path, tally, dataset, classes)
    return msgspec.structs.replace(found, window=audio.positions, seconds=audio.seconds)


def _of_rows(path: Path, tally: Tally, dataset: Dataset, classes: Sequence[str]) -> Preview:
    """What is said of every kind of rows."""
    labels = Counter(classes[row.label] for row in dataset.rows if row.label >= 0)
    return msgspec.structs.replace(_of_file(path, tally, dataset.counts), labels=dict(labels))


def _of_file(path: Path, tally: Tally, counts: Counts) -> Preview:
    return Preview(path=str(path), form=tally.form, kinds=tally.forms, counts=counts, first_bad=tally.first)


def learnt_spans(row: Row) -> Iterator[tuple[int, int]]:
    """The tokens (from, to) of a row that are labels."""
    at = max(row.prompt_tokens, 1)  # a row's first token has nothing before it
    for start, end in row.unlearnt:
        if start > at:
            yield at, start
        at = max(at, end)
    if at < len(row.ids):
        yield at, len(row.ids)


def parts(row: Row, encode: Encoder) -> Iterator[Part]:
    """A row as text again, learnt and not; of a pair, what is to be found is marked."""
    if isinstance(row, PairRow):
        anchor, positive, *others = (encode.decode(text.tolist()) for text in row.texts)
        yield Part(f"{anchor}\n", learnt=False)
        yield Part(positive, learnt=True)
        yield from (Part(f"\n{text}", learnt=False) for text in others)
        return
    ids, at = [int(i) for i in row.ids], 0
    for start, end in learnt_spans(row):
        for low, high, learnt in ((at, start, False), (start, end, True)):
            if low < high:
                yield Part(_between(ids, low, high, encode), learnt)
        at = end
    if at < len(ids):
        yield Part(_between(ids, at, len(ids), encode), False)


def _between(ids: list[int], low: int, high: int, encode: Encoder) -> str:
    """The text of a stretch as it is inside the whole: decoded alone, some tokenizers drop its first space."""
    before, whole = encode.decode(ids[:low]), encode.decode(ids[:high])
    return whole[len(before) :] if whole.startswith(before) else encode.decode(ids[low:high])


def lines(found: Preview, *, colour: bool) -> Iterator[str]:
    """The preview for people."""
    counts = found.counts
    kinds = ", ".join(f"{number:,} {_KINDS[kind]}" for kind, number in found.kinds.items())
    yield f"{found.path}: {found.form}, {kinds or 'nothing'}"
    if counts.bad:
        yield f"passed over: {counts.bad:,} bad records; the first: {found.first_bad}"
    if found.seconds:
        yield from _heard(found)
        return
    if not found.lengths:
        yield f"about {counts.examples:,} examples; with --bundle DIR it is shown what is learnt of them"
        return
    yield f"examples: {counts.examples:,}, of which {counts.kept:,} are learnt in {len(found.lengths):,} rows"
    for number, what in (
        (counts.shortened, "with a shortened prompt, or text, to fit the window"),
        (counts.too_long, "left out: the answer alone does not fit the window"),
        (counts.empty, "left out: the answer has no text"),
        (counts.turns_unused, "turns that no answer follows"),
        (counts.trimmed, "turns lose white space at an end: the model's chat template does not write it"),
    ):
        if number:
            yield f"  {number:,} {what}"
    share = (
        f", of which {found.learnt:,} are learnt ({found.learnt / found.tokens:.0%})" if found.learnt else ""
    )
    yield f"tokens: {found.tokens:,}{share}"
    yield from _labels(found)
    yield f"tokens in a row (window {found.window:,}):"
    yield from _histogram(found.lengths)
    style = _LEARNT[0 if colour else 1]
    marked = "in colour" if colour else "in [[ ]]"
    for number, example in enumerate(found.examples, 1):
        yield ""
        yield f"example {number} of {len(found.examples)}, what is learnt {marked}:"
        yield "".join(style.format(shown(part.text)) if part.learnt else shown(part.text) for part in example)


def _heard(found: Preview) -> Iterator[str]:
    counts = found.counts
    yield f"recordings: {counts.examples:,}, of which {counts.kept:,} are learnt, {found.seconds:g} s of each"
    if counts.shortened:
        yield f"  {counts.shortened:,} are longer: only their beginning is heard"
    if counts.empty:
        yield f"  {counts.empty:,} left out: there is no sound in them"
    yield from _labels(found)


def _labels(found: Preview) -> Iterator[str]:
    for name, number in sorted(found.labels.items(), key=lambda item: -item[1])[:12]:
        yield f"  label {name}: {number:,}"


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // _BARS))
    counts: dict[int, int] = {}
    for length in lengths:
        counts[(length - low) // width] = counts.get((length - low) // width, 0) + 1
    most = max(counts.values())
    for bar in range((high - low) // width + 1):
        number = counts.get(bar, 0)
        first, last = low + bar * width, min(low + (bar + 1) * width - 1, high)
        yield f"{first:>7,} to {last:<7,} {'#' * -(-number * _BAR_CHARS // most):<{_BAR_CHARS}} {number:,}"


def shown(text: str) -> str:
    """Text that cannot steer a terminal: control characters as their codes."""
    return "".join(c if c.isprintable() or c in "\n\t " else repr(c)[1:-1] for c in text)
