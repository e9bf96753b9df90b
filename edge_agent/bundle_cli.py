"""`fedge bundle`: what a bundle is, whether it is what it says, and what a board would do with it.

`show` and `plan` read the manifest alone (its signature is checked); `verify` hashes every file and reads every graph.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from edge_agent.planner import Plan
    from fedge.boards import Board
    from fedge.messages import Training
    from fedge.release import Manifest

_THERE_ALONE: Final = 1 / 3  # of a step, which goes there, there again, and back
_EPILOG: Final = """\
examples:
  fedge bundle show bundle
  fedge bundle verify bundle --publisher 3b6a27bc…          the signer must be this one
  fedge bundle plan bundle --board pi4 --rows 4 --window 128
  fedge bundle plan bundle --board zero2w --head-only       a classifier's head alone

A bundle is what `fedge quantize MODEL --out DIR` makes.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `bundle` and its words."""
    bundle = subparsers.add_parser(
        "bundle",
        help="show, verify and plan for a bundle",
        description="Looks at a device bundle.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = bundle.add_subparsers(dest="bundle_command", metavar="WORD", required=True)
    show = words.add_parser(
        "show",
        help="what it is, who signed it, what its gates measured",
        description="Reads the manifest and checks its signature; `verify` checks the files as well.",
    )
    show.set_defaults(run=_show)
    verify = words.add_parser(
        "verify",
        help="hash every file, read every graph, and name all that is wrong",
        description="Checks signature, sizes and hashes of all files, that the graphs hold only the announced and "
        "allowed operators and read no file but the bundle's own, that every tensor lies in the weight file, and that "
        "the runtime here is new enough. Lists every fault; the exit code is that of the first.",
    )
    verify.add_argument(
        "--publisher",
        metavar="KEY",
        help="the signer must be this: 64 hexadecimal digits, or a file with them",
    )
    verify.add_argument("--sha256", metavar="HEX", help="the manifest must have this hash")
    verify.set_defaults(run=_verify)
    plan = _add_plan(words)
    for parser in (show, verify, plan):
        parser.add_argument("bundle", type=Path, metavar="BUNDLE")
        parser.add_argument("--json", action="store_true", help="as one JSON object")


def _add_plan(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    plan = words.add_parser(
        "plan",
        help="memory and time of a training step on a board",
        description="Predicts, from the manifest alone, what memory an agent on the board would want free before it "
        "trains (the worker's peak and a tenth), how it would train, and about how long a step takes. "
        "Without --board: all boards that are known.",
    )
    plan.add_argument(
        "--board", metavar="NAME", help="zero2w, pi3, pi4, pi5, jetson-nano, orin-nano, gateway"
    )
    plan.add_argument(
        "--memory",
        type=int,
        metavar="MB",
        help="for agent and worker together, as an owner's memory_mb_max, instead of what the board has",
    )
    plan.add_argument("--rows", type=int, help="rows in a step (default: the fleet's)")
    plan.add_argument("--window", type=int, metavar="TOKENS", help="longest row (default: the fleet's)")
    plan.add_argument(
        "--head-only",
        action="store_true",
        help="for a classifier's head alone, as `train-once --head-only` trains it: no way back through the layers",
    )
    plan.set_defaults(run=_plan)
    return plan


# ---------------------------------------------------------------- what the words do
def _show(arguments: argparse.Namespace) -> None:
    _print(_facts(_open(arguments.bundle), arguments.bundle), arguments.json)


def _verify(arguments: argparse.Namespace) -> None:
    import onnxruntime

    from edge_agent.bundle_audit import audit

    publisher = _key(arguments.publisher) if arguments.publisher else None
    sha256 = _hexadecimal("sha256", arguments.sha256) if arguments.sha256 else None
    manifest = _open(arguments.bundle, publisher, sha256)
    faults = audit(arguments.bundle, manifest, str(onnxruntime.__version__))
    found = {
        "bundle": str(arguments.bundle),
        "whole": not faults,
        "files": len(manifest.files),
        "publisher": manifest.publisher,
        "publisher_pinned": publisher is not None,
        "faults": [{"error": type(fault).__name__, "what": str(fault)} for fault in faults],
    }
    if arguments.json:
        print(json.dumps(found))
    elif faults:
        print("\n".join(f"fault: {fault}" for fault in faults))
    else:
        print(f"{arguments.bundle}: whole; {len(manifest.files)} files, signed by {manifest.publisher}")
        if publisher is None:
            print("whose key that is was not asked: give --publisher to pin it")
    if faults:
        raise faults[0]


def _plan(arguments: argparse.Namespace) -> None:
    import msgspec

    from edge_agent.depth import ALL, HEAD_ONLY
    from edge_agent.planner import row_tokens, step_rows
    from fedge.boards import BOARDS, board
    from fedge.errors import UsageError
    from fedge.messages import Training
    from fedge.rules import usual_rows

    manifest = _open(arguments.bundle)
    depth = HEAD_ONLY if arguments.head_only else ALL
    if arguments.head_only and not manifest.dense:
        raise UsageError(
            "this bundle has no head that trains",
            field="head-only",
            value=manifest.task,
            hint="Give the bundle of a classifier",
        )
    rows_wanted = usual_rows(manifest.task) if arguments.rows is None else arguments.rows
    wanted = {"batch_rows": rows_wanted, "window_tokens": arguments.window}
    try:
        training = msgspec.convert({n: v for n, v in wanted.items() if v is not None}, Training)
    except msgspec.ValidationError as error:
        raise UsageError(f"training cannot be done so: {error}") from error
    if manifest.hears is not None:
        training = msgspec.structs.replace(training, window_tokens=row_tokens(manifest, training))
    step = step_rows(manifest, training)
    tokens, parameters = step * training.window_tokens, _parameters(manifest)
    boards = [board(arguments.board)] if arguments.board else list(BOARDS.values())
    rows = [_row(manifest, training, kind, parameters, arguments.memory, depth) for kind in boards]
    if arguments.json:
        print(json.dumps({"tokens_per_step": tokens, "parameters": parameters, "boards": rows}))
        return
    print(f"a step of {step} x {training.window_tokens} tokens, {parameters / 1e6:,.0f}M parameters")
    for row in rows:
        print(
            f"  {row['board']:<18} {row['needed_mb']:>6,} of {row['free_mb']:>6,} MB, {row['how']}: "
            f"about {row['seconds_per_step']:,} s a step"
            if row["fits"]
            else f"  {row['board']:<18} {'':>6} of {row['free_mb']:>6,} MB: does not fit. {row['how']}"
        )


def _row(
    manifest: Manifest,
    training: Training,
    kind: Board,
    parameters: int,
    memory_mb: int | None,
    depth: int = 0,
) -> dict[str, Any]:
    """What an agent's planner makes of a board: the same room, the same plan, the same figure.

    Time of a head alone is that of a step whose rows were never met before.
    """
    from edge_agent.depth import HEAD_ONLY
    from edge_agent.planner import AGENT_BYTES, plan, step_rows, worker_bytes
    from fedge.errors import UnavailableError

    free = max(0, (memory_mb * 10**6 if memory_mb else kind.free_bytes) - AGENT_BYTES)
    seconds = kind.step_seconds(parameters, step_rows(manifest, training) * training.window_tokens)
    seconds *= _THERE_ALONE if depth == HEAD_ONLY else 1.0
    row = {"board": kind.label, "free_mb": round(free / 1e6), "seconds_per_step": round(seconds, 1)}
    try:
        chosen = plan(manifest, training, free, depth=depth)
    except UnavailableError as refusal:
        return {
            **row,
            "fits": False,
            "needed_mb": None,
            "how": f"{refusal.what}. {refusal.hint}",
            "plan": None,
        }
    needed = worker_bytes(manifest, training, chosen, depth=depth)
    fields = {name: getattr(chosen, name) for name in chosen.__struct_fields__}
    return {
        **row,
        "fits": True,
        "needed_mb": round(needed / 1e6),
        "how": _how(chosen, manifest),
        "plan": fields,
    }


def _how(chosen: Plan, manifest: Manifest) -> str:
    """A plan in words."""
    words = []
    if chosen.keep:
        words.append(f"keeping the products of {chosen.keep} of {manifest.layers} layers")
    if chosen.head_rows:
        words.append(f"{chosen.head_rows:,} rows of the output matrix at a time")
    if chosen.rows:
        words.append(f"{chosen.rows} rows at a time")
    if chosen.checkpoints != "plain":
        words.append(
            {"half": "checkpoints in half precision", "file": "checkpoints in a file"}[chosen.checkpoints]
        )
    return ", ".join(words) or "the plain way"


def _parameters(manifest: Manifest) -> int:
    """Of the frozen matrices: codes are bytes, or half bytes in the 4-bit formats."""
    from math import prod

    total = 0
    for name, place in manifest.tensors.items():
        if name.endswith(".q"):
            outer = "/" not in name
            four = "4" in (manifest.embedding_format if outer else manifest.weights_format)
            total += prod(place.shape) * (2 if four else 1)
    return total


# ---------------------------------------------------------------- facts
def _open(folder: Path, publisher: bytes | None = None, sha256: bytes | None = None) -> Manifest:
    from fedge.errors import NoInputError
    from fedge.release import MANIFEST, SIGNATURE, open_manifest

    try:
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoInputError(
            "no bundle here",
            field="path",
            value=str(folder),
            hint="`fedge quantize MODEL --out DIR` makes one",
        ) from error
    return open_manifest(data, signature, publisher=publisher, sha256=sha256)


def _facts(manifest: Manifest, folder: Path) -> dict[str, Any]:
    from fedge.release import bundle_digest

    layout = manifest.layout
    return {
        "bundle": str(folder),
        "sha256": bundle_digest(manifest),
        "publisher": manifest.publisher,
        "model": manifest.model,
        "architecture": manifest.architecture,
        "task": manifest.task,
        "licence": manifest.licence,
        "source_sha256": manifest.source_sha256,
        "weights_format": manifest.weights_format,
        "embedding_format": manifest.embedding_format,
        "layers": manifest.layers,
        "hidden": manifest.hidden,
        "vocabulary": manifest.vocabulary,
        "positions_max": manifest.positions_max,
        "classes": list(manifest.classes),
        **_beside(manifest),
        "runtime_min": manifest.runtime_min,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "adapter": {
            "rank": layout.r,
            "alpha": manifest.lora.alpha,
            "rslora": manifest.lora.rslora,
            "matrices": len(layout.slots),
            "numbers": layout.numbers,
            "bytes": 4 * layout.numbers,
            "modules": {path: list(shape) for path, shape in sorted(manifest.lora_shapes.items())},
            "dense": {name: list(shape) for name, shape in layout.dense},
        },
        "operators": list(manifest.operators),
        "gates": manifest.gates,
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
    }


def _beside(manifest: Manifest) -> dict[str, Any]:
    """What a bundle of recordings hears at once, and what one for vectors makes of a text."""
    audio, vectors = manifest.hears, manifest.embeds
    if vectors is not None:
        return {"vectors": {"pooling": vectors.pooling, "normalised": vectors.normalised}}
    if audio is None:
        return {}
    return {"audio": {"seconds": audio.seconds, "sample_rate": audio.sample_rate, "mels": audio.mels}}


def _key(text: str) -> bytes:
    path = Path(text)
    if len(text) != 64 and path.is_file():
        text = path.read_text(errors="replace").strip()
    return _hexadecimal("publisher", text)


def _hexadecimal(field: str, text: str) -> bytes:
    from fedge.errors import UsageError

    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise UsageError("64 hexadecimal digits are needed", field=field, value=text)
    return found


# ---------------------------------------------------------------- printing
def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, inner in value.items():
                if inner not in ([], {}):
                    print(f"  {key:<28} {_cell(inner)}")
        elif value not in ("", []):
            print(f"{name:<18} {_cell(value)}")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return (
            " x ".join(map(str, value))
            if all(isinstance(n, int) for n in value)
            else ", ".join(map(str, value))
        )
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
