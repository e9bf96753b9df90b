"""Writes `benchmarks/README.md` from the last full runs, kept as `benchmarks/results/NAME.json`.

Keep a run: `./run bench NAME --json > benchmarks/results/NAME.json`, then `./run bench readme`. Quick runs are refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HEAD = """\
# Figures

Made by `./run bench readme` from the last full runs in `results/`; do not edit. Its command prints a row again.
Values are medians, spreads minimum and maximum. Processor seconds, bytes and memory can be compared between machines
of one kind; wall seconds were taken on a shared machine and are not to be quoted.
"""


def main() -> None:
    runs = [json.loads(path.read_bytes()) for path in sorted((HERE / "results").glob("*.json"))]
    quick = [run["benchmark"] for run in runs if run.get("quick")]
    if quick:
        sys.exit(f"quick runs are never quoted: {', '.join(quick)}")
    text = "\n".join([HEAD, *(section(run) for run in runs)])
    (HERE / "README.md").write_text(text)
    print(f"{len(runs)} benchmarks written to {HERE / 'README.md'}")


def section(run: dict[str, Any]) -> str:
    """One benchmark as a table."""
    name, rows = run["benchmark"], run["rows"]
    command = f"./run bench {name} {run.get('options', '')}".strip()
    lines = [
        f"## {name}",
        "",
        f"`{command}` · {run['machine']} · commit {run['commit']} · seed {run['seed']}, {run['runs']} runs",
        "",
        "| figure | case | value | spread | goal | met | baseline | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
        "",
    ]
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """One figure."""
    low, high = row["spread"]
    met = {True: "yes", False: "**no**", None: ""}[row["meets"]]
    baseline = row.get("baseline") or ""
    if row.get("baseline_value") is not None:
        baseline += f": {row['baseline_value']:.4g}"
    ratio = f"{row['ratio']:.3g}" if row.get("ratio") is not None else ""
    cells = (
        f"`{row['figure']}`",
        row["case"],
        f"{row['value']:.5g} {row['unit']}",
        f"{low:.4g} to {high:.4g}" if low != high else "",
        row.get("goal") or "",
        met,
        baseline,
        ratio,
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
