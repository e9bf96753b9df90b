"""The time-lapse of a fleet: dots that change with the hour, and under them the whole run as a strip, a row a device.

Everything is drawn here as SVG and stands still without a script; `data/world.js` moves it. Devices of a bloc stand in
a ring and in neighbouring rows, so that a round is seen as what it is: a whole bloc at work, or none of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Final

import msgspec

from fedge import limits
from firmware_sim.world.outcome import Strip

STATES: Final = {
    "t": "training",
    "h": "training, throttled by heat",
    "l": "loading",
    "s": "sealing or sending",
    "a": "awaiting the result",
    "w": "ready, waiting",
    "i": "on, not ready",
    "n": "not allowed by owner or board",
    "x": "gone for good",
    ".": "off",
}
WORK: Final = "thlsa"  # letters of a device in a round
CLASSES: Final = {letter: f"s-{'off' if letter == '.' else letter}" for letter in STATES}
_GAP: Final = 0.7  # rows between two groups


@dataclass(frozen=True, slots=True)
class Cluster:
    """Devices that stand together, by their place in the strip: a bloc, those in none, or a class of boards."""

    name: str
    members: tuple[int, ...]
    is_bloc: bool


def clusters(strip: Strip, labels: dict[str, str]) -> list[Cluster]:
    """Whole blocs where the strip shows them, else classes of boards; `labels` are the boards' names for people."""
    groups: dict[str, list[int]] = {}
    if _shows_blocs(strip):
        for place, bloc in enumerate(strip.blocs):
            groups.setdefault(bloc, []).append(place)
        outside = groups.pop("", [])
        ordered = sorted(groups.items(), key=lambda item: _natural(item[0]))
        found = [
            Cluster(f"bloc {name}", tuple(members), True) for name, members in ordered if _is_whole(members)
        ]
        parts = [place for _, members in ordered if not _is_whole(members) for place in members]
        rest = (("in other blocs", parts), ("in no bloc", outside))
        return [*found, *(Cluster(name, tuple(members), False) for name, members in rest if members)]
    for place, board in enumerate(strip.boards):
        groups.setdefault(board, []).append(place)
    return [Cluster(labels.get(name, name), tuple(members), False) for name, members in groups.items()]


def _shows_blocs(strip: Strip) -> bool:
    """A few members of many blocs would be dots without a pattern."""
    sizes = Counter(bloc for bloc in strip.blocs if bloc)
    whole = sum(count for count in sizes.values() if count >= limits.BLOC_DEVICES_MIN)
    return bool(sizes) and whole * 2 >= sum(sizes.values())


def _is_whole(members: Sequence[int]) -> bool:
    """Enough of a bloc is shown to draw it as one."""
    return len(members) >= limits.BLOC_DEVICES_MIN


def _natural(name: str) -> tuple[int, str]:
    """b2 before b10."""
    return len(name), name


def busiest(strip: Strip) -> int:
    """The column with most devices at work: where the still picture stands."""
    columns = len(strip.opened)
    work = [sum(row[column] in WORK for row in strip.rows) for column in range(columns)]
    return max(range(columns), key=work.__getitem__)


def figure(strip: Strip, labels: dict[str, str]) -> str:
    """The whole figure: dots, controls, legend, strip and the data for the script. Empty for an empty strip."""
    if not strip.rows or not strip.opened:
        return ""
    found = clusters(strip, labels)
    at = busiest(strip)
    return (
        f'<figure class="lapse" id="lapse"><div class="sky">{"".join(_dots(c, strip, at) for c in found)}</div>'
        f"{_controls(len(strip.opened), at)}{_legend(strip, at)}"
        f'<div class="strip" id="strip">{_opened(strip.opened)}{_cells(found, strip)}'
        f'<div class="playhead" id="playhead" style="left:{100 * (at + 0.5) / len(strip.opened):.2f}%"></div></div>'
        f"{_hours(strip)}{_data(found, strip, labels, at)}</figure>"
    )


def when_text(seconds: float) -> str:
    """A moment of a world, which begins at midnight: day 2, 03:20."""
    minutes = round(seconds / 60)
    return f"day {minutes // 1_440 + 1}, {minutes // 60 % 24:02d}:{minutes % 60:02d}"


# ---------------------------------------------------------------- the dots
def _dots(cluster: Cluster, strip: Strip, at: int) -> str:
    places = _ring(len(cluster.members)) if cluster.is_bloc else _square(len(cluster.members))
    width = max(x for x, _ in places) + 1
    height = max(y for _, y in places) + 1
    scale = _dot_pixels(len(strip.rows))
    circles = "".join(
        f'<circle class="{CLASSES[strip.rows[member][at]]}" data-n="{member}" cx="{x:.2f}" cy="{y:.2f}" r=".78"/>'
        for member, (x, y) in zip(cluster.members, places, strict=True)
    )
    name = escape(cluster.name)
    caption = "" if cluster.is_bloc else f"<span>{name} ({len(cluster.members)})</span>"
    return (
        f'<div class="cluster"><svg width="{width * scale:.0f}" height="{height * scale:.0f}" role="img" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" aria-label="{name}"><title>{name}</title>{circles}'
        f"</svg>{caption}</div>"
    )


def _dot_pixels(devices: int) -> float:
    """Radius of a dot, so that any fleet fills about the same room."""
    return max(4.5, min(12.0, 72 / math.sqrt(devices)))


