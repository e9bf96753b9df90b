"""What a run of a world found out, for people: `report.html`, readable offline, and a table for the terminal.

One page for one run; the parts that two runs share with it (charts, tables) take several. What did not happen is said:
no violation, no fault, nothing opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Final

from rich.console import Console
from rich.table import Table

from fedge.io import durable
from firmware_sim.pages import timelapse, world_charts, world_tables
from firmware_sim.pages.world_charts import Line
from firmware_sim.pages.world_words import (
    celsius_text,
    count_text,
    course_of,
    energy_kj,
    energy_text,
    headline,
    hours_text,
    number_text,
    percent_text,
    served,
    share_of,
)
from firmware_sim.processes.report import part_of_page
from firmware_sim.world.outcome import Point, WorldResult

MEMORY_DEVICES_MIN: Final = 10_000


def write_world_report(result: WorldResult, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises StorageError."""
    durable.write_bytes(path, world_page(result).encode())


def world_page(result: WorldResult) -> str:
    """The page as text."""
    runs = {result.scenario: result}
    sections = (
        section("The fleet, hour by hour", _lapse_words(result), _lapse(result)),
        section("What it learnt", _learnt_words(result), loss_charts([(result.scenario, result, 0)])),
        section("Who took part", "Averages of each class of boards.", world_tables.classes(runs)),
        section("How far devices came", "", world_tables.funnel(runs)),
        section(
            "Where the hours of devices went",
            "What devices were doing, or what kept them from working, as the board and the hub's scheduler tell it.",
            world_tables.why_not(runs),
        ),
        section("Rounds", "A bloc is opened whole or not at all.", world_tables.rounds(runs)),
        section(
            "For whom blocs waited",
            "A breaker is a device that all other members of its bloc are ready for.",
            world_tables.breakers(result),
        ),
        section("What went wrong, and what held", "", _held(result) + mishaps(runs)),
        section("How to read this", "", _limits(result)),
    )
    return fill_page(
        title=f"Fedge: {escape(result.scenario)}, {result.devices:,} devices",
        eyebrow=f"Fedge {escape(result.fedge)} · a simulated world: {escape(result.scenario)} · seed {result.seed}",
        headline=escape(headline(result)),
        story=_story(result),
        cards=_cards(result),
        sections="".join(sections),
        footer=_footer(result),
    )


def fill_page(**parts: str) -> str:
    """A page of this look: title, eyebrow, headline, story, cards, sections, footer, all HTML."""
    style = part_of_page("page.css") + part_of_page("world.css")
    return Template(part_of_page("world.html")).substitute(
        style=style, script=part_of_page("world.js"), **parts
    )


def section(title: str, words: str, content: str) -> str:
    """A titled part of the page."""
    said = f'<p class="quiet">{words}</p>' if words else ""
    return f"<section><h2>{title}</h2>{said}{content}</section>"


def loss_charts(runs: Sequence[tuple[str, WorldResult, int]], target: float | None = None) -> str:
    """Loss over hours and over energy, side by side; each run has a name and a colour."""
    over_hours = [Line(name, [(p.hour, p.figures["loss"]) for p in run.loss], c) for name, run, c in runs]
    unit, per_kj = _energy_unit([point for _, run, _ in runs for point in run.loss])
    over_energy = [
        Line(name, [(p.energy_kj * per_kj, p.figures["loss"]) for p in run.loss], c) for name, run, c in runs
    ]
    charts = (
        world_charts.lines(over_hours, "hours", "Loss", target),
        world_charts.lines(over_energy, unit, "Loss", target),
    )
    if not any(run.loss for _, run, _ in runs):
        return charts[0]
    drawn = "".join(
        f"<figure><figcaption>Loss over {text}</figcaption>{chart}</figure>"
        for text, chart in zip(("time", "energy"), charts, strict=True)
    )
    return f'<div class="columns charts">{drawn}</div>'


def mishaps(runs: world_tables.Runs) -> str:
    """Faults that struck and messages that were refused."""
    return (
        '<div class="columns">'
        + world_tables.counts("Faults survived", runs, lambda run: run.faults, "No fault struck.")
        + world_tables.counts("Refused", runs, lambda run: run.refusals, "Nothing was refused.")
        + "</div>"
    )


def _energy_unit(points: Sequence[Point]) -> tuple[str, float]:
    most = max((point.energy_kj for point in points), default=0.0)
    return ("kWh", 1 / 3_600) if most >= 3_600 else ("Wh", 1 / 3.6)


