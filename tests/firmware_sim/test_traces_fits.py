"""Fits: known parameters come back from drawn data, and the shipped constants are what the real traces say."""

import json
import math
from array import array
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedge.errors import DataError
from firmware_sim.parts import fitted
from firmware_sim.parts.hours import DAY, HOUR
from firmware_sim.parts.link import series_of
from firmware_sim.parts.presence import Renewal, Sessions
from firmware_sim.scenario import Presence
from firmware_sim.traces import distributions, fits
from firmware_sim.traces.checks import HeatRun
from firmware_sim.traces.recorded import Traces, load
from firmware_sim.world.streams import Stream

REAL = Path(__file__).resolve().parents[3] / "shared/data/traces"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no traces beside the checkout (../shared/data/traces)")
RANDOM = np.random.default_rng(5)


# ---------------------------------------------------------------- distributions
def test_log_normals_and_mixtures_are_recovered() -> None:
    one = distributions.lognormal(np.exp(RANDOM.normal(3.0, 0.7, 4_000)))[0]
    assert (math.log(one.median), one.sigma) == (pytest.approx(3.0, abs=0.05), pytest.approx(0.7, abs=0.03))
    both = np.exp(np.concatenate((RANDOM.normal(2.0, 0.5, 1_500), RANDOM.normal(7.0, 1.0, 3_500))))
    small, large = distributions.mixture(both)
    assert (small.share, math.log(small.median), small.sigma) == pytest.approx((0.3, 2.0, 0.5), abs=0.05)
    assert (large.share, math.log(large.median), large.sigma) == pytest.approx((0.7, 7.0, 1.0), abs=0.05)
    assert (
        distributions.distance((small, large), both)
        < 0.02
        < distributions.distance(distributions.lognormal(both), both)
    )


def test_distance_and_quantiles_are_those_of_scipy() -> None:
    values = np.exp(RANDOM.normal(1.0, 2.0, 300))
    model = (distributions.Component(1.0, 4.0, 1.5),)
    other = stats.lognorm(1.5, scale=4.0)
    assert distributions.distance(model, values) == pytest.approx(stats.kstest(values, other.cdf).statistic)
    assert distributions.quantile(model, 0.9) == pytest.approx(float(other.ppf(0.9)))
    assert model[0].mean == pytest.approx(float(other.mean()))


# ---------------------------------------------------------------- drawn data
def recorded(number: int, plan: Presence, days: float) -> Sessions:
    part = Renewal(plan, Stream(9, number))
    now, on, starts, ends = 0.0, part.first(0.0), array("d"), array("d")
    while now < days * DAY:
        length = min(part.next(now, on), days * DAY - now)
        if on:
            starts.append(now)
            ends.append(now + length)
        now, on = now + length, not on
    return Sessions(days * DAY, starts, ends)


def test_a_drawn_fleet_gives_its_own_parameters_back() -> None:
    plan = Presence(kind="sessions", on_hours=2.0, off_hours=1.0, spread=0.8)
    fleet = Traces("drawn", presences=tuple(recorded(number, plan, 20.0) for number in range(120)))
    found = fits.fit(fleet)
    sessions, pauses, share = found.of("sessions"), found.of("pauses"), found.of("share of time on")
    assert sessions.parameters["median"] == pytest.approx(2.0 * HOUR, rel=0.15)
    assert sessions.parameters["sigma"] == pytest.approx(0.8, rel=0.1)
    assert pauses.parameters["sigma"] == pytest.approx(0.8 * fitted.PAUSE_SPREAD, rel=0.1)
    assert sessions.parameters["between devices"] == pytest.approx(fitted.BETWEEN, abs=0.06)
    assert pauses.parameters["between devices"] == pytest.approx(fitted.BETWEEN, abs=0.06)
    assert share.parameters["tempo"] == pytest.approx(fitted.TEMPO, abs=0.06)
    assert sessions.ks is not None
    assert sessions.ks < 0.03
    assert share.ks is not None
    assert share.ks < 0.15


def test_short_absences_are_bridged_and_short_sessions_dropped() -> None:
    raw = Sessions(9_000.0, array("d", [0, 1_060, 2_000, 5_000]), array("d", [1_000, 1_500, 2_020, 6_000]))
    lengths, pauses = fits.cleaned(raw)
    assert (lengths.tolist(), pauses.tolist()) == ([1_500.0, 1_000.0], [3_500.0])


def test_an_ar1_rate_gives_its_memory_back() -> None:
    keep, series = math.exp(-fits.RATE_SECONDS / 40.0), []
    for number in range(120):
        state, logs, own = RANDOM.normal(), [], RANDOM.normal(0.0, 0.6)
        for _ in range(300):
            state = keep * state + math.sqrt(1 - keep**2) * RANDOM.normal()
            logs.append(own + 0.4 * state)
        times = fits.RATE_SECONDS * np.arange(300.0)
        series.append(series_of(times, 2.0 * np.exp(np.array(logs)), f"drawn/{number}"))
    found = fits.fit(Traces("drawn", series=tuple(series)))
    assert found.of("drawn, devices").parameters["median"] == pytest.approx(2_000.0, rel=0.15)
    assert found.of("drawn, devices").parameters["sigma"] == pytest.approx(0.6, rel=0.2)
    over_time = found.of("drawn, over time").parameters
    assert over_time["sigma"] == pytest.approx(0.4, rel=0.1)
    assert over_time["hold seconds"] == pytest.approx(40.0, rel=0.15)


