"""The owner's private data, from a file as people keep it to batches of token rows.

`choices` (what the owner says about a file) -> `reading` (file -> records in the normal form of `record`) -> `rows`
(records -> tokens, and which are learnt) -> `batching`. Names are loaded when they are asked for: the idle agent counts
the records of its file and must not hold numpy for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_agent.dataset.audio_rows import AudioRow, load_recordings
    from edge_agent.dataset.batching import (
        IGNORE,
        Batch,
        batches,
        evaluation_batches,
        make_batch,
    )
    from edge_agent.dataset.choices import Reading
    from edge_agent.dataset.encoding import (
        Encode,
        TextEncoder,
        load_encoder,
    )
    from edge_agent.dataset.reading import Tally, read_records
    from edge_agent.dataset.record import (
        Conversation,
        Labelled,
        Pair,
        Passage,
        Record,
        Recording,
        TextExample,
        Turn,
        normal_form,
    )
    from edge_agent.dataset.row import Row
    from edge_agent.dataset.rows import (
        Dataset,
        check_template,
        load_dataset,
        render,
    )

__all__ = [
    "IGNORE",
    "AudioRow",
    "Batch",
    "Conversation",
    "Dataset",
    "Encode",
    "Labelled",
    "Pair",
    "Passage",
    "Reading",
    "Record",
    "Recording",
    "Row",
    "Tally",
    "TextEncoder",
    "TextExample",
    "Turn",
    "batches",
    "check_template",
    "evaluation_batches",
    "load_dataset",
    "load_encoder",
    "load_recordings",
    "make_batch",
    "normal_form",
    "read_records",
    "render",
]
_HOME: Final = {
    "audio_rows": ("AudioRow", "load_recordings"),
    "batching": ("IGNORE", "Batch", "batches", "evaluation_batches", "make_batch"),
    "choices": ("Reading",),
    "encoding": ("Encode", "TextEncoder", "load_encoder"),
    "reading": ("Tally", "read_records"),
    "record": (
        "Conversation",
        "Labelled",
        "Pair",
        "Passage",
        "Record",
        "Recording",
        "TextExample",
        "Turn",
        "normal_form",
    ),
    "row": ("Row",),
    "rows": ("Dataset", "check_template", "load_dataset", "render"),
}
_MODULE_OF: Final = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
