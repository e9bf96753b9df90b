"""`fedge quantize`: a model's name in, a signed bundle folder out. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from fedge.errors import ConfigError, NoInputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedge.release import Manifest

_PHASES: Final = {
    "read": "reading the model",
    "quantise": "quantising weights",
    "export": "tracing the graphs",
    "gates": "checking against torch",
    "sign": "signing",
}
_TERMINATED_CODE: Final = 143  # 128 + SIGTERM, as shells have it
_EPILOG: Final = """\
examples:
  fedge quantize smollm2-135m --out bundle
  fedge quantize ./my-llama --out bundle --lora-rank 16 --lora-targets q_proj,k_proj,v_proj,o_proj
  fedge quantize owner/name --out bundle --format int8g --key publisher.pem
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `quantize` to the `fedge` command."""
    parser = subparsers.add_parser(
        "quantize",
        help="turn a model into a signed device bundle",
        description="Turn a Llama-family causal LM into a signed device bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="registered name, .gguf file, model folder, or hub id owner/name")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the bundle's folder; must not exist"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="Ed25519 key, PEM (default: your own, made when missing)"
    )
    parser.add_argument("--name", default="", help="the model's name in the manifest (default: the source's)")
    parser.add_argument(
        "--format", metavar="NAME", help="int4d or int8g (default: int4d for Q4_0 and Q4_1, else int8g)"
    )
    parser.add_argument(
        "--lora-rank", type=int, default=8, metavar="R", help="rank of the adapter (default: 8)"
    )
    parser.add_argument(
        "--lora-alpha", type=float, default=16.0, metavar="A", help="scale is A/R (default: 16)"
    )
    parser.add_argument(
        "--lora-targets",
        default="q_proj,v_proj",
        metavar="NAMES",
        help="modules that get an adapter, with commas (default: q_proj,v_proj)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and print what was made."""
    from fedge.lora import LoraConfig
    from fedge.release import bundle_digest

    targets = tuple(name.strip() for name in arguments.lora_targets.split(",") if name.strip())
    lora = LoraConfig(r=arguments.lora_rank, alpha=arguments.lora_alpha, targets=targets)
    key = read_key(arguments.key) if arguments.key else own_key()
    with _terminable(), _progress(arguments.quiet) as tell:
        from quantize.bundle import quantize

        manifest = quantize(
            arguments.model,
            arguments.out,
            key,
            lora=lora,
            name=arguments.name,
            weights_format=arguments.format,
            progress=tell,
        )
    summary = _summary(manifest, arguments.out, bundle_digest(manifest))
    print(json.dumps(summary) if arguments.json else _text(summary))
    return 0


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


def _summary(manifest: Manifest, out: Path, digest: str) -> dict[str, Any]:
    return {
        "bundle": str(out),
        "manifest_sha256": digest,
        "model": manifest.model,
        "architecture": manifest.architecture,
        "weights_format": manifest.weights_format,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "adapter_numbers": manifest.layers
        * sum(manifest.lora.r * rows for rows, _ in manifest.lora_shapes.values()),
        "publisher": manifest.publisher,
        "runtime_min": manifest.runtime_min,
        "gates": manifest.gates,
    }


def _text(summary: dict[str, Any]) -> str:
    lines = [f"{name:<16} {value}" for name, value in summary.items() if name != "gates"]
    return "\n".join(lines + [f"  {gate:<20} {value:g}" for gate, value in summary["gates"].items()])


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
