"""A comparison for people: a page with every run in each chart, a table for the terminal, a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from fedge.io import durable
from firmware_sim.compare import Row, Side, rows_of
from firmware_sim.pages import tables, world_tables
from firmware_sim.pages.world_report import fill_page, loss_charts, mishaps, section


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who did what better on every seed, and each figure that counts with its spread."""

    answer: str
    figures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is written: the sides, the loss up to which time and energy count, and each side's rows against the first.

    `question` is the title, `verdicts` the answers: one for each side after the first.
    """

    question: str
    verdicts: tuple[Verdict, ...]
    target: float | None
    sides: tuple[Side, ...]
    rows: dict[str, list[Row]]


def compared(
    question: str, sides: Sequence[Side], target: float | None, extra: Sequence[Row] = ()
) -> Comparison:
    """Every later side against the first; `extra` rows, of the second one, stand before all others."""
    base = sides[0]
    rows = {side.name: rows_of(base, side, target) for side in sides[1:]}
    rows[sides[1].name][:0] = extra
    verdicts = tuple(_verdict(found, base.name, other) for other, found in rows.items())
    return Comparison(question, verdicts, target, tuple(sides), rows)


def write_comparison(found: Comparison, folder: Path) -> None:
    """Writes compare.json and compare.html into `folder`. Raises StorageError."""
    durable.make_folder(folder)
    durable.write_bytes(folder / "compare.json", encode_comparison(found))
    durable.write_bytes(folder / "compare.html", comparison_page(found).encode())


def encode_comparison(found: Comparison) -> bytes:
    """Strict JSON: what was found, and of the runs what identifies them."""
    keys = ("scenario", "devices", "days", "seed", "crc")
    values = {
        "question": found.question,
        "verdicts": found.verdicts,
        "target": found.target,
        "sides": [
            {"name": side.name, "runs": [{key: getattr(run, key) for key in keys} for run in side.runs]}
            for side in found.sides
        ],
        "rows": {name: [_plain(row) for row in rows] for name, rows in found.rows.items()},
    }
    return msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n"


def _plain(row: Row) -> dict[str, object]:
    keys = ("base", "other", "ratio", "lowest", "highest", "seeds")
    return {"figure": row.measure.name, **{key: getattr(row, key) for key in keys}}


# ---------------------------------------------------------------- words
def _verdict(rows: Sequence[Row], base: str, other: str) -> Verdict:
    told = [row for row in rows if row.measure.wins and row.ratio is not None]
    wins: dict[str, list[str]] = {}
    for row in told:
        if row.is_clear:
            wins.setdefault(other if row.other_is_better else base, []).append(row.measure.wins)
    best = "; ".join(f"{name} {_and(words)}" for name, words in wins.items())
    answer = f"{best}." if best else f"No clear difference between {base} and {other}."
    return Verdict(answer, tuple(_sentences(told, base, other)))


def _sentences(rows: Sequence[Row], base: str, other: str) -> list[str]:
    sentences = []
    for row in rows:
        name, (before, after) = row.measure.name, row.texts
        same = row.lowest == row.highest == 1
        unclear = "" if row.is_clear or same else "; no clear difference"
        sentences.append(
            f"{name[0].upper()}{name[1:]}: {base} {before}, {other} {after} ({_spread_text(row)}{unclear})."
        )
    return sentences


def ratio_text(ratio: float | None) -> str:
    """0.53x; a dash when there is none."""
    if ratio is None:
        return "–"
    return f"{ratio:.2f}x" if ratio >= 0.095 else f"{ratio:.2g}x"


def _spread_text(row: Row) -> str:
    if row.seeds > 1:
        return f"{ratio_text(row.ratio)}, {_range_text(row)} over {row.seeds} seeds"
    return f"{ratio_text(row.ratio)}{', one seed: its spread is not known' if row.seeds else ''}"


def _range_text(row: Row) -> str:
    return "" if row.seeds < 2 else f"{ratio_text(row.lowest)} to {ratio_text(row.highest)}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---------------------------------------------------------------- the page
def comparison_page(found: Comparison) -> str:
    """The page as text."""
    firsts = {side.name: side.runs[0] for side in found.sides}
    lines = [(side.name, run, place) for place, side in enumerate(found.sides) for run in side.runs]
    seeds = max(len(side.runs) for side in found.sides)
    shown = f" Of {seeds} seeds, the first is shown." if seeds > 1 else ""
    sections = (
        section("Figures", _figures_words(found, seeds), _figures(found)),
        section("What was learnt", "A line for each run.", loss_charts(lines, found.target)),
        section("Who took part", f"Averages of each class of boards.{shown}", world_tables.classes(firsts)),
        section("How far devices came", shown.strip(), world_tables.funnel(firsts)),
        section("Where the hours of devices went", shown.strip(), world_tables.why_not(firsts)),
        section("Rounds", shown.strip(), world_tables.rounds(firsts)),
        section("What went wrong", shown.strip(), mishaps(firsts)),
    )
    return fill_page(
        title=escape(found.question),
        eyebrow=f"Fedge {escape(found.sides[0].runs[0].fedge)} · simulated worlds, compared",
        headline=escape(found.question),
        story=_legend(found) + "".join(map(_answer, found.verdicts)),
        cards="",
        sections="".join(sections),
        footer=_footer(found),
    )


def _legend(found: Comparison) -> str:
    keys = "".join(
        f'<li><i class="swatch r{place}"></i>{escape(side.name)}</li>'
        for place, side in enumerate(found.sides)
    )
    return f'<ul class="legend sides">{keys}</ul>'


def _answer(verdict: Verdict) -> str:
    figures = "".join(f"<li>{escape(text)}</li>" for text in verdict.figures)
    return f'<p class="lede strong">{escape(verdict.answer)}</p><ul class="verdict">{figures}</ul>'


def _figures_words(found: Comparison, seeds: int) -> str:
    base = escape(found.sides[0].name)
    median = f"Medians over {seeds} seeds. " if seeds > 1 else ""
    target = (
        f" Time and energy are those to loss {found.target:.2f}, nine tenths of the way to "
        "where every run ends unless asked otherwise."
        if found.target is not None
        else ""
    )
    return (
        f"{median}A ratio is the figure over that of {base} with the same seed, median and range. "
        f"A bold one is clear: better or worse on every seed.{target}"
    )


def _figures(found: Comparison) -> str:
    others = list(found.rows)
    head = ["", found.sides[0].name]
    for name in others:
        head += [name, "ratio", "range"]
    rows = []
    for place, row in enumerate(found.rows[others[0]]):
        cells = [f"<th>{escape(row.measure.name)}</th>", tables.cell(row.texts[0])]
        for name in others:
            cells += _ratio_cells(found.rows[name][place])
        rows.append(tuple(cells))
    return f'<div class="scroll">{tables.table(head, rows, "figures")}</div>'


def _ratio_cells(row: Row) -> list[str]:
    kind = ("good" if row.other_is_better else "bad") if row.is_clear and row.measure.better else ""
    return [
        tables.cell(row.texts[1]),
        f'<td class="n"><span class="{kind}">{ratio_text(row.ratio)}</span></td>',
        tables.cell(_range_text(row)),
    ]


def _footer(found: Comparison) -> str:
    runs = "; ".join(
        f"{escape(side.name)}: {escape(run.scenario)}, {run.devices:,} devices, {run.days:g} days, "
        f"seed {run.seed}, CRC {escape(run.crc)}"
        for side in found.sides
        for run in side.runs
    )
    return f"{runs}. The same figures are in compare.json."


# ---------------------------------------------------------------- terminal
def print_comparison(
    found: Comparison, folder: Path | None = None, *, console: Console | None = None
) -> None:
    """Print the table and the verdict; `folder` says where the page is."""
    screen = console or Console()
    for name, rows in found.rows.items():
        table = Table(title=found.question, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for title in (found.sides[0].name, name, "ratio", "range"):
            table.add_column(title, justify="right")
        for row in rows:
            table.add_row(row.measure.name, *row.texts, ratio_text(row.ratio), _range_text(row))
        screen.print(table)
        screen.print()
    for verdict in found.verdicts:
        screen.print(verdict.answer, style="bold", markup=False, highlight=False, soft_wrap=True)
        for text in verdict.figures:
            screen.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
    if folder is not None:
        screen.print(f"\nLook at {folder / 'compare.html'}", markup=False, highlight=False, soft_wrap=True)