# ---------------------------------------------------------------- words of one run
def _story(result: WorldResult) -> str:
    about = f'<p class="lede">{escape(result.about)}</p>' if result.about else ""
    opened = result.rounds.opened
    formed = (
        f"{count_text(result.blocs, 'bloc')} came from {count_text(result.formations, 'formation')}"
        if result.blocs
        else "no bloc was formed"
    )
    told = (
        f"{count_text(result.devices, 'device')} lived through {hours_text(result.days * 24)} of virtual time; "
        f"the agent and the hub are the shipped code. {formed[0].upper()}{formed[1:]}, and "
        f"{count_text(opened, 'sum')} opened; each is over a whole bloc, and nothing else could be. "
        f"Task: {escape(result.task)}. Presence and links: {_traces_text(result)}."
    )
    notes = "".join(f'<p class="said">{escape(note)}</p>' for note in result.notes)
    return f'{about}<p class="lede">{told}</p>{notes}'


def _traces_text(result: WorldResult) -> str:
    return "models fitted to recorded fleets" if result.traces == "models" else escape(result.traces)


def _cards(result: WorldResult) -> str:
    rounds, total = result.rounds, energy_kj(result)
    hottest = max(result.classes.values(), key=lambda c: c.hottest_celsius, default=None)
    throttled = sum(c.throttled_hours for c in result.classes.values())
    course = course_of(result.loss)
    opened = rounds.updates_opened
    cards = [
        (
            "Devices that took part",
            percent_text(share_of(served(result), result.devices)),
            f"fairness {number_text(rounds.jain, 2)} (Jain)",
        ),
        (
            "Loss",
            f'<span class="was">{course.first:.2f} →</span> <span>{number_text(course.last, 2)}</span>'
            if course
            else "not measured",
            f"after {hours_text(course.hours)}, version {result.adapter_version:,}" if course else "",
        ),
        (
            "Energy of work",
            energy_text(total),
            f"{energy_text(total / opened)} for each opened update" if opened else "beyond idling",
        ),
        (
            "Yield",
            percent_text(rounds.yield_),
            f"{opened:,} of {rounds.updates_finished:,} finished updates opened",
        ),
        (
            "Hottest board",
            celsius_text(hottest.hottest_celsius) if hottest else "–",
            f"{throttled:,.1f} device-hours throttled",
        ),
        _held_card(result),
    ]
    return "".join(
        f'<div class="card"><dt>{title}</dt><dd class="number">{number}</dd><dd class="note">{words}</dd></div>'
        for title, number, words in cards
    )


def _held_card(result: WorldResult) -> tuple[str, str, str]:
    broken = len(result.violations)
    if broken:
        return "Invariants", f'<span class="bad">{broken:,} broken</span>', "see below"
    if result.judged:
        return "Invariants", "all held", f"{result.judged:,} judgements in {result.events:,} events"
    return "Invariants", "not checked", "--check watches them"


def _held(result: WorldResult) -> str:
    if result.violations:
        rows = "".join(
            f"<li><b>{escape(v.invariant)}</b> at event {v.event:,}, {timelapse.when_text(v.at)}: {escape(v.text)}</li>"
            for v in result.violations
        )
        title = count_text(len(result.violations), "violation")
        return f'<div class="said broken"><h3>{title}</h3><ul>{rows}</ul></div>'
    if result.judged:
        return (
            f'<p class="said">No violation in {result.judged:,} judgements over {result.events:,} events. Nothing but '
            "whole blocs was opened, no mask was used twice, no update was counted twice.</p>"
        )
    return '<p class="said">No invariant was watched in this run: <code>--check</code> does it.</p>'


def _lapse(result: WorldResult) -> str:
    strip = result.strip
    drawn = timelapse.figure(strip, world_tables.board_labels()) if strip else ""
    return drawn or '<p class="quiet">No time-lapse was recorded.</p>'


def _lapse_words(result: WorldResult) -> str:
    if result.strip is None or not result.strip.rows:
        return ""
    shown = len(result.strip.rows)
    whom = f"{shown} of {result.devices:,} devices" if shown < result.devices else "Every device"
    return (
        f"{whom}: a dot each, in the colour of what it is doing, and a row each in the strip below, where time runs "
        "to the right. A ring is a bloc. The bars on top of the strip are sums opened by the whole fleet."
    )


