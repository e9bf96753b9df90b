"""What a run found out, for people: `report.html`, readable offline, and a table for the terminal.

The page is one file without scripts and without a network. It says what happened, what the hub could and could not
see, and what the figures do not show; it prints what was measured and calls a gap a gap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from rich.console import Console
from rich.table import Table

from fedge.io import durable
from firmware_sim.pages import charts, tables
from firmware_sim.processes.result import DIVERGED, Result, as_result, change_text, figure_text, finite
from firmware_sim.processes.summary import Group, groups_of, megabytes_text, seconds_text, size_text


def write_report(result: Result | Mapping[str, object], path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError for a result of another shape, StorageError."""
    durable.write_bytes(path, page(result if isinstance(result, Result) else as_result(result)).encode())


def page(result: Result) -> str:
    """The page as text."""
    template = Template(part_of_page("report.html"))
    took, rest = groups_of(result)
    people = [
        (f"Took part ({len(took.people)})", took.people),
        (f"Never seen ({len(rest.people)})", rest.people),
    ]
    model, data = escape(result.model.name), escape(result.data.name)
    return template.substitute(
        style=part_of_page("page.css"),
        title=f"Fedge: {model} on {result.devices} devices",
        eyebrow=f"Fedge {escape(result.fedge)} · {model} · {data} · seed {result.seed}",
        headline=_headline(took),
        story=_story(result, took, rest),
        cards=_cards(result, took, rest),
        loss_caption="Each line is the training loss of one bloc, in nats per token, as the hub learnt it from the "
        "opened sum of each round: the members' mean, and never one member's. Before and after: held-out messages.",
        legend=_legend(result),
        loss_wide=charts.loss_by_round(result, charts.WIDE),
        loss_narrow=charts.loss_by_round(result, charts.NARROW),
        rounds=tables.rounds(result.round_log),
        people_caption="From the ring (before) to the dot (after). These are the simulator's own measurements: it owns "
        "everybody's held-out messages. A hub in the field sees none of this.",
        people_wide=charts.dumbbells(people, charts.WIDE),
        people_narrow=charts.dumbbells(people, charts.NARROW),
        spread=tables.spread((took, rest)),
        traffic=tables.traffic(result.bytes),
        memory=tables.memory(result.agent),
        seen=_seen(result),
        limits="".join(f"<li>{text}</li>" for text in _limits(result)),
        time=tables.time(result),
        footer=_footer(result),
    )


def part_of_page(name: str) -> str:
    """A template, style sheet or script of the pages."""
    return resources.files("firmware_sim").joinpath("data", name).read_text("utf-8")


# ------------------------------------------------------------ words
def _headline(took: Group) -> str:
    before, after = finite(took.before), finite(took.after)
    if before is None or after is None:
        return "Training diverged" if DIVERGED in (took.before, took.after) else "The loss was not measured"
    if after < before:
        return f"Held-out loss fell from {before:.2f} to {after:.2f}"
    return f"Held-out loss did not fall: {before:.2f} before, {after:.2f} after"


def _story(result: Result, took: Group, rest: Group) -> str:
    opened = f"It opened {result.opened_blocs} such sums"
    times = "once" if result.sat_out == 1 else f"{result.sat_out} times"
    sat_out = f"; {times} a bloc sat a round out" if result.sat_out else "; no bloc sat a round out"
    first = (
        f"{result.devices} devices, each with the messages of one person, fine-tuned "
        f"{escape(result.model.name)} in {result.rounds} rounds of {result.steps} steps. No message left its device. "
        f"What left was the change of a small adapter, masked, so that the hub could open nothing but the sum over a "
        f"whole bloc, a fixed group of {result.bloc_devices} devices. {opened}{sat_out}."
    )
    second = f"On messages that nobody trained on, {_outcome('people who took part', took)}"
    third = f"For the people who were never seen, {_outcome('', rest)}" if rest.people else ""
    return f'<p class="lede">{first}</p><p class="lede">{second} {third}</p>'