def _ring(count: int) -> list[tuple[float, float]]:
    """`count` neighbouring dots on a circle, the first on top, in radii of a dot."""
    radius = 1.08 / math.sin(math.pi / max(count, 3))
    turn = [math.tau * index / count - math.pi / 2 for index in range(count)]
    return [(radius + 1 + radius * math.cos(angle), radius + 1 + radius * math.sin(angle)) for angle in turn]


def _square(count: int) -> list[tuple[float, float]]:
    """`count` dots in rows, wider than high."""
    width = math.ceil(math.sqrt(2.2 * count))
    return [(1 + 2 * (index % width), 1 + 2 * (index // width)) for index in range(count)]


# ---------------------------------------------------------------- the strip
def _cells(found: Sequence[Cluster], strip: Strip) -> str:
    """One path for each state: a stroke for each span in which a device stays in it."""
    paths: dict[str, list[str]] = {letter: [] for letter in STATES if letter != "."}
    for place, top in _tops(found):
        column = 0
        for letter, run in groupby(strip.rows[place]):
            length = len(list(run))
            if letter in paths:
                paths[letter].append(f"M{column} {top + 0.5:g}h{length}")
            column += length
    drawn = "".join(f'<path class="{CLASSES[k]}" d="{"".join(d)}"/>' for k, d in paths.items() if d)
    rows = _height(found)
    pixels = min(460.0, max(96.0, 9 * rows), 16 * rows)
    told = (
        f"Every shown device's state over time: a row for each of {len(strip.rows)}, time from left to right"
    )
    return (
        f'<svg class="cells" viewBox="0 0 {len(strip.opened)} {rows:g}" preserveAspectRatio="none" '
        f'style="height:{pixels:.0f}px" role="img" aria-label="{told}">{drawn}</svg>'
    )


def _tops(found: Sequence[Cluster]) -> list[tuple[int, float]]:
    """The strip's rows from above: which device, and where."""
    tops, y = [], 0.0
    for cluster in found:
        for member in cluster.members:
            tops.append((member, round(y, 2)))
            y += 1
        y += _GAP
    return tops


def _height(found: Sequence[Cluster]) -> float:
    return round(sum(len(cluster.members) + _GAP for cluster in found) - _GAP, 2)


def _opened(opened: Sequence[int]) -> str:
    """Bars above the strip: sums opened."""
    most = max(max(opened), 1)
    path = "".join(f"M{column} {most}v-{count}h1v{count}z" for column, count in enumerate(opened) if count)
    told = f"Sums opened over time, {sum(opened):,} in all, at most {most} in one span"
    return (
        f'<svg class="opened" viewBox="0 0 {len(opened)} {most}" preserveAspectRatio="none" role="img" '
        f'aria-label="{told}"><path d="{path}"/></svg>'
    )


def _hours(strip: Strip) -> str:
    total = strip.seconds * len(strip.opened) / 3_600
    step = next((hours for hours in (1, 2, 3, 6, 12, 24, 48, 168, 720) if total / hours <= 9), 8_760)
    marks = []
    for hour in range(0, math.floor(total) + 1, step):
        text = f"day {hour // 24 + 1}" if hour % 24 == 0 else f"{hour % 24:02d}:00"
        kind = ' class="day"' if hour % 24 == 0 else ""
        marks.append(f'<span{kind} style="left:{100 * hour / total:.2f}%">{text}</span>')
    return f'<div class="hours" aria-hidden="true">{"".join(marks)}</div>'


# ---------------------------------------------------------------- what is around them
def _controls(columns: int, at: int) -> str:
    return (
        '<div class="controls" id="controls" hidden>'
        '<button type="button" id="play" aria-label="Play the time-lapse">▶</button>'
        f'<input type="range" id="scrub" min="0" max="{columns - 1}" value="{at}" aria-label="Moment of the run">'
        '<output id="clock" for="scrub"></output></div>'
    )


def _legend(strip: Strip, at: int) -> str:
    """A button for each state that occurs, with how many devices are in it at the moment."""
    there = set("".join(strip.rows))
    now = Counter(row[at] for row in strip.rows)
    buttons = "".join(
        f'<li><button type="button" data-state="{letter}" aria-pressed="false" disabled>'
        f'<i class="{CLASSES[letter]}"></i>{escape(text)} <b>{now[letter]}</b></button></li>'
        for letter, text in STATES.items()
        if letter in there
    )
    return (
        f'<p class="quiet moment"><span id="moment">{when_text(at * strip.seconds)}</span></p>'
        f'<ul class="states" aria-label="States, with how many devices are in each now">{buttons}</ul>'
    )


def _data(found: Sequence[Cluster], strip: Strip, labels: dict[str, str], at: int) -> str:
    names = {member: cluster.name for cluster in found if cluster.is_bloc for member in cluster.members}
    about = [
        " · ".join(filter(None, (device, labels.get(board, board), names.get(place, ""))))
        for place, (device, board) in enumerate(zip(strip.devices, strip.boards, strict=True))
    ]
    values = {
        "seconds": strip.seconds,
        "at": at,
        "rows": ["".join(f"{k}{len(list(run))}" for k, run in groupby(row)) for row in strip.rows],
        "about": about,
        "tops": _tops(found),
        "height": _height(found),
        "opened": strip.opened,
        "states": STATES,
        "classes": CLASSES,
    }
    text = msgspec.json.encode(values).decode().replace("<", "\\u003c")
    return f'<script type="application/json" id="lapse-data">{text}</script>'
