"""Lawless schedulers, each on a tiny fleet: what makes it what it is; and how two runs are compared."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from firmware_sim.parts.draw import DeviceParts, draw
from firmware_sim.scenario import Scenario
from firmware_sim.study import lawless
from firmware_sim.study.baselines import (
    BASELINES,
    Oort,
    PowerOfChoice,
    Random,
    run_baseline,
    weighted_sample,
)
from firmware_sim.study.conditions import CONDITIONS, study
from firmware_sim.study.lawless import Lawless, LawlessRun, Update, jain
from firmware_sim.world.streams import Stream
from firmware_sim.world.tasks import Bowl, fleet_task

DEVICES = 60


def scenario(condition: str = "mains", hours: float = 3.0) -> Scenario:
    return msgspec.structs.replace(study(condition, traces=False), days=hours / 24)  # type: ignore[arg-type]


def fleet(condition: str = "mains", devices: int = DEVICES) -> list[DeviceParts]:
    return list(draw(scenario(condition), devices, 5))


def ran(name: str, condition: str = "mains", hours: float = 3.0, devices: int = DEVICES) -> LawlessRun:
    task = Bowl(devices, 5)
    return run_baseline(name, scenario(condition, hours), lambda: fleet(condition, devices), 5, task)


# ---------------------------------------------------------------- who is chosen
def test_random_asks_everybody_alike_and_nobody_twice() -> None:
    policy = Random(Stream(1, "random"))
    counts = np.zeros(40)
    for _ in range(400):
        chosen = policy.choose(range(40), 10, b"")
        assert len(set(chosen)) == len(chosen) == 10
        counts[chosen] += 1
    assert counts.min() > 70
    assert counts.max() < 130


def test_power_of_choice_takes_the_highest_losses_of_its_candidates() -> None:
    task = Bowl(DEVICES, 5)
    loss = {number: float(task.losses(number, task.first())[0]) for number in range(DEVICES)}
    everybody = PowerOfChoice(task, Stream(1, "choice"))
    everybody.CANDIDATES = DEVICES / 10  # type: ignore[misc]
    worst = sorted(loss, key=lambda number: -loss[number])[:10]
    assert everybody.choose(range(DEVICES), 10, task.first()) == worst
    few = PowerOfChoice(task, Stream(1, "choice"))
    mean = np.mean([[loss[n] for n in few.choose(range(DEVICES), 10, task.first())] for _ in range(20)])
    assert np.mean(list(loss.values())) < mean < np.mean([loss[number] for number in worst])


def told(oort: Oort, losses: Sequence[float], seconds: Sequence[float]) -> None:
    """Everybody has trained once."""
    oort.choose(range(len(losses)), len(losses), b"")
    oort.learn([Update(n, seconds[n], loss**2) for n, loss in enumerate(losses)])


def test_oort_explores_those_it_does_not_know_first() -> None:
    oort = Oort([10.0] * 20, [5.0] * 20, Stream(1, "oort"))
    assert set(oort.choose(range(20), 20, b"")) == set(range(20))
    oort.learn([Update(number, 5.0, 1.0) for number in range(10)])
    oort.EXPLORE = (1.0, 1.0, 1.0)  # type: ignore[misc]
    oort._explore = 1.0
    assert set(oort.choose(range(20), 10, b"")) == set(range(10, 20))


def test_oort_exploits_high_losses_and_leaves_slow_devices_out() -> None:
    losses = [float(number) for number in range(1, 21)]
    seconds = [10.0] * 20
    seconds[19] = 1_000.0  # the one with the highest loss takes far too long
    oort = Oort([10.0] * 20, list(seconds), Stream(1, "oort"))
    told(oort, losses, seconds)
    oort._explore, oort.EXPLORE = 0.3, (0.3, 1.0, 0.3)  # type: ignore[misc]
    chosen = oort.choose(range(20), 7, b"")
    exploited = oort._exploited
    assert len(exploited) == 4
    assert set(exploited) <= {14, 15, 16, 17, 18}  # the next best has 95 % of the cut-off's score
    assert chosen[:4] == exploited


def test_oort_prefers_longer_rounds_when_utility_stands_still() -> None:
    oort = Oort([10.0] * 20, [5.0] * 20, Stream(1, "oort"))
    for _ in range(4 * Oort.PACER_ROUNDS):
        chosen = oort.choose(range(20), 5, b"")
        oort.learn([Update(number, 5.0, 1.0) for number in chosen])
    assert oort._percentile > Oort.PERCENTILE


def test_weights_decide_how_often_an_item_is_drawn() -> None:
    stream = Stream(1, "weights")
    first = [weighted_sample([0, 1], [3.0, 1.0], 1, stream)[0] for _ in range(2_000)]
    assert first.count(0) / 2_000 == pytest.approx(0.75, abs=0.03)
    assert sorted(weighted_sample([4, 5], [1.0, 1.0], 9, stream)) == [4, 5]


# ---------------------------------------------------------------- rounds
def test_a_round_keeps_the_first_updates_and_discards_the_rest() -> None:
    run = ran("random")
    assert run.finished > 0
    assert run.rounds.updates_opened == lawless.K * run.rounds.opened
    assert run.rounds.yield_ == pytest.approx(24 / 31, abs=0.04)  # 31 asked, on mains nearly all finish
    assert run.rounds.waste is not None
    assert run.rounds.waste > 0.1
    assert run.participation("zero2w") < 0.2 < run.participation("orin-nano")


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_learns_and_replays(name: str) -> None:
    run = ran(name, hours=2.0)
    assert run.loss[-1].figures["loss"] < 0.3
    assert run == ran(name, hours=2.0)
    assert [point.hour for point in run.loss] == sorted(point.hour for point in run.loss)
    assert sum(run.served) == run.rounds.updates_opened


def test_a_server_rate_of_two_goes_twice_as_far_at_first() -> None:
    task = Bowl(DEVICES, 5)
    moved = [
        np.linalg.norm(np.frombuffer(one._adapter, "<f4"))
        for rate in (1.0, 2.0)
        for one in [Lawless(scenario(hours=0.01), fleet(), 5, task, rate)]
        if one.run("random", Random(Stream(5, "same")))
    ]
    assert moved[1] == pytest.approx(2 * moved[0], rel=1e-4)


def test_sessions_that_end_lose_work() -> None:
    mains, churn = (ran("random", condition, devices=150) for condition in ("mains", "churn"))
    assert mains.rounds.drop is not None
    assert churn.rounds.drop is not None
    assert mains.rounds.drop < 0.02 < churn.rounds.drop


def test_too_few_devices_are_waited_for() -> None:
    parts = fleet()[:10]
    run = Lawless(scenario(), parts, 5, Bowl(10, 5)).run("random", Random(Stream(5, "random")))
    assert run.loss == []
    assert run.rounds.tried == 0
    assert run.rounds.yield_ is None
    assert run.rounds.never_served == 1.0


def test_the_deadline_cuts_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lawless, "DEADLINE_SECONDS", 30.0)  # only Orins are as fast
    run = ran("random", hours=0.2)
    assert run.rounds.sat_out == run.rounds.tried > 0
    assert run.rounds.waste == 1.0
    assert run.loss[0].figures == run.loss[-1].figures


def test_a_flat_battery_keeps_a_device_out() -> None:
    device = next(parts for parts in fleet() if parts.battery.supply.kind == "battery")
    found = lawless._foreseen(device, 86_400.0, 5, 0.0)
    hour = next(h for h in range(24) if device.battery.power(device.local_hour(h * 3_600.0)) == "battery")
    found.settled = now = hour * 3_600.0
    device.battery.charge = 0.9
    assert found.allowed(now)
    device.battery.charge = 0.1
    assert not found.allowed(now)


# ---------------------------------------------------------------- the study
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("traces", [False, True])
def test_the_study_is_a_valid_scenario(condition: str, traces: bool) -> None:
    made = study(condition, traces=traces)  # type: ignore[arg-type]
    assert msgspec.convert(msgspec.to_builtins(made), Scenario) == made


def test_rare_classes_are_on_the_slow_boards_of_the_fleet() -> None:
    parts = fleet()
    task = fleet_task("mlp", parts, 5)
    assert task.samples(7) == parts[7].samples


def test_parts_of_a_run_can_be_replaced_for_another_run() -> None:
    parts = fleet()
    runs = [
        Lawless(scenario(hours=1.0), chosen, 5, Bowl(DEVICES, 5)).run("random", Random(Stream(5, "random")))
        for chosen in (parts, [replace(one, speed=100.0) for one in fleet()])
    ]
    assert runs[1].rounds.tried > 5 * runs[0].rounds.tried


def test_jain_is_one_for_equals_and_one_over_n_for_a_monopoly() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([5, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([0, 0]) == 0.0
