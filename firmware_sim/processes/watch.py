"""What the simulator makes of the hub's ledger while a campaign runs: a bar for each bloc, a log of its rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edge_agent.stats import Figures
from firmware_sim.pages.screen import Screen
from firmware_sim.processes.result import Round
from hub.effects import LedgerEntry

_TRAINED = ("sealing", "sending", "awaiting")


@dataclass
class _Bloc:
    members: tuple[str, ...]
    opened: int = 0
    round: int = 0
    reported: set[str] = field(default_factory=set)
    state: str = "waiting"


class Watch:
    """Feeds on ledger entries, in order."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.blocs: dict[str, _Bloc] = {}
        self.log: list[Round] = []
        self.began = 0.0
        self.sat_out = 0
        self.closed = False
        self.refused: list[str] = []

    @property
    def opened(self) -> int:
        """Opened rounds of single blocs."""
        return sum(bloc.opened for bloc in self.blocs.values())

    def bloc_of(self, device: str) -> str | None:
        """The bloc that a device is in."""
        return next((name for name, bloc in self.blocs.items() if device in bloc.members), None)

    def take(self, entries: Iterable[LedgerEntry]) -> None:
        """New entries of the ledger."""
        for entry in entries:
            self.began = self.began or entry.at
            if entry.kind == "refused":
                self.refused.append(f"{entry.device}: {entry.detail.get('what', '')}")
            elif entry.kind == "formed":
                self.blocs[entry.bloc] = _Bloc(tuple(str(entry.detail["members"]).split(",")))
            elif entry.kind == "closed":
                self.closed = True
            elif entry.bloc in self.blocs:
                self._round(self.blocs[entry.bloc], entry)

    def _round(self, bloc: _Bloc, entry: LedgerEntry) -> None:
        if entry.kind == "open":
            bloc.round, bloc.reported, bloc.state = entry.round, set(), "open"
        elif entry.kind == "report":
            bloc.reported.add(entry.device)
        elif entry.kind in ("opened", "sat-out"):
            bloc.state = entry.kind
            bloc.opened += entry.kind == "opened"
            self.sat_out += entry.kind == "sat-out"
            self.log.append(_as_round(entry, entry.at - self.began))

    def show(self, screen: Screen, figures: Mapping[str, Figures]) -> None:
        """Draws a bar for each bloc."""
        for name, bloc in sorted(self.blocs.items()):
            k = len(bloc.members)
            trained = {m for m in bloc.members if figures[m].phase in _TRAINED} | bloc.reported
            done = min(bloc.opened * k + (len(bloc.reported) if bloc.state == "open" else 0), self.rounds * k)
            text = f"round {bloc.round}/{self.rounds}: invited {k}"
            if screen.live:
                text += f" · trained {len(trained):>2} · reported {len(bloc.reported):>2}"
            screen.bar(name, done, self.rounds * k, f"{text} · {bloc.state}{self._loss(name)}")

    def _loss(self, bloc: str) -> str:
        losses = [entry.training_loss for entry in self.log if entry.bloc == bloc and entry.training_loss]
        return f" · training loss {losses[-1]:.3f}" if losses and isinstance(losses[-1], float) else ""


def _as_round(entry: LedgerEntry, seconds: float) -> Round:
    def number(name: str) -> float | None:
        value = entry.detail.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    bits = number("bits")
    return Round(
        bloc=entry.bloc,
        round=entry.round,
        seconds=round(seconds, 2),
        training_loss=number("training_loss"),
        mean_norm=number("mean_norm"),
        sum_norm=number("sum_norm"),
        bits=int(bits) if bits is not None else None,
    )
