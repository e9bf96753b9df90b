"""The tables of a world's page. Each takes one run or several by name: with several, a cell has a bar for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from firmware_sim.pages.charts import note
from firmware_sim.pages.tables import cell, table
from firmware_sim.pages.world_words import celsius_text, energy_text, number_text, percent_text, share_of
from firmware_sim.world.outcome import ClassFigures, WorldResult

Runs = Mapping[str, WorldResult]
Figure = Callable[[ClassFigures], float]
Text = Callable[[ClassFigures], str]


def board_labels() -> dict[str, str]:
    """The boards' names for people."""
    from firmware_sim.parts.board import BOARDS

    return {name: board.label for name, board in BOARDS.items()}


def classes(runs: Runs) -> str:
    """A row for each class of boards: who took part, what it spent, how hot it was."""
    columns: list[tuple[str, Figure, Text]] = [
        ("took part", lambda c: c.served / max(c.devices, 1), lambda c: f"{c.served:,} of {c.devices:,}"),
        ("rounds each", lambda c: c.rounds_mean, lambda c: number_text(c.rounds_mean, 1)),
        ("energy each", lambda c: c.energy_kj_mean, lambda c: energy_text(c.energy_kj_mean)),
        ("sent each", lambda c: c.upload_mb_mean, lambda c: f"{c.upload_mb_mean:,.2f} MB"),
        ("received each", lambda c: c.download_mb_mean, lambda c: f"{c.download_mb_mean:,.0f} MB"),
        ("on", lambda c: c.on_hours_mean, lambda c: f"{c.on_hours_mean:,.1f} h"),
        ("hottest", lambda c: c.hottest_celsius, lambda c: celsius_text(c.hottest_celsius)),
        ("throttled", lambda c: c.throttled_hours, lambda c: f"{c.throttled_hours:,.1f} h"),
    ]
    names = list(dict.fromkeys(name for run in runs.values() for name in run.classes))
    most = [max(show(c) for run in runs.values() for c in run.classes.values()) for _, show, _ in columns]
    rows = []
    for name in names:
        cells = [f"<th>{escape(board_labels().get(name, name))}</th>"]
        for (_, show, text), top in zip(columns, most, strict=True):
            found = [run.classes.get(name) for run in runs.values()]
            cells.append(
                _spark([None if c is None else (show(c) / top if top else 0.0, text(c)) for c in found])
            )
        rows.append(tuple(cells))
    return f'<div class="scroll">{_table(("", *(name for name, _, _ in columns)), rows, "classes")}</div>'


def funnel(runs: Runs) -> str:
    """How many devices came how far, with the share of all."""
    shares = [
        {k: (share_of(v, run.devices), f"{v:,}") for k, v in run.funnel.items()} for run in runs.values()
    ]
    return _bars("devices", shares)


def why_not(runs: Runs) -> str:
    """Device-hours without work, by reason, with the share of all such hours; most first."""
    totals = [sum(run.why_not_hours.values()) for run in runs.values()]
    shares = [
        {
            k: (share_of(v, total), f"{v:,.0f} h")
            for k, v in sorted(run.why_not_hours.items(), key=_most_first)
        }
        for run, total in zip(runs.values(), totals, strict=True)
    ]
    if not any(totals):
        return note("Nobody looked at the fleet.")
    return _bars("device-hours", shares)