def test_a_warming_board_gives_its_time_constant_back() -> None:
    seconds = np.cumsum(RANDOM.uniform(3.0, 12.0, 200))
    load = np.repeat(RANDOM.uniform(0.0, 1.0, 20), 10)
    celsius, now = np.empty(200), 60.0
    for index in range(200):
        step = seconds[index] - (seconds[index - 1] if index else seconds[0])
        goal = 45.0 + 20.0 * load[index]
        now = goal + (now - goal) * math.exp(-step / 50.0)
        celsius[index] = now + RANDOM.normal(0.0, 0.3)
    found = (
        fits.fit(Traces("drawn", heat=(HeatRun("b", "r", seconds, load, celsius),)))
        .of("heat of b")
        .parameters
    )
    assert found["tau seconds"] == pytest.approx(50.0, rel=0.12)
    assert found["idle celsius"] == pytest.approx(45.0, abs=0.5)
    assert found["rise kelvin"] == pytest.approx(20.0, abs=1.0)
    assert found["rmse kelvin"] == pytest.approx(0.3, rel=0.2)


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="too little"):
        fits.fit(Traces("nothing"))


# ---------------------------------------------------------------- real traces
@real
def test_the_shipped_numbers_are_what_the_traces_say() -> None:
    found = fits.fit(load(REAL))
    print(fits.table(found))
    sessions, pauses = found.of("sessions"), found.of("pauses")
    near = {"rel": 0.02}
    assert sessions.parameters["median"] / HOUR == pytest.approx(fitted.ON_HOURS, **near)
    assert pauses.parameters["median"] / HOUR == pytest.approx(fitted.OFF_HOURS, **near)
    assert sessions.parameters["sigma"] == pytest.approx(fitted.SPREAD, **near)
    assert pauses.parameters["sigma"] / sessions.parameters["sigma"] == pytest.approx(
        fitted.PAUSE_SPREAD, **near
    )
    between = (sessions.parameters["between devices"] + pauses.parameters["between devices"]) / 2
    assert between == pytest.approx(fitted.BETWEEN, rel=0.05)
    assert found.of("share of time on").parameters["tempo"] == pytest.approx(fitted.TEMPO, **near)
    assert found.of("capacity").parameters == pytest.approx(
        {"median": fitted.PHONE_KBIT, "sigma": fitted.PHONE_BETWEEN}, **near
    )
    hsdpa = found.of("hsdpa_3g, devices").parameters
    assert hsdpa == pytest.approx({"median": fitted.HSDPA_KBIT, "sigma": fitted.HSDPA_BETWEEN}, **near)
    mobile, video = found.of("hsdpa_3g, over time").parameters, found.of("oboe, over time").parameters
    assert (mobile["sigma"], mobile["hold seconds"]) == pytest.approx(
        (fitted.HSDPA_WITHIN, fitted.HSDPA_HOLD_SECONDS), **near
    )
    assert (video["sigma"], video["hold seconds"]) == pytest.approx(
        (fitted.VIDEO_WITHIN, fitted.VIDEO_HOLD_SECONDS), **near
    )
    distances = {
        what: found.of(what).ks or 0.0 for what in ("sessions", "pauses", "share of time on", "capacity")
    }
    assert distances == pytest.approx(
        {"sessions": 0.023, "pauses": 0.032, "share of time on": 0.112, "capacity": 0.078}, abs=0.002
    )


@real
def test_the_shipped_heat_is_what_the_traces_say() -> None:
    found = fits.fit(load(REAL / "sbc_thermal"))
    names = {
        "pi5": "pi5",
        "pi4": "pi4",
        "pi3": "pi3bp",
        "jetson-nano": "jetson_nano",
        "orin-nano": "orin_nano",
    }
    for ours, theirs in names.items():
        shipped, told = fitted.HEAT[ours], found.of(f"heat of {theirs}").parameters
        assert shipped.tau_seconds == pytest.approx(told["tau seconds"], rel=0.02)
        assert shipped.idle_kelvin + fitted.ROOM_CELSIUS == pytest.approx(told["idle celsius"], rel=0.01)
        assert shipped.rise_kelvin == pytest.approx(told["rise kelvin"], rel=0.02)
    first = fits.fit(
        Traces("one", heat=tuple(run for run in load(REAL / "sbc_thermal").heat if run.name == "3E85"))
    )
    told = first.of("heat of zero2w").parameters
    assert fitted.HEAT["zero2w"].rise_kelvin == pytest.approx(told["rise kelvin"], rel=0.02)
    assert fitted.HEAT["zero2w"].tau_seconds == pytest.approx(told["tau seconds"], rel=0.02)


def test_the_command_prints_a_table_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{n},{n * 7 % 90 + 10},{900 + 100 * n}\n" for n in range(1, 21))
    (tmp_path / "c.csv").write_text("id,inference_ms_per_sample,kbps\n" + rows)
    assert fits.main(["--traces", str(tmp_path)]) == 0
    assert "capacity (log-normal, 20 values)   KS 0." in capsys.readouterr().out
    assert fits.main(["--traces", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"][0]["parameters"]["median"] == pytest.approx(1_800.0, rel=0.1)
