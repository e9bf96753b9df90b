"""The report's tables as HTML: rounds, spread over people, bytes, memory, time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from firmware_sim.processes.evaluation import Spread
from firmware_sim.processes.result import AgentMemory, Result, Round, Traffic, change_text, figure_text
from firmware_sim.processes.summary import Group, megabytes_text, seconds_text, size_text

_PARTS: Final = ("prepare", "quantize", "train", "evaluate")
_REFERENCE: Final = (
    '<p class="quiet">Pooled reference: the same trainer on the same batches, all data in one place, as many '
    "sequential steps, nothing masked.</p>"
)


def rounds(log: Sequence[Round]) -> str:
    """A row for each round of each bloc."""
    head = (
        "bloc",
        "round",
        "training loss",
        "mean update norm",
        "norm of the sum",
        "bits a word",
        "ended after",
    )
    rows = [
        (
            f"<th>{escape(entry.bloc)}</th>",
            cell(str(entry.round)),
            cell(figure_text(entry.training_loss)),
            cell(figure_text(entry.mean_norm)),
            cell(figure_text(entry.sum_norm)),
            cell("–" if entry.bits is None else str(entry.bits)),
            cell(seconds_text(entry.seconds)),
        )
        for entry in sorted(log, key=lambda entry: (entry.bloc, entry.round))
    ]
    return table(head, rows)


def spread(groups: Sequence[Group]) -> str:
    """A row for each group of people: its loss, and how its members differ."""
    groups = [group for group in groups if group.people]
    referenced = any(group.reference is not None for group in groups)
    head = ["", "people", "before", "after", "mean change", "sd of change", "smallest drop", "lower for"]
    if referenced:
        head.append("pooled reference")
    rows = []
    for group in groups:
        cells = [f"<th>{group.name}</th>", cell(str(len(group.people)))]
        cells += [
            cell(figure_text(group.before)),
            cell(figure_text(group.after)),
            *_spread_cells(group.spread),
        ]
        rows.append(tuple([*cells, cell(figure_text(group.reference))] if referenced else cells))
    left_out = sum(len(group.people) - (group.spread.people if group.spread else 0) for group in groups)
    note = _REFERENCE if referenced else ""
    if left_out:
        note += f'<p class="quiet">People without a finite figure are left out of the spread: {left_out}.</p>'
    return f'<div class="scroll">{table(head, rows)}</div>{note}'


def traffic(found: Traffic) -> str:
    """What travels for one device, with bars."""
    named = (
        ("up, one round", found.up_per_round),
        ("up, whole run", found.up_total_per_device),
        ("down, whole run", found.down_total_per_device),
        ("the bundle, once for all here", found.bundle),
    )
    return meters("What travels, for each device", [(name, value, size_text(value)) for name, value in named])


def memory(found: AgentMemory) -> str:
    """Memory of an agent, with bars."""
    named = (
        ("idle, resident", found.idle_rss_mb),
        ("training, of its own", found.peak_anon_mb),
        ("training, with file pages", found.peak_rss_mb),
    )
    return meters("Memory of an agent", [(name, value, megabytes_text(value)) for name, value in named])


def time(result: Result) -> str:
    """Wall time of each part, and processor time."""
    wall: dict[str, float | None] = {part: getattr(result.seconds, part) for part in (*_PARTS, "total")}
    others = sorted(set(result.cpu_seconds) - set(wall))
    rows = [
        (
            f"<th>{escape(part.replace('_', ' '))}</th>",
            cell(seconds_text(wall.get(part))),
            cell(seconds_text(result.cpu_seconds.get(part))),
        )
        for part in (*_PARTS, *others, "total")
    ]
    return table(("", "wall time", "processor time"), rows)


def _spread_cells(found: Spread | None) -> list[str]:
    if found is None:
        return [cell("–")] * 4
    return [
        cell(change_text(found.mean, 0.0)),
        cell(f"{found.sd:.3f}"),
        cell(f"{found.smallest:.3f}".replace("-", "\N{MINUS SIGN}")),
        cell(f"{found.improved} of {found.people}"),
    ]


def meters(caption: str, rows: Sequence[tuple[str, float | None, str]]) -> str:
    """A row for each (name, value, text) with a bar as long as its value; names are HTML."""
    largest = max((value for _, value, _ in rows if value), default=1.0)
    body = []
    for name, value, text in rows:
        bar = f'<div style="width:{100 * value / largest:.2f}%"></div>' if value else ""
        body.append((f"<th>{name}</th>", f'<td class="meter">{bar}</td>', cell(text)))
    return table((caption, "", ""), body, "meters")


def table(head: Sequence[str], rows: Sequence[tuple[str, ...]], kind: str = "plain") -> str:
    """A table; `rows` hold whole cells, the first of each a header."""
    titles = [
        f'<th class="n">{escape(text)}</th>' if place else f"<th>{escape(text)}</th>"
        for place, text in enumerate(head)
    ]
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<table class='{kind}'><thead><tr>{''.join(titles)}</tr></thead><tbody>{body}</tbody></table>"


def cell(text: str) -> str:
    """A figure's cell."""
    return f'<td class="n">{escape(text)}</td>'
