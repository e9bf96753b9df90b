"""What a run found out, for people: `report.html`, readable offline, and a table for the terminal.

The page is one file without scripts and without a network. It says what happened, what the hub could and could not
see, and what the figures do not show; it prints what was measured and calls a gap a gap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from fedge.io import durable
from firmware_sim import charts
from firmware_sim.evaluation import Spread, spread
from firmware_sim.result import (
    DIVERGED,
    Figure,
    Person,
    Result,
    Round,
    as_result,
    change_text,
    figure_text,
    finite,
)

_TEMPLATE: Final = "data/report.html"
_PARTS: Final = ("prepare", "quantize", "train", "evaluate", "total")


@dataclass(frozen=True, slots=True)
class Group:
    """People of one kind: their loss per token before and after, and how they differ. No spread without figures."""

    name: str
    people: tuple[Person, ...]
    before: Figure
    after: Figure
    reference: Figure
    spread: Spread | None


def groups_of(result: Result) -> tuple[Group, Group]:
    """Those who took part, and those never seen."""
    loss = result.loss
    took, rest = [
        tuple(person for person in result.people if person.took_part is flag) for flag in (True, False)
    ]
    return (
        Group("took part", took, loss.zero_shot, loss.took_part, loss.pooled_reference, _spread(took)),
        Group(
            "never seen",
            rest,
            loss.zero_shot_never_seen,
            loss.never_seen,
            loss.pooled_reference_never_seen,
            _spread(rest),
        ),
    )


def write_report(result: Result | Mapping[str, object], path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError for a result of another shape, StorageError."""
    durable.write_bytes(path, page(result if isinstance(result, Result) else as_result(result)).encode())


def page(result: Result) -> str:
    """The page as text."""
    template = Template(resources.files("firmware_sim").joinpath(_TEMPLATE).read_text("utf-8"))
    took, rest = groups_of(result)
    people = [
        (f"Took part ({len(took.people)})", took.people),
        (f"Never seen ({len(rest.people)})", rest.people),
    ]
    model, data = escape(result.model.name), escape(result.data.name)
    return template.substitute(
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
        rounds=_rounds(result.round_log),
        people_caption="From the ring (before) to the dot (after). These are the simulator's own measurements: it owns "
        "everybody's held-out messages. A hub in the field sees none of this.",
        people_wide=charts.dumbbells(people, charts.WIDE),
        people_narrow=charts.dumbbells(people, charts.NARROW),
        spread=_spread_table(result, (took, rest)),
        traffic=_meters(_traffic(result), "What travels, for each device"),
        memory=_meters(_memory(result), "Memory of the agent and its worker"),
        seen=_seen(result),
        limits="".join(f"<li>{text}</li>" for text in _limits(result)),
        time=_time(result),
        footer=_footer(result),
    )


# ------------------------------------------------------------ words
def _headline(took: Group) -> str:
    before, after = finite(took.before), finite(took.after)
    if before is None or after is None:
        return "Training diverged" if DIVERGED in (took.before, took.after) else "The loss was not measured"
    if after < before:
        return f"Held-out loss fell from {before:.2f} to {after:.2f}"
    return f"Held-out loss did not fall: {before:.2f} before, {after:.2f} after"


def _story(result: Result, took: Group, rest: Group) -> str:
    opened = f"{result.opened_blocs} such sums were opened"
    sat_out = f", and {result.sat_out} times a bloc sat out" if result.sat_out else ", and no bloc sat out"
    first = (
        f"{result.devices} devices, each with the messages of one person, fine-tuned "
        f"{escape(result.model.name)} in {result.rounds} rounds of {result.steps} steps. No message left its device. "
        f"What left was the change of a small adapter, masked, so that the hub could open nothing but the sum over a "
        f"whole bloc of {result.bloc_devices} devices. {opened}{sat_out}."
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
        _card("Upload per device and round", _size(traffic.up_per_round), "masked, the same for everyone"),
        _card(
            "Peak memory of an agent",
            _megabytes(memory.peak_rss_mb),
            f"{_megabytes(memory.peak_anon_mb)} of it its own; the rest are pages of files",
        ),
    ]
    return "".join(cards)


def _loss_card(title: str, group: Group) -> str:
    number = f'<span class="was">{figure_text(group.before)} →</span> {figure_text(group.after)}'
    if group.spread is None:
        return _card(title, number, "nats per token")
    return _card(title, number, f"lower for {group.spread.improved} of {group.spread.people} people")


def _card(title: str, number: str, note: str) -> str:
    return f'<div class="card"><dt>{title}</dt><dd class="number">{number}</dd><dd class="note">{note}</dd></div>'


