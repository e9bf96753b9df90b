"""Lines of one or several runs over hours or energy, as inline SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from firmware_sim.pages.charts import Scale, centred, decimals, note, svg, ticks

WIDTH: Final = 404
HEIGHT: Final = 250
COLOURS: Final = 4  # as many as can be told apart
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 14.0, 14.0, 40.0
_SPOTS_MAX: Final = 60  # of a line: more could not be pointed at
_POINTS_MAX: Final = 400


@dataclass(frozen=True, slots=True)
class Line:
    """A run's figure: (x, y) with rising x. A y that is not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


def lines(runs: Sequence[Line], x_title: str, y_title: str, target: float | None = None) -> str:
    """All runs in one chart; `target` is a dotted line across."""
    finite = [(x, y) for run in runs for x, y in run.points if math.isfinite(y)]
    if not finite:
        return note(f"No {y_title.lower()} was measured.")
    values = [y for _, y in finite] + ([] if target is None else [target])
    y_marks = ticks(min(values), max(values), 5)
    x_marks = ticks(min(x for x, _ in finite), max(max(x for x, _ in finite), 1e-3), 5)
    x = Scale(x_marks[0], x_marks[-1], _LEFT, WIDTH - _RIGHT)
    y = Scale(y_marks[0], y_marks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_marks, y_marks, x, y), centred(x_title, (x.start + x.end) / 2, HEIGHT - 4)]
    if target is not None:
        parts.append(
            f'<line class="target" x1="{x.start}" x2="{x.end}" y1="{y(target):.1f}" y2="{y(target):.1f}"/>'
        )
    parts += [_run(run, x, y, x_title) for run in runs]
    named = f" of {len(runs)} runs" if len(runs) > 1 else ""
    return svg(WIDTH, HEIGHT, f"{y_title} over {x_title}{named}", parts)


def _run(run: Line, x: Scale, y: Scale, x_title: str) -> str:
    points = _thinned(run.points, _POINTS_MAX)
    strokes: list[list[str]] = [[]]
    for at, value in points:
        if math.isfinite(value):
            strokes[-1].append(f"{x(at):.1f},{y(value):.1f}")
        elif strokes[-1]:
            strokes.append([])
    drawn = [f'<polyline class="run" points="{" ".join(stroke)}"/>' for stroke in strokes if len(stroke) > 1]
    spots = [
        f'<circle class="reach" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4">'
        f"<title>{escape(run.name)}: {value:.3f} at {at:,.1f} {escape(x_title)}</title></circle>"
        for at, value in _thinned(points, _SPOTS_MAX)
        if math.isfinite(value)
    ]
    ends = [(at, value) for at, value in points if math.isfinite(value)]
    if ends:
        at, value = ends[-1]
        spots.append(f'<circle class="spot" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3.5"/>')
    return f'<g class="r{run.colour}">{"".join(drawn + spots)}</g>'


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about `most` of them, evenly, the last among them."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    return kept if not points or (len(points) - 1) % step == 0 else [*kept, points[-1]]


def _frame(x_marks: Sequence[float], y_marks: Sequence[float], x: Scale, y: Scale) -> str:
    parts = [
        f'<line class="grid" x1="{x.start:.0f}" x2="{x.end:.0f}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        f'<text class="axis end" x="{x.start - 7:.0f}" y="{y(mark) + 4:.1f}">{mark:,.{decimals(y_marks)}f}</text>'
        for mark in y_marks
    ]
    parts += [centred(f"{mark:,.{decimals(x_marks)}f}", x(mark), y.start + 18) for mark in x_marks]
    return "".join(parts)