def _learnt_words(result: WorldResult) -> str:
    if not result.loss:
        return ""
    last = result.loss[-1].figures
    others = ", ".join(
        f"{escape(name.replace('_', ' '))} {number_text(value, 3)}"
        for name, value in last.items()
        if name != "loss"
    )
    ends = f" At the end: {others}." if others else ""
    return f"Loss in nats on a public test set, which no device has. Energy is what training and sending took.{ends}"


def _limits(result: WorldResult) -> str:
    crypto = {
        "real": "Signatures, key agreement and masks are the shipped ones.",
        "hashed": "Signatures and key agreement are keyed hashes that fail and cancel as the shipped ones do, but cost "
        "less; codec, masks and sums are the shipped ones.",
    }
    limits = (
        "Boards, heat, batteries, links and owners are models, fitted to published measurements (fedge sim fits shows "
        "the fits). Hours and joules of a real fleet will differ; ratios between two runs carry over better.",
        "One seed is one story. fedge sim compare runs several and shows how far they lie apart.",
        escape(crypto.get(result.crypto, result.crypto)),
        "Why-not reasons, breakers and the funnel are what the hub itself knows. Heat, energy and the strip are the "
        "simulator's own view: no hub in the field sees them.",
    )
    return '<ul class="limits">' + "".join(f"<li>{text}</li>" for text in limits) + "</ul>"


def _footer(result: WorldResult) -> str:
    size = f"--devices {result.devices} --days {result.days:g}"
    again = f"fedge sim world {result.scenario} {size} --seed {result.seed}"
    return (
        f"Again: <code>{escape(again)}</code>. {result.events:,} events, CRC {escape(result.crc)}: the same on "
        f"every run and machine. It took {result.cpu_seconds:,.1f} s of processor time"
        f"{_memory_text(result)}. The same figures are in world.json."
    )


def _memory_text(result: WorldResult) -> str:
    """Only of fleets in which what the process itself takes is little."""
    large = result.devices >= MEMORY_DEVICES_MIN and result.bytes_per_device
    return f" and {result.bytes_per_device:,.0f} bytes for each device" if large else ""


# ---------------------------------------------------------------- terminal
def print_world(result: WorldResult, folder: Path | None = None, *, console: Console | None = None) -> None:
    """Print the headline, the classes, and what else decides; `folder` says where the rest is."""
    screen = console or Console()
    screen.print()
    screen.print(headline(result), style="bold", markup=False, highlight=False)
    screen.print(_class_table(result))
    for name, text in _facts(result):
        screen.print(f"{name:<12}{text}", markup=False, highlight=False, soft_wrap=True)
    if folder is not None:
        screen.print(f"\nLook at {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
        screen.print(
            f"{folder / 'world.json'} has the figures", markup=False, highlight=False, soft_wrap=True
        )


def _class_table(result: WorldResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("devices", "took part", "rounds each", "energy each", "sent each", "hottest", "throttled"):
        table.add_column(name, justify="right")
    for name, found in result.classes.items():
        table.add_row(
            world_tables.board_labels().get(name, name),
            f"{found.devices:,}",
            percent_text(share_of(found.served, found.devices)),
            f"{found.rounds_mean:,.1f}",
            energy_text(found.energy_kj_mean),
            f"{found.upload_mb_mean:,.2f} MB",
            celsius_text(found.hottest_celsius),
            f"{found.throttled_hours:,.1f} h",
        )
    return table


def _facts(result: WorldResult) -> list[tuple[str, str]]:
    rounds = result.rounds
    worst = sorted(result.why_not_hours.items(), key=lambda item: -item[1])[:3]
    broken = len(result.violations)
    held = f"all held, {result.judged:,} judgements" if result.judged else "not watched (--check)"
    return [
        (
            "rounds",
            f"{rounds.opened:,} of {rounds.tried:,} opened; yield {percent_text(rounds.yield_)}, "
            f"drop {percent_text(rounds.drop)}, waste {percent_text(rounds.waste)}",
        ),
        ("hours", "; ".join(f"{name} {hours:,.0f} h" for name, hours in worst) or "none were looked at"),
        (
            "faults",
            ", ".join(f"{name} {count:,}" for name, count in result.faults.items() if count) or "none",
        ),
        ("invariants", f"{broken:,} BROKEN, first: {result.violations[0].text}" if broken else held),
        (
            "run",
            f"{result.events:,} events, CRC {result.crc}, {result.cpu_seconds:,.1f} s of processor time"
            f"{_memory_text(result)}",
        ),
    ]