def _legend(result: Result) -> str:
    blocs = charts.blocs_of(result.round_log)
    shown = blocs if len(blocs) <= len(charts.DASHES) else []
    keys = [
        (f'<line class="line" x1="1" x2="27" y1="6" y2="6" stroke-dasharray="{dash}"/>', f"bloc {bloc}")
        for bloc, dash in zip(shown, charts.DASHES, strict=False)
    ]
    if not shown and blocs:
        keys.append(('<line class="line" x1="1" x2="27" y1="6" y2="6"/>', f"each of {len(blocs)} blocs"))
    keys.append(('<circle class="dot" cx="14" cy="6" r="5"/>', "held-out, took part"))
    keys.append(('<circle class="ring" cx="14" cy="6" r="4.5"/>', "held-out, never seen"))
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
        f"For each bloc and round, one sum over all {k} members: of their updates, and of their losses, token counts and "
        "norms. The curve above is made of these.",
        "Every adapter, since it is the sum of such sums.",
    )
    could_not = (
        "A message, a token of one, or how one device's loss develops.",
        f"The update of one device: masks cancel in the sum over all {k} members and in no other sum.",
        "A bloc in which somebody was missing: it is not opened at all, and its members carry their work over.",
        "Two different groupings of the same devices, which would let it tell them apart: a device refuses another bloc.",
    )
    return (
        f'<div class="columns"><div class="known"><h3>It could see</h3>{_list(could)}</div>'
        f'<div class="unknown"><h3>It could not see</h3>{_list(could_not)}</div></div>'
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


# ------------------------------------------------------------ tables
def _rounds(log: Sequence[Round]) -> str:
    rows = [
        (
            f"<th>{escape(entry.bloc)}</th>",
            _n(str(entry.round)),
            _n(figure_text(entry.training_loss)),
            _n(figure_text(entry.mean_norm)),
            _n(figure_text(entry.sum_norm)),
            _n("" if entry.bits is None else str(entry.bits)),
            _n(_seconds(entry.seconds)),
        )
        for entry in sorted(log, key=lambda entry: (entry.bloc, entry.round))
    ]
    head = (
        "bloc",
        "round",
        "training loss",
        "mean norm of an update",
        "norm of the sum",
        "bits a word",
        "wall time",
    )
    return _table(head, rows)


def _spread_table(result: Result, groups: Sequence[Group]) -> str:
    with_reference = any(group.reference is not None for group in groups)
    head = [
        "",
        "people",
        "before",
        "after",
        "change per person",
        "standard deviation",
        "smallest drop",
        "improved",
    ]
    rows = []
    for group in groups:
        if not group.people:
            continue
        cells = [f"<th>{group.name}</th>", _n(str(len(group.people)))]
        cells += [_n(figure_text(group.before)), _n(figure_text(group.after)), *_spread_cells(group.spread)]
        rows.append(tuple([*cells, _n(figure_text(group.reference))] if with_reference else cells))
    note = ""
    if with_reference:
        head.append("pooled reference")
        note = (
            '<p class="quiet">Pooled reference: the same trainer on the same batches, all data in one place, as many '
            "sequential steps, nothing masked.</p>"
        )
    left_out = sum(len(group.people) - (group.spread.people if group.spread else 0) for group in groups)
    if left_out:
        note += f'<p class="quiet">{left_out} people without a finite figure are left out of the spread.</p>'
    return _table(head, rows) + note


def _spread_cells(found: Spread | None) -> list[str]:
    if found is None:
        return [_n("–")] * 4
    return [
        _n(change_text(found.mean, 0.0)),
        _n(f"{found.sd:.3f}"),
        _n(f"{found.smallest:.3f}".replace("-", "\N{MINUS SIGN}")),
        _n(f"{found.improved} of {found.people}"),
    ]


def _traffic(result: Result) -> list[tuple[str, float | None, str]]:
    traffic = result.bytes
    named = (
        ("up, one round", traffic.up_per_round),
        ("up, whole run", traffic.up_total_per_device),
        ("down, whole run", traffic.down_total_per_device),
        ("the bundle, once", traffic.bundle),
    )
    return [(name, value, _size(value)) for name, value in named]


def _memory(result: Result) -> list[tuple[str, float | None, str]]:
    memory = result.agent
    named = (
        ("idle, resident", memory.idle_rss_mb),
        ("training, its own (anonymous)", memory.peak_anon_mb),
        ("training, resident with file pages", memory.peak_rss_mb),
    )
    return [(name, value, _megabytes(value)) for name, value in named]


def _meters(rows: Sequence[tuple[str, float | None, str]], caption: str) -> str:
    largest = max((value for _, value, _ in rows if value), default=1.0)
    body = [
        (
            f"<th>{name}</th>",
            f'<td class="meter"><div style="width:{100 * (value or 0) / largest:.2f}%"></div></td>'
            if value
            else "<td></td>",
            _n(text),
        )
        for name, value, text in rows
    ]
    return _table((caption, "", ""), body)


def _time(result: Result) -> str:
    wall = {part: getattr(result.seconds, part) for part in _PARTS}
    others = sorted(set(result.cpu_seconds) - set(_PARTS))
    rows = [
        (f"<th>{escape(part)}</th>", _n(_seconds(wall.get(part))), _n(_seconds(result.cpu_seconds.get(part))))
        for part in (*_PARTS[:-1], *others, _PARTS[-1])
    ]
    return _table(("", "wall time", "processor time, all processes"), rows)


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    titles = "".join(f"<th{_aligned(place)}>{escape(text)}</th>" for place, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _aligned(place: int) -> str:
    return ' class="n"' if place else ""


def _n(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


# ------------------------------------------------------------ units
def _size(count: int | None) -> str:
    if count is None:
        return "not measured"
    return f"{count / 1e6:,.2f} MB" if count >= 1_000_000 else f"{count / 1e3:,.1f} KB"


def _megabytes(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f} MB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f} s" if value < 120 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def _spread(people: Sequence[Person]) -> Spread | None:
    pairs = [(finite(person.before), finite(person.after)) for person in people]
    whole = [(before, after) for before, after in pairs if before is not None and after is not None]
    return spread(whole) if whole else None
