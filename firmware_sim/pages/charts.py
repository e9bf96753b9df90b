"""The report's charts as inline SVG: no script, no network, colours from the page's style sheet.

A figure that is missing leaves a gap, one that diverged is marked as such at the edge; the other points stay as they
are. Every chart is drawn for a given width in CSS pixels, because text that is scaled down cannot be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from firmware_sim.processes.result import (
    DIVERGED,
    Figure,
    Person,
    Result,
    Round,
    change_text,
    figure_text,
    finite,
)

WIDE: Final = 820
NARROW: Final = 352
DASHES: Final = ("", "7 4", "2 4", "10 3 2 3")
_ROW: Final = 21
_TOP, _BOTTOM = 14.0, 46.0
_LABEL_GAP: Final = 14.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def numbers(values: Iterable[Figure]) -> list[float]:
    """Those of `values` that can be drawn."""
    return [number for number in map(finite, values) if number is not None]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    rough = max(high - low, 1e-6) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def loss_by_round(result: Result, width: int) -> str:
    """Training loss by round, a line for each bloc, between the held-out losses before and after."""
    loss, height = result.loss, 300 if width > 500 else 260
    before = (loss.zero_shot, loss.zero_shot_never_seen)
    after = (loss.took_part, loss.never_seen)
    drawn = numbers([*before, *after, *(entry.training_loss for entry in result.round_log)])
    if not drawn:
        return note("No loss was measured.")
    marks = ticks(min(drawn), max(drawn), 5)
    y = Scale(marks[0], marks[-1], height - _BOTTOM, _TOP)
    last = max([result.rounds, *(entry.round for entry in result.round_log)])
    x = Scale(-0.4, last + 1.4, 42, width - 52)
    parts = [_grid_lines(marks, y, width - 52), _round_labels(last, x, height)]
    for place, bloc in enumerate(blocs_of(result.round_log)):
        entries = sorted((e for e in result.round_log if e.bloc == bloc), key=lambda entry: entry.round)
        parts.append(_line(entries, x, y, DASHES[place % len(DASHES)]))
    parts.append(_held_out(before, x(0), y, side="above"))
    parts.append(_held_out(after, x(last + 1), y, side="right"))
    title = "Training loss by round for each bloc, and held-out loss before and after, in nats per token"
    return svg(width, height, title, parts)


def blocs_of(log: Sequence[Round]) -> list[str]:
    """The blocs in order of their names."""
    return sorted({entry.bloc for entry in log})


def dumbbells(groups: Sequence[tuple[str, Sequence[Person]]], width: int) -> str:
    """A row for each person, from the loss before (ring) to the loss after (dot); most gain first in each group."""
    groups = [(name, sorted(people, key=_by_gain)) for name, people in groups if people]
    drawn = numbers(
        value for _, people in groups for person in people for value in (person.before, person.after)
    )
    if not drawn:
        return note("No person's loss was measured.")
    rows = sum(len(people) + 1.6 for _, people in groups)
    height = _TOP + rows * _ROW + _BOTTOM
    marks = ticks(min(drawn), max(drawn), 6 if width > 500 else 4)
    x = Scale(marks[0], marks[-1], 84, width - 84)
    floor = height - _BOTTOM
    parts = [_vertical_grid(marks, x, floor)]
    y = _TOP
    for name, people in groups:
        parts.append(f'<text class="group" x="0" y="{y + 14:.0f}">{escape(name)}</text>')
        parts.append(f'<text class="axis end" x="{width}" y="{y + 14:.0f}">change</text>')
        y += _ROW * 1.2
        for person in people:
            parts.append(_dumbbell(person, x, y + _ROW / 2, width))
            y += _ROW
        y += _ROW * 0.4
    parts.append(centred("nats per token, lower is better", (x.start + x.end) / 2, height - 6))
    return svg(width, height, "Held-out loss of each person before and after, in nats per token", parts)


def _by_gain(person: Person) -> float:
    pair = numbers((person.before, person.after))
    return pair[1] - pair[0] if len(pair) == 2 else math.inf


def _dumbbell(person: Person, x: Scale, y: float, width: int) -> str:
    before, after = numbers([person.before]), numbers([person.after])
    parts = [f'<text class="axis" x="0" y="{y + 4:.1f}">{escape(person.id)}</text>']
    if before and after:
        worse = after[0] > before[0]
        parts.append(
            f'<line class="{"worse" if worse else "bar"}" x1="{x(before[0]):.1f}" x2="{x(after[0]):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    parts += [f'<circle class="ring" cx="{x(value):.1f}" cy="{y:.1f}" r="4"/>' for value in before]
    parts += [f'<circle class="dot" cx="{x(value):.1f}" cy="{y:.1f}" r="4.5"/>' for value in after]
    text = change_text(person.before, person.after)
    strong = " strong" if not before or not after or after[0] > before[0] else ""
    parts.append(f'<text class="axis end{strong}" x="{width}" y="{y + 4:.1f}">{text}</text>')
    where = f", bloc {person.bloc}" if person.bloc else ""
    told = f"{person.id}{where}: {figure_text(person.before)} to {figure_text(person.after)}, {person.labels} tokens"
    return f"<g><title>{escape(told)}</title>{''.join(parts)}</g>"


def _line(entries: Sequence[Round], x: Scale, y: Scale, dash: str) -> str:
    """One bloc: strokes between neighbouring rounds that were measured, a dot on each, a cross where it diverged."""
    parts: list[str] = []
    run: list[str] = []
    for entry in entries:
        found = numbers([entry.training_loss])
        if found:
            run.append(f"{x(entry.round):.1f},{y(found[0]):.1f}")
            continue
        parts.append(_stroke(run, dash))
        run = []
        if entry.training_loss == DIVERGED:
            told = f"bloc {entry.bloc}, round {entry.round}: diverged"
            parts.append(centred("×", x(entry.round), y.end + 10, kind="cross", title=told))
    parts.append(_stroke(run, dash))
    for entry in entries:
        for value in numbers([entry.training_loss]):
            told = f"bloc {entry.bloc}, round {entry.round}: {value:.3f}"
            parts.append(
                f'<circle class="point" cx="{x(entry.round):.1f}" cy="{y(value):.1f}" r="2.5">'
                f"<title>{escape(told)}</title></circle>"
            )
    return "".join(parts)


def _stroke(run: Sequence[str], dash: str) -> str:
    pattern = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="line"{pattern} points="{" ".join(run)}"/>' if len(run) > 1 else ""


def _held_out(pair: tuple[Figure, Figure], x: float, y: Scale, side: str) -> str:
    """Marks of those who took part (dot) and of those never seen (ring); labels are pushed apart."""
    found = [
        (value, kind)
        for figure_, kind in zip(pair, ("dot", "ring"), strict=True)
        for value in numbers([figure_])
    ]
    found.sort(key=lambda entry: -entry[0])
    parts: list[str] = []
    middle = [y(value) for value, _ in found]
    overlap = max(0.0, _LABEL_GAP - (middle[1] - middle[0])) / 2 if len(middle) == 2 else 0.0
    for place, (value, kind) in enumerate(found):
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y(value):.1f}" r="5"/>')
        push = -overlap if place == 0 and len(found) == 2 else overlap
        if side == "right":
            parts.append(
                f'<text class="value" x="{x + 10:.1f}" y="{y(value) + 4 + push:.1f}">{value:.3f}</text>'
            )
        else:
            above = place == 0
            parts.append(centred(f"{value:.3f}", x, y(value) + (-10 if above else 19), kind="value"))
    return "".join(parts)


def _grid_lines(marks: Sequence[float], y: Scale, right: float) -> str:
    digits = decimals(marks)
    return "".join(
        f'<line class="grid" x1="42" x2="{right:.0f}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text class="axis end" x="34" y="{y(mark) + 4:.1f}">{mark:.{digits}f}</text>'
        for mark in marks
    )


def _vertical_grid(marks: Sequence[float], x: Scale, floor: float) -> str:
    digits = decimals(marks)
    return "".join(
        f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{_TOP}" y2="{floor:.1f}"/>'
        + centred(f"{mark:.{digits}f}", x(mark), floor + 16)
        for mark in marks
    )


def _round_labels(last: int, x: Scale, height: float) -> str:
    band = (x.end - x.start) / (last + 1.8)
    every = max(1, math.ceil(22 / band))
    base = height - _BOTTOM + 18
    parts = [centred("before", x(0), base), centred("after", x(last + 1), base)]
    parts += [centred(str(number), x(number), base) for number in range(every, last + 1, every)]
    parts.append(centred("round", (x.start + x.end) / 2, base + 20))
    return "".join(parts)


def decimals(marks: Sequence[float]) -> int:
    """How many a label of these marks needs."""
    return max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))


def centred(text: str, x: float, y: float, kind: str = "axis", title: str = "") -> str:
    """A label around `x`."""
    told = f"<title>{escape(title)}</title>" if title else ""
    return f'<text class="{kind} middle" x="{x:.1f}" y="{y:.1f}">{told}{escape(text)}</text>'


def svg(width: int, height: float, title: str, parts: Sequence[str]) -> str:
    """A picture that a screen reader can name."""
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def note(text: str) -> str:
    """What stands in a chart's place when there is nothing to draw."""
    return f'<p class="quiet">{escape(text)}</p>'