def _outcome(whom: str, group: Group) -> str:
    before, after = finite(group.before), finite(group.after)
    of = f" of {whom}" if whom else ""
    if before is None or after is None:
        return (
            f"the loss{of} {'diverged' if DIVERGED in (group.before, group.after) else 'was not measured'}."
        )
    choices = (
        f"as uncertain as among {math.exp(before):,.0f} tokens before, among {math.exp(after):,.0f} after"
    )
    return f"the loss{of} went from {before:.3f} to {after:.3f} nats per token: {choices}."


def _cards(result: Result, took: Group, rest: Group) -> str:
    traffic, memory = result.bytes, result.agent
    cards = [
        _loss_card("Loss, people who took part", took),
        _loss_card("Loss, people never seen", rest) if rest.people else "",
        _card(
            "Upload per device and round", size_text(traffic.up_per_round), "masked, the same for everyone"
        ),
        _card(
            "Peak memory of an agent",
            megabytes_text(memory.peak_rss_mb),
            f"{megabytes_text(memory.peak_anon_mb)} of its own; the rest are pages of files",
        ),
    ]
    return "".join(cards)


def _loss_card(title: str, group: Group) -> str:
    number = f'<span class="was">{figure_text(group.before)} →</span> <span>{figure_text(group.after)}</span>'
    if group.spread is None:
        return _card(title, number, "nats per token")
    return _card(title, number, f"lower for {group.spread.improved} of {group.spread.people} people")


def _card(title: str, number: str, note: str) -> str:
    return f'<div class="card"><dt>{title}</dt><dd class="number">{number}</dd><dd class="note">{note}</dd></div>'


def _legend(result: Result) -> str:
    blocs = charts.blocs_of(result.round_log)
    shown = blocs if len(blocs) <= len(charts.DASHES) else []
    keys = [
        (f'<line class="line" x1="1" x2="27" y1="6" y2="6" stroke-dasharray="{dash}"/>', bloc)
        for bloc, dash in zip(shown, charts.DASHES, strict=False)
    ]
    if not shown and blocs:
        keys.append(('<line class="line" x1="1" x2="27" y1="6" y2="6"/>', f"each of {len(blocs)} blocs"))
    keys.append(('<circle class="dot" cx="14" cy="6" r="5"/>', "held-out, took part"))
    keys.append(('<circle class="ring" cx="14" cy="6" r="4.5"/>', "held-out, never seen"))
    if any(entry.training_loss == DIVERGED for entry in result.round_log):
        keys.append(('<text class="cross middle" x="14" y="12">×</text>', "diverged"))
    return "".join(
        f'<li><svg width="28" height="12" aria-hidden="true">{mark}</svg>{escape(text)}</li>'
        for mark, text in keys
    )


def _seen(result: Result) -> str:
    k = result.bloc_devices
    could = (
        "Which devices took part, in which bloc, when each reported and how many bytes it sent.",
        "Coarse facts that a device states about itself: kind of board, free memory in steps, pace, the order of "
        "magnitude of its data.",
        f"For each bloc and round, one sum over all {k} members: of their updates, and of their losses, token counts "
        "and norms. The curve above is made of these.",
        "Every adapter, since it is the sum of such sums.",
    )
    could_not = (
        "A message, a token of one, or how one device's loss develops.",
        f"The update of one device: masks cancel in the sum over all {k} members and in no other sum.",
        "Anything of a bloc in which somebody was missing: it is not opened, and its members carry their work over.",
        "Two different groupings of the same devices, which would tell them apart: a device refuses a second bloc.",
    )
    return "".join(
        f'<div class="{kind}"><h3>{title}</h3><ul>{"".join(f"<li>{item}</li>" for item in items)}</ul></div>'
        for kind, title, items in (
            ("known", "It could see", could),
            ("unknown", "It could not see", could_not),
        )
    )


