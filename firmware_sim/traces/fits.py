"""Generative models fitted to recorded fleets, with the fit shown (`fedge sim fits --traces PATH`).

What the simulated parts draw from, `firmware_sim.parts.fitted`, was printed by this module: no trace is shipped.
Presence is cleaned first: an absence too short for a hub to notice is no absence, and a session too short to connect
is none. Sessions that the recording cut off are counted as they are. Heat is T' = (idle + rise * load - T) / tau.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedge.errors import DataError
from firmware_sim import scenario
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.parts.link import KBIT_MIN, Series
from firmware_sim.parts.presence import Renewal, Sessions
from firmware_sim.traces import distributions
from firmware_sim.traces.checks import HeatRun
from firmware_sim.traces.distributions import QUANTILES, Floats, Model
from firmware_sim.traces.recorded import Traces, load
from firmware_sim.world.streams import Stream

ABSENCE_SECONDS_MIN: Final = 120.0  # keepalive of 30 s, missed one and a half times, and a reconnect
SESSION_SECONDS_MIN: Final = 30.0
RATE_SECONDS: Final = 5.0  # rates are compared over spans of this length
VALUES_MIN: Final = 10  # a fit to fewer says nothing
_TAUS: Final = np.geomspace(5.0, 300.0, 60)


@dataclass(frozen=True, slots=True)
class Fit:
    """One quantity: the model, its parameters by name, and how far it is from the data."""

    what: str
    unit: str
    values: int
    model: str
    parameters: dict[str, float]
    ks: float | None  # Kolmogorov-Smirnov distance, 0 … 1
    quantiles: tuple[tuple[float, float, float], ...] = ()  # level, data, model


@dataclass(frozen=True, slots=True)
class Fits:
    """All that `traces` allow."""

    traces: str
    fits: tuple[Fit, ...]

    def of(self, what: str) -> Fit:
        """The fit of that name; KeyError."""
        return {each.what: each for each in self.fits}[what]


def fit(traces: Traces) -> Fits:
    """Models of everything that was recorded. DataError when it is too little for any."""
    found: list[Fit] = []
    if len(traces.presences) >= VALUES_MIN:
        found += presence_fits(traces.presences)
    for source in dict.fromkeys(each.name.partition("/")[0] for each in traces.series):
        of_source = [each for each in traces.series if each.name.partition("/")[0] == source]
        if len(of_source) >= VALUES_MIN:
            found += rate_fits(source, of_source)
    if len(traces.capacities) >= VALUES_MIN:
        kbit = np.array([each.kbit for each in traces.capacities])
        found.append(_shown("capacity", "kbit/s", kbit, distributions.lognormal(kbit)))
    for board in dict.fromkeys(each.board for each in traces.heat):
        found.append(heat_fit(board, [each for each in traces.heat if each.board == board]))
    if not found:
        raise DataError(
            f"there is too little to fit: {traces.name}", hint=f"at least {VALUES_MIN} devices or series"
        )
    return Fits(traces.name, tuple(found))


def _shown(what: str, unit: str, values: Floats, model: Model) -> Fit:
    pairs = (
        (level, float(np.quantile(values, level)), distributions.quantile(model, level))
        for level in QUANTILES
    )
    if len(model) == 1:
        parameters = {"median": model[0].median, "sigma": model[0].sigma}
    else:
        parameters = {
            f"{name} {index}": value
            for index, each in enumerate(model, 1)
            for name, value in (("share", each.share), ("median", each.median), ("sigma", each.sigma))
        }
    name = "log-normal" if len(model) == 1 else "two log-normals"
    return Fit(what, unit, len(values), name, parameters, distributions.distance(model, values), tuple(pairs))


# ---------------------------------------------------------------- presence
def cleaned(sessions: Sessions) -> tuple[Floats, Floats]:
    """Lengths of sessions, and of the pauses between them, without what is too short to matter."""
    starts, ends = np.array(sessions.starts), np.array(sessions.ends)
    real = np.concatenate(([True], starts[1:] - ends[:-1] >= ABSENCE_SECONDS_MIN))
    firsts = np.flatnonzero(real)
    starts, ends = starts[firsts], ends[np.append(firsts[1:], len(ends)) - 1]
    long = ends - starts >= SESSION_SECONDS_MIN
    starts, ends = starts[long], ends[long]
    return ends - starts, starts[1:] - ends[:-1]


def presence_fits(presences: Sequence[Sessions]) -> list[Fit]:
    """Sessions and pauses as log-normals and as mixtures, and the share of time on as the world would have it."""
    lengths = [cleaned(each) for each in presences]
    found: list[Fit] = []
    for index, what in enumerate(("sessions", "pauses")):
        values = np.concatenate([each[index] for each in lengths])
        if len(values) < VALUES_MIN:
            raise DataError(f"there are too few {what} to fit", field=what, value=len(values))
        found += [_shown(what, "s", values, distributions.lognormal(values))]
        found += [_shown(f"{what}, mixture", "s", values, distributions.mixture(values))]
    share = _share_fit(presences, found[0], found[2])
    both = [(np.log(on), np.log(off)) for on, off in lengths if len(on) > 1 and len(off) > 1]
    if len(both) >= VALUES_MIN:
        _add_between(found[0], found[2], share, [on for on, _ in both], [off for _, off in both])
    return [*found, share]


def _add_between(sessions: Fit, pauses: Fit, share: Fit, on: list[Floats], off: list[Floats]) -> None:
    """How much of both variances lies between devices, and how these parts go together (noise taken out)."""
    one, other = _between(on), _between(off)
    sessions.parameters["between devices"] = one / (one + _within(on))
    pauses.parameters["between devices"] = other / (other + _within(off))
    together = float(np.cov([each.mean() for each in on], [each.mean() for each in off])[0, 1])
    if one * other > 0.0:
        share.parameters["tempo"] = max(-1.0, min(1.0, together / math.sqrt(one * other)))


def _within(groups: Sequence[Floats]) -> float:
    squares = sum(float(each.var(ddof=1)) * (len(each) - 1) for each in groups)
    return squares / sum(len(each) - 1 for each in groups)


def _between(groups: Sequence[Floats]) -> float:
    """Variance between the groups' means beyond what their sizes explain (one-way random effects, by moments)."""
    means = np.array([float(each.mean()) for each in groups])
    noise = _within(groups) * float(np.mean([1.0 / len(each) for each in groups]))
    return max(0.0, float(means.var(ddof=1)) - noise)


