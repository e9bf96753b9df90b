"""`fedge quantize`: a model's name in, a signed bundle folder out. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fedge.errors import ConfigError, NoInputError, UsageError
from fedge.release import TASKS
from quantize.lora_flags import add_lora_flags, lora_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedge.lora import LoraConfig
    from fedge.release import Manifest
    from quantize.choice import Choice

_PHASES: Final = {
    "read": "reading the model",
    "fit": "fitting weights",
    "quantise": "quantising weights",
    "export": "tracing the graphs",
    "gates": "checking against torch",
    "sign": "signing",
}
_TERMINATED_CODE: Final = 143  # 128 + SIGTERM, as shells have it
_EPILOG: Final = """\
examples:
  fedge quantize smollm2-135m --dry-run                    size, memory on boards, seconds a step; nothing is written
  fedge quantize smollm2-135m --out bundle
  fedge quantize ./my-llama --out bundle --lora-rank 16 --lora-targets all-linear --rslora
  fedge quantize owner/name --out bundle --format int8g --key publisher.pem
  fedge quantize ./minilm --out bundle --classes-from intents.txt     a classifier of a bare encoder
  fedge quantize ./minilm --out bundle --task embed                   sentence vectors, trained on pairs
  fedge quantize ./whisper --out bundle --classes yes,no --seconds 1  a classifier of sound

