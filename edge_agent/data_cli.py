"""`fedge agent data`: what is in a data file and what would be learnt of it; and the flags that say how to read one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.dataset.choices import FORMS, Reading, pairs_from, skip_from

if TYPE_CHECKING:
    from edge_agent.dataset.preview import Preview

_DESCRIPTION = """\
Shows what is in a data file, without training: which form it has, how many examples, how long they are, what is left
out and why; and three examples as the model will read them, with the part that is learnt marked. FILE may be JSON
Lines or a JSON list (messages, ShareGPT, Alpaca, prompt and completion, text, text and label, pairs: anchor and
positive, query and document, question and answer, sentence1 and sentence2), a table (CSV, TSV),
plain text, Parquet (with the extra `parquet`), or a folder of such files; recordings (WAV) in a folder for each class,
or a list of {"audio": PATH, "label": …}. What it is, is told by its content."""


def add_data(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the word `data`."""
    data = words.add_parser(
        "data", help="look at a data file: what is in it, what is learnt", description=_DESCRIPTION
    )
    data.add_argument("file", type=Path, metavar="FILE")
    data.add_argument(
        "--bundle", type=Path, metavar="DIR", help="from `fedge quantize`: shows tokens and examples"
    )
    data.add_argument("--window", type=int, metavar="TOKENS", help="longest row (default: the fleet's)")
    data.add_argument("--json", action="store_true", help="as one JSON object")
    add_chat(data)
    add_reading(data)
    data.set_defaults(run=_data)


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that chooses the model's own chat template."""
    parser.add_argument(
        "--chat", action="store_true", help="write conversations as the model's own chat template does, whole"
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Reading`."""
    reading = parser.add_argument_group("how to read the data file, where it does not say so itself")
    reading.add_argument(
        "--form", choices=FORMS, default="auto", help="what the file is (default: see its content)"
    )
    reading.add_argument(
        "--columns",
        default="",
        metavar="A=B,…",
        help="of a table, or keys of JSON objects: prompt=NAME,completion=NAME, or text=, label=, "
        "or anchor=, positive=",
    )
    reading.add_argument(
        "--separator", default="", metavar="SIGN", help="between the cells of a table; tab = tab"
    )
    reading.add_argument(
        "--no-header", action="store_true", help="the table's first row is data: columns by number"
    )
    reading.add_argument(
        "--roles", default="", metavar="A=B,…", help="who a role is: Alice=user,Helpdesk=assistant"
    )
    reading.add_argument(
        "--join-runs", action="store_true", help="turns of one speaker in a row are one turn"
    )
    reading.add_argument(
        "--skip-bad",
        default="0",
        metavar="N",
        help="pass over up to N bad records, or N%% of all (default: none)",
    )


def reading_of(arguments: argparse.Namespace) -> Reading:
    """What the flags say. Raises UsageError."""
    separator = "\t" if arguments.separator in ("tab", "\\t") else arguments.separator
    return Reading(
        form=arguments.form,
        separator=separator,
        header=not arguments.no_header,
        columns=pairs_from(arguments.columns, "columns"),
        roles=pairs_from(arguments.roles, "roles"),
        join_runs=arguments.join_runs,
        **skip_from(arguments.skip_bad),
    )


def words_of(reading: Reading) -> list[str]:
    """The flags that say `reading`, for a command line."""
    columns, roles = (
        ",".join(f"{a}={b}" for a, b in pairs.items()) for pairs in (reading.columns, reading.roles)
    )
    words = [] if reading.form == "auto" else ["--form", reading.form]
    words += ["--columns", columns] if columns else []
    words += (
        ["--separator", "tab" if reading.separator == "\t" else reading.separator]
        if reading.separator
        else []
    )
    words += [] if reading.header else ["--no-header"]
    words += ["--roles", roles] if roles else []
    words += ["--join-runs"] if reading.join_runs else []
    if reading.skip_share:
        return [*words, "--skip-bad", f"{100 * reading.skip_share:g}%"]
    return [*words, "--skip-bad", str(reading.skip_lines)] if reading.skip_lines else words


def _data(arguments: argparse.Namespace) -> None:
    import sys

    import msgspec

    from edge_agent.dataset.preview import lines, look

    reading = reading_of(arguments)
    found = look(arguments.file, reading) if arguments.bundle is None else _with_bundle(arguments, reading)
    if arguments.json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(lines(found, colour=sys.stdout.isatty())))


def _with_bundle(arguments: argparse.Namespace, reading: Reading) -> Preview:
    from edge_agent.bundle import open_bundle
    from edge_agent.dataset.encoding import load_encoder
    from edge_agent.dataset.preview import preview, preview_of_recordings
    from fedge.errors import UsageError
    from fedge.messages import Template, Training

    bundle = open_bundle(arguments.bundle)
    manifest = bundle.manifest
    if manifest.hears is not None:
        return preview_of_recordings(arguments.file, manifest.hears, manifest.classes, reading)
    window = arguments.window or min(Training().window_tokens, manifest.positions_max)
    if not 8 <= window <= manifest.positions_max:
        raise UsageError(
            "a window of so many tokens is not for this model",
            field="window",
            value=window,
            hint=f"From 8 to {manifest.positions_max}: it knows no more positions",
        )
    return preview(
        arguments.file,
        Template(kind="chat" if arguments.chat else "text"),
        load_encoder(bundle.tokenizer),
        eos_id=manifest.eos_id,
        window=window,
        reading=reading,
        chat=manifest.chat,
        classes=manifest.classes,
        pairs=manifest.task == "embed",
    )