def _share_fit(presences: Sequence[Sessions], sessions: Fit, pauses: Fit) -> Fit:
    """Share of time on, by device: recorded, and of devices of the world's own `Renewal` with these medians."""
    data = np.array([each.share for each in presences])
    plan = scenario.Presence(
        kind="sessions",
        on_hours=sessions.parameters["median"] / HOUR,
        off_hours=pauses.parameters["median"] / HOUR,
        spread=min(3.0, sessions.parameters["sigma"]),
    )
    days = float(np.mean([each.period for each in presences])) / DAY
    model = np.array([_share_on(Renewal(plan, Stream(1, number, "fits")), days) for number in range(500)])
    grid = np.sort(np.concatenate((data, model)))
    gap = np.searchsorted(np.sort(data), grid, "right") / len(data)
    gap -= np.searchsorted(np.sort(model), grid, "right") / len(model)
    pairs = tuple((q, float(np.quantile(data, q)), float(np.quantile(model, q))) for q in QUANTILES)
    parameters = {"mean, data": float(data.mean()), "mean, model": float(model.mean())}
    return Fit("share of time on", "", len(data), "renewal", parameters, float(np.abs(gap).max()), pairs)


def _share_on(device: Renewal, days: float) -> float:
    now, on, total = 0.0, device.first(0.0), 0.0
    while now < days * DAY:
        length = min(device.next(now, on), days * DAY - now)
        total += length if on else 0.0
        now, on = now + length, not on
    return total / (days * DAY)


# ---------------------------------------------------------------- bandwidth
def rate_fits(source: str, series: Sequence[Series]) -> list[Fit]:
    """Between devices and over time at one: log-normal both, the second an AR(1) process with a memory."""
    logs = [np.log(1_000.0 * _rates(each)) for each in series]
    medians = np.array([math.exp(float(each.mean())) for each in logs])
    errors = [each - each.mean() for each in logs if len(each) > 2]
    if not errors:
        return [_shown(f"{source}, devices", "kbit/s", medians, distributions.lognormal(medians))]
    pooled = np.concatenate(errors)
    sigma = math.sqrt(float(np.sum(pooled**2)) / max(1, len(pooled) - len(errors)))
    over_time = _shown(
        f"{source}, over time", "x", np.exp(pooled), (distributions.Component(1.0, 1.0, sigma),)
    )
    over_time.parameters["hold seconds"] = _hold_seconds(errors)
    return [_shown(f"{source}, devices", "kbit/s", medians, distributions.lognormal(medians)), over_time]