def rounds(runs: Runs) -> str:
    """What became of rounds and updates."""
    rows = [
        ("rounds of blocs tried", [f"{run.rounds.tried:,}" for run in runs.values()]),
        ("of them opened", [_part(run.rounds.opened, run.rounds.tried) for run in runs.values()]),
        (
            "sat out: a member was missing",
            [_part(run.rounds.sat_out, run.rounds.tried) for run in runs.values()],
        ),
        ("trainings begun", [f"{run.rounds.updates_started:,}" for run in runs.values()]),
        ("updates finished", [f"{run.rounds.updates_finished:,}" for run in runs.values()]),
        (
            "yield: finished updates that were opened",
            [percent_text(run.rounds.yield_) for run in runs.values()],
        ),
        ("drop: trainings begun and not finished", [percent_text(run.rounds.drop) for run in runs.values()]),
        ("waste: energy of work never opened", [percent_text(run.rounds.waste) for run in runs.values()]),
        (
            "fairness over all devices (Jain; 1 = all alike)",
            [number_text(run.rounds.jain, 2) for run in runs.values()],
        ),
        ("devices never served", [percent_text(run.rounds.never_served) for run in runs.values()]),
        ("length of an opened round, median", [_seconds(run.rounds.seconds_median) for run in runs.values()]),
        (
            "blocs; times that blocs were formed",
            [f"{run.blocs:,}; {run.formations:,}" for run in runs.values()],
        ),
        (
            "hours with too few live blocs to open any",
            [number_text(run.starving_hours, 1) for run in runs.values()],
        ),
    ]
    return table(
        ("", *_names(runs)), [(f"<th>{name}</th>", *map(cell, texts)) for name, texts in rows], "figures"
    )


def breakers(run: WorldResult) -> str:
    """The devices for which blocs waited longest."""
    if not run.breakers:
        return note("No bloc had to wait for a single device.")
    most = max(entry.hours for entry in run.breakers)
    rows = [
        (
            f"<th>{escape(entry.device)}</th>",
            f"<td>{escape(board_labels().get(entry.board, entry.board))}</td>",
            f"<td>{escape(entry.bloc)}</td>",
            _spark([(entry.hours / most if most else 0.0, f"{entry.hours:,.1f} h")]),
        )
        for entry in run.breakers
    ]
    return f'<div class="scroll">{_table(("device", "board", "bloc", "waited for it alone"), rows, "breakers")}</div>'


def counts(title: str, runs: Runs, of: Callable[[WorldResult], Mapping[str, int]], nothing: str) -> str:
    """How often each named thing happened, most first."""
    names = list(
        dict.fromkeys(name for run in runs.values() for name, _ in sorted(of(run).items(), key=_most_first))
    )
    if not names:
        return f"<h3>{title}</h3>{note(nothing)}"
    rows = [
        (f"<th>{escape(name)}</th>", *(cell(f"{of(run).get(name, 0):,}") for run in runs.values()))
        for name in names
    ]
    return f"<div>{table((title, *_names(runs)), rows, 'counts')}</div>"


def _bars(title: str, shares: Sequence[Mapping[str, tuple[float | None, str]]]) -> str:
    """A row for each name with a bar for each run, the largest over the whole width."""
    most = max((share or 0.0 for found in shares for share, _ in found.values()), default=0.0) or 1.0
    names = list(dict.fromkeys(name for found in shares for name in found))
    rows = []
    for name in names:
        found = [entry.get(name, (None, "–")) for entry in shares]
        texts = [text if share is None else f"{text} · {percent_text(share)}" for share, text in found]
        bars = "".join(_bar(place, (share or 0.0) / most) for place, (share, _) in enumerate(found))
        told = "".join(f'<div class="r{place}">{escape(text)}</div>' for place, text in enumerate(texts))
        rows.append(
            (f"<th>{escape(name)}</th>", f'<td class="meter">{bars}</td>', f'<td class="n">{told}</td>')
        )
    return table(("", "", title), rows, "meters")


def _bar(place: int, share: float) -> str:
    return f'<div class="r{place}" style="width:{100 * share:.2f}%"></div>'


def _spark(entries: Sequence[tuple[float, str] | None]) -> str:
    """A cell with a short bar and a text for each run that has the figure."""
    lines = [
        f'<div class="r{place}">{escape(entry[1])}<i style="width:{100 * entry[0]:.1f}%"></i></div>'
        for place, entry in enumerate(entries)
        if entry is not None
    ]
    return f'<td class="spark">{"".join(lines)}</td>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]], kind: str) -> str:
    """A table whose columns all begin on the left."""
    titles = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def _names(runs: Runs) -> list[str]:
    return list(runs) if len(runs) > 1 else [""]


def _part(part: int, whole: int) -> str:
    return f"{part:,} ({percent_text(part / whole)})" if whole else f"{part:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"


def _most_first(item: tuple[str, float]) -> tuple[float, str]:
    return -item[1], item[0]
