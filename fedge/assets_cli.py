"""`fedge models` and `fedge data`: what can be fetched by name, and the fetching of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypedDict

if TYPE_CHECKING:
    from fedge.io.assets import Asset, Kind

_ABOUT: Final[tuple[tuple[Kind, str], ...]] = (
    ("models", "models that can be fetched by name"),
    ("data", "data sets that can be fetched by name"),
)
_EXAMPLES: Final = """\
examples:
  fedge {kind} list
  fedge {kind} pull {name}

Files lie under $XDG_CACHE_HOME/fedge (by default ~/.cache/fedge) and are checked by SHA-256 before they are used.
"""


class _Row(TypedDict):
    """What `--json` says about one asset."""

    name: str
    licence: str
    note: str
    package: str
    download_bytes: int
    sha256: str
    path: str
    cached: bool


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the words `models` and `data`."""
    for kind, about in _ABOUT:
        name = "smollm2-135m" if kind == "models" else "chitchat"
        parser = subparsers.add_parser(
            kind,
            help=about,
            description=f"{about.capitalize()}.",
            epilog=_EXAMPLES.format(kind=kind, name=name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        actions = parser.add_subparsers(metavar="ACTION")
        listing = actions.add_parser(
            "list", help="what there is, its licence, and whether it is on this disk"
        )
        listing.set_defaults(run=_list, kind=kind)
        pulling = actions.add_parser("pull", help="fetch one, and print its path")
        pulling.add_argument("name", metavar="NAME")
        pulling.add_argument(
            "--verify", action="store_true", help="hash the file even if it is cached already"
        )
        pulling.set_defaults(run=_pull, kind=kind)
        for leaf in (listing, pulling):
            leaf.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _list(arguments: argparse.Namespace) -> None:
    from fedge.io.assets import ASSETS

    kind: Kind = arguments.kind
    rows = [_row(asset) for asset in ASSETS if asset.kind == kind]
    if arguments.json:
        print(json.dumps({kind: rows}, indent=1))
        return
    table = [["name", "download", "licence", "here", "what it is"]]
    for row in rows:
        size, here = f"{row['download_bytes'] / 1e6:.1f} MB", "yes" if row["cached"] else "no"
        table.append([row["name"], size, row["licence"], here, row["note"]])
    print(_table_text(table))
    print(f"\nFetch one: fedge {kind} pull {rows[0]['name']}")


def _pull(arguments: argparse.Namespace) -> None:
    from fedge.io.assets import find, pull

    kind: Kind = arguments.kind
    asset = find(kind, arguments.name)
    path = pull(kind, asset.name, progress=_Meter(sys.stderr.isatty()), verify=arguments.verify)
    if arguments.json:
        print(json.dumps({**_row(asset), "path": str(path)}, indent=1))
        return
    print(f"{asset.name}: {asset.note}, {asset.licence}", file=sys.stderr)
    print(path)


def _row(asset: Asset) -> _Row:
    from fedge.io.assets import cached_path, is_cached

    return {
        "name": asset.name,
        "licence": asset.licence,
        "note": asset.note,
        "package": f"{asset.source.package}=={asset.source.version}",
        "download_bytes": asset.source.wheel_bytes,
        "sha256": asset.source.file.sha256,
        "path": str(cached_path(asset)),
        "cached": is_cached(asset),
    }


def _table_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


class _Meter:
    """Progress on standard error: a bar that redraws itself on a terminal, else a line per phase."""

    def __init__(self, terminal: bool) -> None:
        self._terminal, self._phase = terminal, ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase.startswith("note: "):
            print(phase, file=sys.stderr)
        elif self._terminal:
            bar = "#" * (30 * done // total)
            end = "\n" if done == total and phase == "unpack" else ""
            print(f"\r{phase:<9} [{bar:<30}] {done / 1e6:6.1f} MB", end=end, file=sys.stderr, flush=True)
        elif phase != self._phase:
            print(f"{phase} {total / 1e6:.1f} MB", file=sys.stderr)
        self._phase = phase
