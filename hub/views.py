"""`fedge hub devices` and `fedge hub blocs`: the hub's standing as tables, worst breakers first.

Another process asks by leaving a file in the hub's folder; the running hub answers within half a second by writing
`standing.json` whole, at most once in 30 seconds. So nothing is written while nobody reads.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from fedge.errors import IntegrityError, NoInputError
from fedge.io.durable import write_bytes
from hub.standing import BlocStanding, CampaignStanding, DeviceStanding, Standing

FILE: Final = "standing.json"
_ASKED: Final = "standing.asked"
WRITTEN_SECONDS: Final = 30.0  # a standing younger than this is an answer
_ANSWER_SECONDS: Final = 10.0  # a hub of 100,000 devices takes some two to write it
_POLL_SECONDS: Final = 0.1


class StandingFile:
    """The hub's side: call `answer` now and then."""

    def __init__(self, home: Path, make: Callable[[], Standing]) -> None:
        self._home, self._make = home, make
        self._written_at = 0.0

    def answer(self, now: float) -> None:
        """Writes the standing when somebody asked and the last one is old. Raises StorageError."""
        asked = self._home / _ASKED
        if not asked.exists() or 0 <= now - self._written_at < WRITTEN_SECONDS:
            return
        self._written_at = now
        write_bytes(self._home / FILE, msgspec.json.encode(self._make()))
        asked.unlink(missing_ok=True)


def read_standing(home: Path, *, running: bool) -> Standing:
    """The newest standing; asks a running hub for one. NoInputError when there has never been one."""
    path, since = home / FILE, time.time()
    if running and _written(path) < since - WRITTEN_SECONDS:
        write_bytes(home / _ASKED, b"")
        while _written(path) < since - WRITTEN_SECONDS and time.time() < since + _ANSWER_SECONDS:
            time.sleep(_POLL_SECONDS)
    if not path.exists():
        raise NoInputError(
            "this hub has not told how its devices stand yet", hint="Start it, and ask again: fedge hub up"
        )
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Standing)
    except msgspec.MsgspecError as error:
        raise IntegrityError("the standing cannot be read", field="path", value=str(path)) from error
    age = since - found.at
    if age > WRITTEN_SECONDS + _ANSWER_SECONDS:
        state = "busy" if running else "not running"
        print(f"the hub is {state}: this is how it stood {_duration(age)} ago", file=sys.stderr)
    return found


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


# ---------------------------------------------------------------- tables
def show_devices(found: Standing, *, campaign: str, most: int) -> None:
    """A row for each device: why it is not working, and how long its bloc waited for it."""
    rows = [one for one in found.devices if campaign in ("", one.campaign)]
    columns = ("device", "campaign", "bloc", "why", "board", "blocked", "failed")
    _table(f"{len(rows)} devices", columns, [_device_row(one) for one in rows], most)
    _counts("why", (one.why.split(" d", 1)[0] for one in rows))


def show_blocs(found: Standing, *, campaign: str, most: int) -> None:
    """The fleet's figures, then a row for each bloc and who holds it up."""
    for one in found.campaigns:
        if campaign in ("", one.id):
            print(_campaign_line(one))
    rows = [one for one in found.blocs if campaign in ("", one.campaign)]
    columns = (
        "bloc",
        "campaign",
        "state",
        "here",
        "opened/tried",
        "last opened",
        "share",
        "breaker",
        "blocked",
    )
    _table(f"{len(rows)} blocs", columns, [_bloc_row(one, found.at) for one in rows], most)


def _device_row(one: DeviceStanding) -> Sequence[str]:
    blocked = _duration(one.blocked_seconds) if one.blocked_seconds >= 1 else ""
    return one.id, one.campaign, one.bloc, one.why, one.board, blocked, str(one.failed or "")


def _bloc_row(one: BlocStanding, now: float) -> Sequence[str]:
    here = f"{one.reported}/{one.devices} in" if one.state == "working" else f"{one.ready}/{one.devices}"
    opened_at = f"{_duration(now - one.opened_at)} ago" if one.opened_at else "never"
    blocked = _duration(3_600 * one.blocked_hours) if one.breaker else ""
    tried = f"{one.opened}/{one.tried}"
    return one.id, one.campaign, one.state, here, tried, opened_at, f"{one.share:.1%}", one.breaker, blocked


def _campaign_line(one: CampaignStanding) -> str:
    state = "closed" if one.closed else "STARVING" if one.starving else "running"
    never = ", ".join(f"{board} {share:.0%}" for board, share in one.never_served.items() if share)
    return (
        f"{one.id}: {state}, {one.live}/{one.blocs - one.done} blocs live, {one.training} devices train, "
        f"{one.versions} versions, yield {one.yielded:.1%}, staleness {one.staleness:.1f}"
        + (f"; never served: {never}" if never else "")
        + (f"; {one.waiting_for_a_bloc} wait for a bloc" if one.waiting_for_a_bloc else "")
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows[:most]:
        table.add_row(*row)
    # Piped into a file or a program, nothing is cut at the width of a terminal that is not there.
    console = Console(highlight=False, width=None if os.isatty(1) else 160)
    console.print(table)
    if len(rows) > most:
        console.print(f"the first {most} of {title}; --top shows more, --json all")


def _counts(title: str, words: Iterable[str]) -> None:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda one: -one[1]))
    if told:
        print(f"{title}: {told}")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
