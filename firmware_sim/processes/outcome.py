"""From the parts of a finished run to its result: nothing is computed here that a person could not recompute."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edge_agent.stats import Figures
from fedge import __version__
from fedge.io import assets
from fedge.release import WEIGHTS, Manifest
from firmware_sim.processes.evaluation import PersonLoss, pooled
from firmware_sim.processes.result import Result, as_result
from firmware_sim.processes.watch import Watch

Losses = Mapping[str, PersonLoss]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the stages of a run left. `part`: who took part; `reference`: losses under the pooled reference, if run."""

    manifest: Manifest
    watch: Watch
    figures: Sequence[Figures]
    part: Collection[str]
    before: Losses
    after: Losses
    reference: Losses | None
    seconds: Mapping[str, float]
    broker: str
    restarts: int


def result_of(parts: Parts, settings: Mapping[str, int]) -> Result:
    """The whole result. `settings` has seed, devices, bloc_devices, rounds and steps."""
    manifest, watch = parts.manifest, parts.watch
    model = {
        "name": manifest.model,
        "sha256": manifest.source_sha256,
        "licence": manifest.licence,
        "bytes": manifest.files[WEIGHTS].size,
    }
    again = f"{parts.restarts} processes died and were started again"
    return as_result(
        {
            "fedge": __version__,
            **settings,
            "model": model,
            "data": {"name": "BYU chit-chat", "licence": assets.find("data", "chitchat").licence},
            "opened_blocs": watch.opened,
            "sat_out": watch.sat_out,
            "loss": _losses(parts),
            "people": [_person(name, parts) for name in parts.after],
            "round_log": [msgspec.to_builtins(entry) for entry in watch.log],
            "agent": _memory(parts.figures),
            "bytes": _traffic(parts),
            "seconds": {part: round(value, 1) for part, value in parts.seconds.items()},
            "cpu_seconds": _cpu_seconds(),
            "broker": parts.broker,
            "notes": [again] if parts.restarts else [],
        }
    )


def _losses(parts: Parts) -> dict[str, float | None]:
    def of(losses: Losses | None, took_part: bool) -> float | None:
        if losses is None:
            return None
        return pooled(loss for name, loss in losses.items() if (name in parts.part) is took_part)

    return {
        "zero_shot": of(parts.before, True),
        "took_part": of(parts.after, True),
        "zero_shot_never_seen": of(parts.before, False),
        "never_seen": of(parts.after, False),
        "pooled_reference": of(parts.reference, True),
        "pooled_reference_never_seen": of(parts.reference, False),
    }


def _person(name: str, parts: Parts) -> dict[str, object]:
    return {
        "id": name,
        "took_part": name in parts.part,
        "bloc": parts.watch.bloc_of(name),
        "before": parts.before[name].per_token,
        "after": parts.after[name].per_token,
        "labels": parts.after[name].labels,
    }


def _memory(figures: Sequence[Figures]) -> dict[str, float]:
    return {
        "peak_rss_mb": max(figure.peak_rss_mb for figure in figures),
        "peak_anon_mb": max(figure.peak_anonymous_mb for figure in figures),
        "idle_rss_mb": max(figure.idle_rss_mb for figure in figures),
    }


def _traffic(parts: Parts) -> dict[str, int]:
    """Medians over devices; a round's upload also over rounds, so that the first one's wider words do not count."""
    figures = parts.figures
    return {
        "up_per_round": int(statistics.median(n for figure in figures for n in figure.round_up_bytes)),
        "up_total_per_device": int(statistics.median(figure.mqtt_up_bytes for figure in figures)),
        "down_total_per_device": int(
            statistics.median(figure.mqtt_down_bytes + figure.https_down_bytes for figure in figures)
        ),
        "bundle": sum(entry.size for entry in parts.manifest.files.values()),
    }


def _cpu_seconds() -> dict[str, float]:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "simulator": round(own.ru_utime + own.ru_stime, 1),
        "hub, agents and workers": round(children.ru_utime + children.ru_stime, 1),
    }