def _limits(result: Result) -> list[str]:
    labels = [person.labels for person in result.people if person.labels]
    tokens = f" ({statistics.median(labels):,.0f} in the median)" if labels else ""
    limits = [
        f"One person's figure rests on few tokens{tokens}: small differences between two people are noise.",
        f"A sum over {result.bloc_devices} people still says something about the {result.bloc_devices}, and all other "
        "members of a bloc together with the hub could work out the last one's update. No noise was added: this run "
        "makes no claim of differential privacy.",
        "Lower loss than before does not mean lower than what each person would reach by training alone for as long.",
        "All devices ran on one machine over its loopback. Bytes and memory carry over to a board; seconds do not.",
        f"Only people who wrote much are in this fleet. The data set is public ({escape(result.data.name)}), so that "
        "anyone can repeat the run.",
    ]
    return limits + [escape(note) for note in result.notes]


def _footer(result: Result) -> str:
    model = result.model
    return (
        f"Base: {escape(model.name)} ({escape(model.licence)}), SHA-256 {escape(model.sha256)}. "
        f"Data: {escape(result.data.name)} ({escape(result.data.licence)}). Broker: {escape(result.broker)}. "
        f"Fedge {escape(result.fedge)}, seed {result.seed}. The same figures are in result.json."
    )


# ------------------------------------------------------------ terminal
def print_table(result: Result, folder: Path | None = None, *, console: Console | None = None) -> None:
    """Print what was found: loss by group with its spread, and what it cost; `folder` says where the rest is."""
    screen = console or Console()
    screen.print()
    screen.print(_loss_table(groups_of(result)))
    screen.print(_cost_table(result))
    for note in result.notes:
        screen.print(f"note: {note}", markup=False, highlight=False)
    if folder is not None:
        screen.print(f"Look at {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
        where = f"{folder / 'result.json'} has the figures, {folder / 'adapter'} the adapter (PEFT)"
        screen.print(where, markup=False, highlight=False, soft_wrap=True)


def _loss_table(groups: Sequence[Group]) -> Table:
    table = Table(title="Held-out loss, nats per token", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("people", "before", "after", "change", "sd over people", "smallest drop", "lower for"):
        table.add_column(name, justify="right")
    for group in groups:
        if not group.people:
            continue
        found = group.spread
        table.add_row(
            group.name,
            str(len(group.people)),
            figure_text(group.before),
            figure_text(group.after),
            change_text(group.before, group.after),
            f"{found.sd:.3f}" if found else "–",
            f"{found.smallest:.3f}" if found else "–",
            f"{found.improved} of {found.people}" if found else "–",
        )
        if group.reference is not None:
            change = change_text(group.before, group.reference)
            table.add_row("  pooled reference", "", "", figure_text(group.reference), change)
    return table


def _cost_table(result: Result) -> Table:
    traffic, memory = result.bytes, result.agent
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    rows = (
        (
            "rounds",
            f"{result.rounds} of {result.steps} steps each; "
            f"{result.opened_blocs} sums opened, {result.sat_out} sat out",
        ),
        (
            "up, per device",
            f"{size_text(traffic.up_per_round)} a round, {size_text(traffic.up_total_per_device)} in all",
        ),
        (
            "down, per device",
            f"{size_text(traffic.down_total_per_device)} in all, "
            f"and the bundle, {size_text(traffic.bundle)} once for this machine",
        ),
        (
            "memory of an agent",
            f"{megabytes_text(memory.peak_rss_mb)} at most ({megabytes_text(memory.peak_anon_mb)} of its own), "
            f"{megabytes_text(memory.idle_rss_mb)} idle",
        ),
        (
            "time",
            f"{seconds_text(result.seconds.total)}, of it training {seconds_text(result.seconds.train)}",
        ),
    )
    for name, text in rows:
        table.add_row(name, text)
    return table
