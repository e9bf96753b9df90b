"""`fedge agent embed`: the vectors that the model on this device makes of texts, with an adapter or without."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def add_embed(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the word `embed`."""
    embed = words.add_parser(
        "embed",
        help="vectors of texts, with the model of a bundle made by `fedge quantize --task embed`",
        description='Prints {"text": …, "vector": […]} for each text, one a line; or writes all vectors as one float32 '
        "array in numpy's format. A text of more tokens than the model takes loses its end.",
    )
    embed.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `fedge quantize`")
    embed.add_argument("texts", nargs="*", metavar="TEXT", help="- reads lines of standard input")
    embed.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="a text a line, after those named"
    )
    embed.add_argument(
        "--adapter",
        type=Path,
        metavar="ADAPTER",
        help="a file of `train-once`, `personalise` or `adapter`, or a PEFT folder",
    )
    embed.add_argument("--out", type=Path, metavar="FILE.npy", help="write an array [texts, numbers] instead")
    embed.add_argument("--threads", type=int, default=0, metavar="N", help="(default: all it may use)")
    embed.set_defaults(run=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    import io

    import msgspec
    import numpy as np

    from edge_agent.alone import OwnAdapter
    from edge_agent.bundle import open_bundle
    from edge_agent.embedder import Embedder
    from edge_agent.resources import threads_allowed
    from fedge.errors import UsageError
    from fedge.io import durable
    from fedge.messages import Training
    from fedge.release import WEIGHTS

    texts = list(_texts(arguments))
    if not texts:
        raise UsageError("no text is given", hint="fedge agent embed BUNDLE 'a text' 'another'")
    bundle = open_bundle(arguments.bundle)
    tensors = None
    if arguments.adapter is not None:
        training = Training(rule="fedit")  # a file of A and B, as the training graphs take them
        own = OwnAdapter.of(bundle.manifest, training, arguments.adapter, bundle.folder / WEIGHTS)
        tensors = own.rule.tensors(own.state)
    embedder = Embedder(bundle, threads_allowed(arguments.threads), tensors)
    if arguments.out is None:
        for text in texts:
            print(msgspec.json.encode({"text": text, "vector": embedder(text).tolist()}).decode(), flush=True)
    else:
        array = io.BytesIO()
        np.save(array, np.stack([embedder(text) for text in texts]))
        durable.write_bytes(arguments.out, array.getvalue())
    if embedder.cut:
        print(f"{embedder.cut} of {len(texts)} texts are too long and lost their end", file=sys.stderr)


def _texts(arguments: argparse.Namespace) -> Iterator[str]:
    """All of them. Raises NoInputError for a file that cannot be read."""
    from fedge.errors import NoInputError

    for text in arguments.texts:
        yield from _lines(sys.stdin.read()) if text == "-" else [text]
    if arguments.file is not None:
        try:
            yield from _lines(arguments.file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise NoInputError(
                "the texts cannot be read", field="from", value=str(arguments.file), hint=str(error)
            ) from error


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
