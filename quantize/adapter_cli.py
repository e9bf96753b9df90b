"""`fedge adapter`: look at an adapter, compare two, and hand one to the rest of the world.

Everything here reads files and writes one; no device, hub or network is involved. Nothing heavy is imported before a
word runs, and `show`, `diff` and `export --to peft` need no torch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge.errors import UsageError

if TYPE_CHECKING:
    from fedge.release import Manifest
    from quantize.interop.factors import Opened
    from quantize.interop.merging import Merged

_EPILOG: Final = """\
An ADAPTER is a file of `fedge agent train-once --adapter-out`, a PEFT folder, or a GGUF LoRA.

examples:
  fedge agent train-once bundle my.jsonl --steps 40 --adapter-out mine
  fedge adapter show mine
  fedge adapter export mine --bundle bundle --to peft peft-folder    peft.PeftModel.from_pretrained loads it
  fedge adapter export mine --bundle bundle --to gguf mine.gguf      llama-cli --lora mine.gguf
  fedge adapter merge mine --base ./my-hf-model merged               an ordinary model folder
"""
_TARGETS: Final = ("peft", "gguf", "hf", "optimum")
_NONE: Final = "none"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `adapter` and its words."""
    adapter = subparsers.add_parser(
        "adapter",
        help="show, compare, export and merge adapters",
        description="What training made, and how it leaves for other tools.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = adapter.add_subparsers(dest="adapter_command", metavar="WORD", required=True)
    _add_show(words)
    _add_diff(words)
    _add_export(words)
    _add_merge(words)


def _add_show(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    show = words.add_parser(
        "show",
        help="layers, ranks, and how much each module is changed",
        description="`norm` is the Frobenius norm of the change of a matrix, `largest` its largest singular value; "
        "with --bundle also `relative`, the norm divided by that of the frozen matrix.",
    )
    show.add_argument("adapter", type=Path, metavar="ADAPTER")
    show.add_argument("--bundle", type=Path, metavar="DIR", help="measure the changes against these weights")
    show.add_argument("--json", action="store_true", help="as one JSON object")
    show.set_defaults(run=_show)


def _add_diff(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diff = words.add_parser(
        "diff",
        help="how two adapters differ, module by module",
        description="`relative` is the norm of the difference of the two changes over the norm of the first; `cosine` "
        "the angle between them. Scales count; how A and B are factored does not.",
    )
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.add_argument("--json", action="store_true", help="as one JSON object")
    diff.set_defaults(run=_diff)


def _add_export(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = words.add_parser(
        "export",
        help="as a PEFT folder, a GGUF LoRA, a model folder with the bundle's own weights, or for optimum",
        description="peft: a folder that peft.PeftModel.from_pretrained loads. gguf: a file for llama.cpp and what "
        "builds on it. hf: the model of --base with the weights that the devices compute with, decoded, and the "
        "adapter merged in: it computes what the devices computed (`merge` keeps the base's own weights instead). "
        "optimum: a folder that optimum.onnxruntime.ORTModelForCausalLM generates with, over the bundle's weights.",
    )
    export.add_argument("adapter", type=Path, metavar="ADAPTER", help="for optimum also `none`")
    export.add_argument("out", type=Path, metavar="OUT", help="must not exist")
    export.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="that it was trained on")
    export.add_argument("--to", required=True, choices=_TARGETS)
    export.add_argument("--base", metavar="MODEL", help="for hf: the model that the bundle was made from")
    export.add_argument("--dtype", default="", help="for hf: float32, float16 or bfloat16 (as in the base)")
    export.add_argument("--json", action="store_true", help="as one JSON object")
    export.set_defaults(run=_export)


def _add_merge(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = words.add_parser(
        "merge",
        help="into its float base: an ordinary Hugging Face model folder",
        description="Adds scale x B A to each matrix of the base in float32 and writes it back in the base's type.",
    )
    merge.add_argument("adapter", type=Path, metavar="ADAPTER")
    merge.add_argument("out", type=Path, metavar="OUT", help="must not exist")
    merge.add_argument(
        "--base", required=True, metavar="MODEL", help="folder, hub id, registered name or GGUF"
    )
    merge.add_argument("--dtype", default="", help="float32, float16 or bfloat16 (default: as in the base)")
    merge.add_argument("--json", action="store_true", help="as one JSON object")
    merge.set_defaults(run=_merge)


# ---------------------------------------------------------------- what the words do
def _show(arguments: argparse.Namespace) -> None:
    from quantize.interop.opening import open_adapter

    adapter = open_adapter(arguments.adapter)
    relative = _relative(adapter, arguments.bundle) if arguments.bundle else {}
    rows = [
        {
            "module": key,
            "out": len(pair.b),
            "in": pair.a.shape[1],
            "rank": pair.rank,
            "scale": pair.scale,
            "norm": pair.norm,
            "largest": pair.largest,
            **({"relative": relative[key]} if relative else {}),
        }
        for key, pair in adapter.factors.items()
    ]
    found = {
        "kind": adapter.kind,
        **adapter.about,
        "bytes": adapter.bytes,
        "layers": len({key.partition("/")[0] for key in adapter.factors}),
        "ranks": sorted({pair.rank for pair in adapter.factors.values()}),
        "numbers": sum(pair.a.size + pair.b.size for pair in adapter.factors.values()),
        "norm": math.sqrt(sum(pair.norm**2 for pair in adapter.factors.values())),
        "dense": {name: list(values.shape) for name, values in adapter.dense.items()},
        "notices": list(adapter.notices),
        "modules": rows,
    }
    _print(found, arguments.json, "modules")


def _relative(adapter: Opened, bundle: Path) -> dict[str, float]:
    """Norm of each change over the norm of the frozen matrix."""
    import numpy as np

    from quantize.interop.bundle_weights import Matrices, read_manifest

    frozen = Matrices(bundle, read_manifest(bundle))
    for key in adapter.factors:
        if key not in frozen:
            raise UsageError("the adapter is of another model than the bundle", field="module", value=key)
    return {key: pair.norm / float(np.linalg.norm(frozen[key])) for key, pair in adapter.factors.items()}


def _diff(arguments: argparse.Namespace) -> None:
    from quantize.interop.factors import difference
    from quantize.interop.opening import open_adapter

    first, second = open_adapter(arguments.first), open_adapter(arguments.second)
    rows: list[dict[str, Any]] = []
    alone: dict[str, list[str]] = {"only_in_a": [], "only_in_b": []}
    apart = 0.0
    for key in dict.fromkeys([*first.factors, *second.factors]):
        one, other = first.factors.get(key), second.factors.get(key)
        if one is None or other is None:
            alone["only_in_b" if one is None else "only_in_a"].append(key)
            continue
        if (one.b.shape[0], one.a.shape[1]) != (other.b.shape[0], other.a.shape[1]):
            raise UsageError("the adapters are of different models", field="module", value=key)
        found = difference(key, one, other)
        apart += (found.relative * one.norm) ** 2 if one.norm else other.norm**2
        rows.append({"module": key, "relative": _finite(found.relative), "cosine": found.cosine})
    if not rows:
        raise UsageError("the adapters have no module in common", field="modules", value=len(first.factors))
    whole = math.sqrt(sum(pair.norm**2 for pair in first.factors.values()))
    total = {
        "modules_compared": len(rows),
        "relative": _finite(math.sqrt(apart) / whole if whole else math.inf),
        "notices": [*first.notices, *second.notices],
        **alone,
        "modules": rows,
    }
    _print(total, arguments.json, "modules")


def _export(arguments: argparse.Namespace) -> None:
    from fedge.io.adapter_source import adapter_for
    from fedge.io.peft_folder import export_peft
    from fedge.release import WEIGHTS
    from quantize.interop.bundle_weights import check_hash, read_manifest
    from quantize.interop.opening import opened

    if arguments.out.exists():
        raise UsageError(
            "the target exists already", field="out", value=str(arguments.out), hint="Choose another"
        )
    if (arguments.to == "hf") != (arguments.base is not None):
        raise UsageError(
            "--base goes with --to hf: the model that the bundle was made from",
            field="to",
            value=arguments.to,
        )
    manifest = read_manifest(arguments.bundle)
    if arguments.to == "optimum":
        _export_optimum(arguments, manifest)
        return
    weights = arguments.bundle / WEIGHTS
    if manifest.dense:
        check_hash(arguments.bundle, manifest)
    adapter = adapter_for(arguments.adapter, manifest, weights)
    said: dict[str, Any] = {"out": str(arguments.out), "to": arguments.to, "model": manifest.model}
    if arguments.to == "peft":
        lora, layout = adapter.header.lora, adapter.header.layout
        export_peft(arguments.out, adapter.tensors, lora, manifest, weights, layout=layout)
    elif arguments.to == "gguf":
        from quantize.interop.gguf_lora import write_gguf_lora

        write_gguf_lora(arguments.out, adapter)
    else:
        from quantize.interop.merging import merge

        done = merge(
            opened(adapter, 0),
            arguments.base,
            arguments.out,
            dtype=arguments.dtype,
            bundle=(arguments.bundle, manifest),
        )
        said |= _merged(done)
    _print(said, arguments.json)


def _export_optimum(arguments: argparse.Namespace, manifest: Manifest) -> None:
    from fedge.io.adapter_source import adapter_for
    from fedge.release import WEIGHTS
    from quantize.interop.optimum_folder import write_optimum

    bare = str(arguments.adapter) == _NONE
    adapter = None if bare else adapter_for(arguments.adapter, manifest, arguments.bundle / WEIGHTS)
    write_optimum(arguments.out, arguments.bundle, manifest, adapter)
    _print({"out": str(arguments.out), "to": arguments.to, "model": manifest.model}, arguments.json)


def _merge(arguments: argparse.Namespace) -> None:
    from quantize.interop.merging import merge
    from quantize.interop.opening import open_adapter

    done = merge(open_adapter(arguments.adapter), arguments.base, arguments.out, dtype=arguments.dtype)
    _print({"out": str(arguments.out), **_merged(done)}, arguments.json)


def _merged(done: Merged) -> dict[str, Any]:
    return {
        "matrices": done.matrices,
        "largest_relative_change": done.largest_change,
        "notices": list(done.notices),
    }


# ---------------------------------------------------------------- printing
def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _print(found: dict[str, Any], as_json: bool, table: str = "") -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if name != table and value not in ("", [], {}):
            print(f"{name:<24} {_cell(value)}")
    rows = found.get(table) or []
    if rows:
        print()
        _print_table(rows)


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    for row in cells:
        parts: Iterable[str] = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(parts).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_cell, value)) if isinstance(value, list) else str(value)