def _rates(series: Series) -> Floats:
    """Mean rate over spans of RATE_SECONDS, in Mbit/s, never below what a link of the world gives."""
    count = max(1, int(series.ends[-1] // RATE_SECONDS))
    cuts = np.linspace(0.0, min(series.ends[-1], count * RATE_SECONDS), count + 1)
    passed = np.interp(cuts, series.ends, series.megabits)
    return np.asarray(np.maximum(np.diff(passed) / np.diff(cuts), KBIT_MIN / 1_000.0), dtype=np.float64)


def _hold_seconds(errors: Sequence[Floats]) -> float:
    """After how long a rate forgets itself to 1/e, from the lag-one correlation; Kendall's (1954) bias is taken out."""
    kept = sum(float(np.dot(each[1:], each[:-1])) for each in errors)
    whole = sum(float(np.dot(each, each)) for each in errors)
    length = float(np.mean([len(each) for each in errors]))
    correlation = kept / whole if whole else 0.0
    correlation = min(0.999, correlation + (1.0 + 3.0 * correlation) / length)
    return -RATE_SECONDS / math.log(correlation) if correlation > 0.0 else 0.0


# ---------------------------------------------------------------- heat
def heat_fit(board: str, runs: Sequence[HeatRun]) -> Fit:
    """Medians over the runs of one board: time constant, idle temperature, rise at full load, error."""
    found = np.array([_heat(each) for each in runs])
    tau, idle, rise, error = np.median(found, axis=0).tolist()
    parameters = {"tau seconds": tau, "idle celsius": idle, "rise kelvin": rise, "rmse kelvin": error}
    parameters |= {"rise lowest": float(found[:, 2].min()), "rise highest": float(found[:, 2].max())}
    return Fit(
        f"heat of {board}",
        "K",
        sum(len(each.seconds) for each in runs),
        f"RC, {len(runs)} runs",
        parameters,
        None,
    )


def _heat(run: HeatRun) -> tuple[float, float, float, float]:
    """(tau, idle, rise, rmse): least squares in all but tau, which is tried on a grid; rise is never below 0."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for tau in _TAUS.tolist():
        columns = _heat_columns(run, tau)
        solution = np.linalg.lstsq(columns, run.celsius, rcond=None)[0]
        error = math.sqrt(float(np.mean((columns @ solution - run.celsius) ** 2)))
        if error < best[0] and solution[1] > 0.0:
            best = (error, tau, float(solution[0]), float(solution[1]))
    return best[1], best[2], best[3], best[0]


def _heat_columns(run: HeatRun, tau: float) -> Floats:
    """Responses, at each sample, to: idling, the load so far, and how warm the board was at first."""
    keep = np.exp(-np.diff(run.seconds) / tau)
    loaded, first = np.zeros(len(run.seconds)), np.ones(len(run.seconds))
    for index, kept in enumerate(keep.tolist(), 1):
        loaded[index] = loaded[index - 1] * kept + run.load[index] * (1.0 - kept)
        first[index] = first[index - 1] * kept
    return np.column_stack((np.ones(len(run.seconds)), loaded, first))


# ---------------------------------------------------------------- for people
def table(fits: Fits) -> str:
    """Parameters and distances, a line for each fit; below each, quantiles of data and model."""
    lines = [f"fitted to {fits.traces}", ""]
    for each in fits.fits:
        ks = "" if each.ks is None else f"   KS {each.ks:.3f}"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in each.parameters.items())
        lines.append(f"{each.what} ({each.model}, {each.values:,} values){ks}")
        lines.append(f"    {figures}" + (f" [{each.unit}]" if each.unit else ""))
        if each.quantiles:
            cells = "   ".join(
                f"{level:.0%} {data:.4g} | {model:.4g}" for level, data, model in each.quantiles
            )
            lines.append(f"    data | model: {cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`fedge sim fits`: prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(
        prog="fedge sim fits", description="Fit models of devices to recorded fleets."
    )
    parser.add_argument(
        "--traces", type=Path, required=True, metavar="PATH", help="a trace file, or a folder of them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args(arguments)
    fits = fit(load(chosen.traces))
    print(json.dumps(asdict(fits)) if chosen.json else table(fits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
