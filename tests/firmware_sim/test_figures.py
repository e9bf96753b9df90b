"""What is compared of two runs, and the cases of the reach study."""

import msgspec
import pytest

from fedge import formation
from fedge.messages import Facts, Ready
from firmware_sim.parts.draw import draw
from firmware_sim.scenario import Scenario
from firmware_sim.study import reach
from firmware_sim.study.conditions import study
from firmware_sim.study.figures import Reached, at_the_end, first_below, of_lawless, of_world, settled_below
from firmware_sim.study.lawless import LawlessRun
from firmware_sim.world.outcome import ClassFigures, Point, Rounds, WorldResult


def points(*losses: float, first_hour: float = 0.0) -> list[Point]:
    return [
        Point(
            hour=first_hour + place,
            energy_kj=10.0 * place,
            version=place,
            figures={"loss": loss, "rare_accuracy": 1 - loss},
        )
        for place, loss in enumerate(losses)
    ]


def test_a_lawless_run_is_dated_at_its_first_hit() -> None:
    assert first_below(points(0.9, 0.44, 0.6, 0.4), 0.45) == Reached(1.0, 10.0)
    assert first_below(points(0.9, 0.5), 0.45) is None


def test_ours_is_dated_at_the_third_of_three_whose_mean_is_below() -> None:
    assert settled_below(points(0.9, 0.44, 0.6, 0.4, 0.35, 0.3), 0.45) == Reached(4.0, 40.0)
    assert settled_below(points(0.9, 0.1), 0.45) is None
    assert settled_below(points(0.4, 0.4, 0.55), 0.45) == Reached(2.0, 20.0)


def test_the_end_of_a_run_is_the_mean_of_its_last_three_evaluations() -> None:
    assert at_the_end(points(9.0, 1.0, 2.0, 3.0), "loss") == 2.0
    assert at_the_end([], "loss") == 0.0


def board(devices: int, rounds_mean: float) -> ClassFigures:
    other = dict.fromkeys(ClassFigures.__struct_fields__, 0)
    return ClassFigures(**{**other, "devices": devices, "rounds_mean": rounds_mean})


def world_result(loss: list[Point]) -> WorldResult:
    rounds = Rounds(
        tried=9, opened=8, sat_out=1, updates_started=72, updates_finished=70, updates_opened=64, yield_=0.9
    )
    classes = {"zero2w": board(10, 2.0), "pi5": board(30, 4.0)}
    empty = dict.fromkeys(WorldResult.__struct_fields__, 0)
    known = {"classes": classes, "rounds": rounds, "loss": loss}
    return WorldResult(**{**empty, **known})


def test_a_worlds_hours_count_from_its_campaign() -> None:
    figures = of_world(world_result(points(0.9, 0.4, 0.3, 0.3, first_hour=20.0)), starts=20.0)
    assert figures.target == Reached(3.0, 30.0)
    assert figures.deep == Reached(3.0, 30.0)
    assert figures.slowest == pytest.approx(2.0 / 3.5)
    assert figures.rare == pytest.approx(1 - (0.4 + 0.3 + 0.3) / 3)
    assert figures.rounds.yield_ == 0.9


def test_a_lawless_runs_figures_have_the_same_names() -> None:
    run = LawlessRun("random", points(0.9, 0.4), ["zero2w", "pi5"], [1, 3], started=6, finished=5, tried=2)
    figures = of_lawless(run)
    assert figures.target == Reached(1.0, 10.0)
    assert figures.deep is None
    assert figures.slowest == 0.5
    assert figures.rounds.yield_ == 0.8
    assert figures.rounds.drop == pytest.approx(1 / 6)


# ---------------------------------------------------------------- reach
@pytest.mark.parametrize("case", reach.CASES, ids=lambda case: case.name)
def test_a_case_of_the_reach_study_is_a_valid_scenario_and_turns_something(case: reach.Case) -> None:
    before = study("phone", traces=False)
    made = case.scenario(before)
    assert msgspec.convert(msgspec.to_builtins(made), Scenario) == made
    assert (made != before) == (case.name not in ("as shipped", "formed by habit"))


def test_a_habit_is_the_quarter_of_the_day_in_which_a_device_is_on_most() -> None:
    made = study("phone", traces=False)
    night = msgspec.structs.replace(
        made.groups[0].presence, kind="day", from_hour=1.0, to_hour=5.0, time_zones=1
    )
    always = msgspec.structs.replace(made.groups[0].presence, kind="always")
    groups = (
        msgspec.structs.replace(made.groups[0], presence=night),
        msgspec.structs.replace(made.groups[1], presence=always),
    )
    fleet = draw(msgspec.structs.replace(made, groups=groups), 30, 1)
    found = reach.habits(fleet)
    for parts in fleet:
        expected = 0 if parts.group.presence.kind == "day" else reach.QUARTERS
        assert found[f"d{parts.number:06d}"] == expected


def test_blocs_by_habit_sort_by_it_first_and_only_inside_the_experiment() -> None:
    ready = {
        device: Ready(
            campaign="c", device=device, counter=1, prekey=bytes(32), stay_seconds=stay, facts=Facts()
        )
        for device, stay in (("a", 86_400), ("b", 60), ("c", 86_400))
    }

    def order() -> list[str]:
        return sorted(
            ready, key=lambda device: formation.sort_key(ready[device], device.encode(), bytes(32), 0)
        )

    assert order()[-1] == "b"
    with reach.formed_by_habit({"a": 1, "b": 0, "c": 1}):
        assert order()[0] == "b"
    assert order()[-1] == "b"