Weights are read as safetensors or GGUF; code that comes with a model is never run.
"""
# What a gate's figure means, for the report; one that is not here is printed by its name.
_GATES: Final = {
    "cut_gradient_error": "gradients of a small copy against torch, relative",
    "gradient_error": "gradients against torch, relative",
    "loss_error": "loss against torch, nats a token",
    "source_loss": "loss of the source on text of its own, nats a token",
    "quantised_loss": "the same with the quantised weights",
    "kl": "KL(source || quantised), nats a token",
    "decode_error": "decoding against training, nats a token",
    "decode_change": "what 8-bit activations in the head cost, nats a token",
    "head_error": "a classifier's head in two graphs against the head in one, relative",
    "logits_error": "logits against torch, relative",
    "logits_change": "logits of the source against the quantised weights, relative",
    "vector_error": "sentence vectors against torch, relative",
    "vector_change": "sentence vectors of the source against the quantised weights, relative",
    "vector_cosine": "the same, as the smallest cosine",
    "aux_error": "masks and positions against torch",
    "position_error": "hidden states at the worst position against torch, relative",
    "cache_error": "decoding with a cache against without, nats a token",
    "rounded_loss_error": "what rounding activations does to the loss, nats a token",
    "rounded_gradient_error": "what it does to the whole gradient, relative",
    "rounded_gradient_cosine": "the whole gradient's direction with torch's",
}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `quantize` to the `fedge` command."""
    parser = subparsers.add_parser(
        "quantize",
        help="turn a model into a signed device bundle",
        description="Turn a model into a signed device bundle, checked against torch before it is signed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="registered name, .gguf file, model folder, or hub id owner/name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder; must not exist")
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="Ed25519 key, PEM (default: your own, made when missing)"
    )
    parser.add_argument("--name", default="", help="the model's name in the manifest (default: the source's)")
    parser.add_argument(
        "--format",
        metavar="NAME",
        default="auto",
        help="of the weights; auto keeps the source's own grid when it can, else takes what costs least, and says why "
        "(default: auto)",
    )
    parser.add_argument(
        "--memory",
        type=int,
        metavar="MB",
        help="of the smallest board that shall train it, for --format auto",
    )
    names = parser.add_mutually_exclusive_group()
    names.add_argument(
        "--classes",
        metavar="A,B,C",
        help="what a classifier shall tell apart; a bare encoder gets a fresh head for it",
    )
    names.add_argument(
        "--classes-from", type=Path, metavar="FILE", help="the same from a file, one name a line"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="",
        help="what the bundle is for (default: what the model's head is for, embed where the folder is one of "
        "sentence-transformers)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=0,
        metavar="S",
        help="how long a model of sound shall listen at once: 1 for words (default: all that it can, 30 for Whisper)",
    )
    add_lora_flags(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would come of it: sizes, memory and time on boards, from the model's header alone",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and print what was made; or print what would be."""
    if arguments.memory is not None and arguments.memory < 1:
        raise UsageError("memory must be positive", field="memory", value=arguments.memory)
    lora, classes = lora_of(arguments), classes_of(arguments.classes, arguments.classes_from)
    if arguments.dry_run:
        return _dry_run(arguments, lora, classes)
    if arguments.out is None:
        raise UsageError("--out DIR is missing", hint="Or --dry-run, to see what would come of it")
    if arguments.out.exists():  # before a key is made
        raise UsageError(
            "the bundle folder exists already",
            field="out",
            value=str(arguments.out),
            hint="Choose another one",
        )
    key = read_key(arguments.key) if arguments.key else own_key()
    taken: list[Choice] = []
    with _terminable(), _progress(arguments.quiet) as tell:
        from quantize.bundle import quantize

        manifest = quantize(
            arguments.model,
            arguments.out,
            key,
            lora=lora,
            name=arguments.name,
            weights_format=arguments.format,
            memory_bytes=arguments.memory and arguments.memory * 1_000_000,
            progress=tell,
            chosen=taken.append,
            classes=classes,
            seconds=arguments.seconds,
            task=arguments.task,
        )
    summary = _summary(manifest, arguments.out, taken[0])
    print(json.dumps(summary) if arguments.json else _text(summary))
    return 0


def _dry_run(arguments: argparse.Namespace, lora: LoraConfig, classes: tuple[str, ...]) -> int:
    import dataclasses

    from quantize.dry_run import forecast

    more = arguments.task, arguments.seconds
    found = dataclasses.asdict(forecast(arguments.model, lora, arguments.format, classes, *more))
    if arguments.json:
        print(json.dumps(found))
        return 0
    boards = found.pop("boards")
    adapter = found.pop("adapter")
    print("\n".join(f"{name:<16} {_cell(value)}" for name, value in found.items()))
    print(
        f"adapter          {adapter['numbers']:,} numbers, {adapter['bytes'] / 1e6:.2f} MB, rank {adapter['rank']}, "
        f"{adapter['matrices']} matrices: {', '.join(adapter['modules'])}"
    )
    for board in boards:
        if board["fits"]:
            print(
                f"  {board['board']:<18} {board['needed_mb']:>6,} of {board['free_mb']:>6,} MB, {board['how']}: "
                f"about {board['seconds_per_step']:,} s a step"
            )
        else:
            print(
                f"  {board['board']:<18} {'':>6} of {board['free_mb']:>6,} MB: does not fit. {board['how']}"
            )
    print("nothing was written; the times are derived and right within a factor of two")
    return 0


def classes_of(names: str | None, file: Path | None) -> tuple[str, ...]:
    """Names of classes from `A,B,C`, or from the lines of a file that are not empty. Raises NoInputError."""
    if file is None:
        return tuple(name.strip() for name in names.split(",")) if names else ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NoInputError(
            "the names of the classes cannot be read", field="classes-from", value=str(file), hint=str(error)
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def read_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file (PKCS 8, no password). Raises NoInputError or ConfigError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not path.is_file():
        raise NoInputError("no such key file", field="key", value=str(path))
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "the key file cannot be read", field="key", value=str(path), hint=str(error)
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            "the key is of another kind",
            field="key",
            value=type(key).__name__,
            hint="Make one with `openssl genpkey -algorithm ed25519 -out FILE`",
        )
    return key


def own_key() -> Ed25519PrivateKey:
    """This user's publisher key in `$XDG_CONFIG_HOME/fedge/publisher.pem`, made on first use with mode 0600."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from fedge.io import durable

    given = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".config"
    path = base / "fedge" / "publisher.pem"
    if not path.exists():
        durable.make_folder(path.parent)
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        durable.write_bytes(path, pem, secret=True)
        print(
            f"fedge: made a publisher key: {path}. Keep a copy: bundles are believed by it", file=sys.stderr
        )
    return read_key(path)


def _summary(manifest: Manifest, out: Path, choice: Choice) -> dict[str, Any]:
    from fedge.release import bundle_digest

    return {
        "bundle": str(out),
        "manifest_sha256": bundle_digest(manifest),
        "model": manifest.model,
        "architecture": manifest.architecture,
        "licence": manifest.licence,
        "weights_format": manifest.weights_format,
        "format_reason": choice.reason,
        "exact": choice.exact,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "task": manifest.task,
        **({"hears_seconds": manifest.hears.seconds} if manifest.hears else {}),
        **(
            {"pooling": manifest.embeds.pooling, "normalised": manifest.embeds.normalised}
            if manifest.embeds
            else {}
        ),
        "adapter_numbers": manifest.layout.numbers,
        **_head_of(manifest),
        "generates": "infer.onnx" in manifest.files,
        "publisher": manifest.publisher,
        "runtime_min": manifest.runtime_min,
        "gates": manifest.gates,
    }


def _head_of(manifest: Manifest) -> dict[str, Any]:
    """What a classifier's head adds to the adapter: it can be larger than all the rest of it."""
    if not manifest.dense:
        return {}
    numbers = sum(math.prod(shape) for shape in manifest.dense.values())
    return {
        "classes": len(manifest.classes),
        "head_numbers": numbers,
        "head_share": f"{numbers / manifest.layout.numbers:.0%} of the adapter, {4 * numbers:,} bytes as float32",
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{name:<16} {_cell(value)}" for name, value in summary.items() if name != "gates"]
    gates = [
        f"  {name:<23} {value:<10.4g} {_GATES.get(name, '')}" for name, value in summary["gates"].items()
    ]
    return "\n".join([*lines, "gates, all passed:", *(gate.rstrip() for gate in gates)])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar per phase on standard error, when somebody is looking at it."""
    if quiet:
        yield lambda phase, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def tell(phase: str, fraction: float) -> None:
            if phase not in known:
                known[phase] = bars.add_task(_PHASES.get(phase, phase), total=1.0)
            bars.update(known[phase], completed=fraction)

        yield tell


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that the unfinished folder is removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(_TERMINATED_CODE)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
