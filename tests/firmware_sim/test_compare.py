"""Runs beside each other: ratios over the same seeds, no winner where seeds disagree, and purchases as fleets."""

import json
import math
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from page_reader import Page
from rich.console import Console
from world_values import bare_result, world_result

from fedge.errors import ConfigError, DataError, NoInputError, UsageError
from firmware_sim.compare import Side, common_target, load_side, require_sides, rows_of, told_apart
from firmware_sim.pages.compare_report import compared, comparison_page, encode_comparison, print_comparison
from firmware_sim.parts.draw import draw
from firmware_sim.plan import answer, bought, parse_purchase, price, purchase_text
from firmware_sim.scenario import Scenario, load_scenario
from firmware_sim.world.outcome import Point, WorldResult, write_world


def run(seed: int, *, hours: float = 1.0, energy: float = 1.0, jain: float | None = 0.5) -> WorldResult:
    """A loss that halves every `hours`, for `energy` kJ an hour."""
    loss = [
        Point(hour=h, energy_kj=energy * h, version=h, figures={"loss": 2.0 ** (-h / hours)})
        for h in range(13)
    ]
    base = world_result(seed=seed)
    return msgspec.structs.replace(base, loss=loss, rounds=msgspec.structs.replace(base.rounds, jain=jain))


def figures(base: Side, other: Side, target: float | None = 0.25) -> dict[str, tuple[float | None, ...]]:
    return {
        row.measure.name: (row.base, row.other, row.ratio, row.lowest, row.highest)
        for row in rows_of(base, other, target)
    }


# ---------------------------------------------------------------- figures
def test_ratios_are_over_runs_of_the_same_seed() -> None:
    base = Side("a", (run(1), run(2), run(3)))
    other = Side("b", (run(3, hours=3.0), run(1, hours=2.0)))
    found = figures(base, other)
    assert found["time to loss 0.25"] == (4.0, 7.0, 1.75, 1.5, 2.0)  # the mean of three must be there
    assert found["energy to loss 0.25"][2] == 1.75


def test_one_seed_has_a_ratio_and_no_seed_in_common_has_none() -> None:
    assert figures(Side("a", (run(1),)), Side("b", (run(1, hours=2.0),)))["time to loss 0.25"][2] == 1.5
    assert figures(Side("a", (run(1),)), Side("b", (run(2),)))["time to loss 0.25"] == (
        4.0,
        4.0,
        None,
        None,
        None,
    )


def test_hours_count_from_the_start_of_the_campaign() -> None:
    late = run(1)
    late = msgspec.structs.replace(
        late, loss=[msgspec.structs.replace(p, hour=p.hour + 20) for p in late.loss]
    )
    assert figures(Side("a", (run(1),)), Side("b", (late,)))["time to loss 0.25"][:2] == (4.0, 4.0)


def test_what_was_not_measured_or_not_reached_is_missing() -> None:
    found = figures(Side("a", (run(1, jain=None),)), Side("b", (run(1, hours=100.0),)))
    assert found["fairness (Jain)"] == (None, 0.5, None, None, None)
    assert found["time to loss 0.25"][1:3] == (None, None)
    assert "loss at the end" in figures(Side("a", (bare_result(),)), Side("b", (bare_result(),)), None)


def test_seeds_without_a_ratio_leave_none() -> None:
    base = Side("a", (run(1), run(2, jain=0.0)))
    found = figures(base, Side("b", (run(1), run(2))))
    assert found["fairness (Jain)"] == (0.25, 0.5, None, None, None)
    assert found["yield of finished updates"][2:] == (1.0, 1.0, 1.0)


def test_a_difference_is_clear_when_every_seed_says_so() -> None:
    base = Side("a", (run(1), run(2)))
    rows = {
        row.measure.name: row
        for row in rows_of(base, Side("b", (run(1, hours=2.0), run(2, hours=3.0))), 0.25)
    }
    assert rows["time to loss 0.25"].is_clear
    assert not rows["time to loss 0.25"].other_is_better
    mixed = Side("b", (run(1, hours=2.0), run(2, hours=0.4)))
    assert not {row.measure.name: row for row in rows_of(base, mixed, 0.25)}["time to loss 0.25"].is_clear
    nearly = {
        row.measure.name: row
        for row in rows_of(base, Side("b", (run(1, jain=0.5004), run(2, jain=0.5004))), 0.25)
    }
    assert not nearly["fairness (Jain)"].is_clear


def test_the_common_target_is_what_every_run_passes() -> None:
    sides = [Side("a", (run(1),)), Side("b", (run(1, hours=6.0),))]
    end = sum(2.0 ** (-h / 6) for h in (10, 11, 12)) / 3
    assert common_target(sides) == pytest.approx(1.0 - 0.9 * (1.0 - end))
    assert common_target([*sides, Side("c", (bare_result(),))]) is None
    diverged = msgspec.structs.replace(
        run(1), loss=[Point(hour=0, energy_kj=0, version=0, figures={"loss": math.nan})]
    )
    assert common_target([*sides, Side("c", (diverged,))]) is None


# ---------------------------------------------------------------- words and page
def test_the_verdict_names_the_winner_of_each_figure_with_its_spread() -> None:
    base, other = Side("old", (run(1), run(2))), Side("new", (run(1, hours=0.5), run(2, hours=0.4)))
    (verdict,) = compared("?", [base, other], 0.25).verdicts
    assert verdict.answer == "new ended at a lower loss, was sooner and used less energy."
    assert "Time to loss 0.25: old 4.0 h, new 3.0 h (0.75x, 0.75x to 0.75x over 2 seeds)." in verdict.figures


def test_no_winner_where_seeds_disagree_and_a_single_seed_says_so() -> None:
    base = Side("old", (run(1), run(2)))
    (verdict,) = compared("?", [base, Side("new", (run(1, hours=2.0), run(2, hours=0.4)))], 0.25).verdicts
    assert verdict.answer == "No clear difference between old and new."
    assert all("no clear difference" in text for text in verdict.figures if "Devices" not in text)
    (single,) = compared("?", [Side("old", (run(1),)), Side("new", (run(1, hours=2.0),))], 0.25).verdicts
    assert any("one seed: its spread is not known" in text for text in single.figures)


def test_the_page_has_all_runs_in_each_chart_and_needs_no_network() -> None:
    sides = [Side("old <b>", (run(1), run(2))), Side("new", (run(1, hours=2.0),)), Side("third", (run(1),))]
    text = comparison_page(compared("Compared", sides, 0.25))
    page = Page(text)
    assert page.count("polyline", "run") == 2 * 4
    assert page.count("line", "target") == 2
    assert "old <b>" in page.text
    assert not {tag for tag, _ in page.seen} & {"b", "img", "link"}
    assert "https:" not in text


@pytest.mark.parametrize("result", [bare_result(), world_result()])
def test_any_two_runs_can_be_shown(result: WorldResult) -> None:
    sides = [Side("a", (result,)), Side("b", (bare_result(),))]
    found = compared("Compared", sides, common_target(sides))
    Page(comparison_page(found))
    screen = Console(file=StringIO(), width=120)
    print_comparison(found, Path("out"), console=screen)
    assert "Look at out/compare.html" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert json.loads(encode_comparison(found))["sides"][1]["name"] == "b"


# ---------------------------------------------------------------- folders
def test_results_are_found_in_a_folder_or_in_the_folders_in_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        (tmp_path / "buy" / f"seed-{seed}").mkdir(parents=True)
        write_world(run(seed), tmp_path / "buy" / f"seed-{seed}" / "world.json")
    side = load_side(tmp_path / "buy")
    assert (side.name, [result.seed for result in side.runs]) == ("buy", [1, 2])
    assert load_side(tmp_path / "buy" / "seed-1").runs == side.runs[:1]
    with pytest.raises(NoInputError, match=r"no world\.json"):
        load_side(tmp_path)
    other = msgspec.structs.replace(run(3), scenario="else")
    write_world(other, tmp_path / "buy" / "seed-1" / "world.json")
    with pytest.raises(DataError, match="several scenarios"):
        load_side(tmp_path / "buy")


def test_sides_are_told_apart_and_counted() -> None:
    side = Side("a", (run(1),))
    assert [each.name for each in told_apart([side, side])] == ["a (1)", "a (2)"]
    for count in (0, 1, 5):
        with pytest.raises(UsageError, match="two to 4"):
            require_sides(count)


# ---------------------------------------------------------------- purchases
def test_a_purchase_is_written_as_boards_and_numbers() -> None:
    purchase = parse_purchase(["pi5=40", "orin=2", "pi5=1"])
    assert purchase == {"pi5": 41, "orin-nano": 2}
    assert purchase_text(purchase) == "41 × Pi 5 and 2 × Jetson Orin Nano"
    assert price({"pi5": 2, "zero2w": 1}) == 175.0


@pytest.mark.parametrize(
    "word", ["pi5", "pi5=", "pi5=0", "pi5=-1", "pi5=1.5", "pi6=1", "pi=1", "=3", "pi5=9999999", "pi5=²"]
)
def test_a_wrong_purchase_is_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parse_purchase([word])


def test_the_nearest_board_is_named() -> None:
    with pytest.raises(UsageError, match=r'no such board, did you mean "pi5"\?'):
        parse_purchase(["pi6=1"])


def boards_of(scenario: Scenario) -> dict[str, int]:
    fleet = draw(scenario, scenario.devices, 0, None)
    names = [parts.board.name for parts in fleet]
    return {name: names.count(name) for name in sorted(set(names))}


def test_bought_boards_are_the_fleet_and_stand_in_the_scenarios_places() -> None:
    fleet = bought(load_scenario("city"), {"pi5": 30, "pi4": 10})
    assert fleet.devices == 40
    assert [group.name for group in fleet.groups] == ["crossings", "shops", "cabinets"]
    assert boards_of(fleet).keys() == {"pi4", "pi5"}
    assert boards_of(fleet)["pi5"] == pytest.approx(30, abs=2)
    alone = bought(load_scenario("city"), {"pi5": 40}, where="shops")
    assert [group.name for group in alone.groups] == ["shops"]


def test_bought_boards_can_stand_beside_the_fleet() -> None:
    lab = load_scenario("lab")
    fleet = bought(lab, {"orin-nano": 8}, beside=True)
    assert (fleet.devices, fleet.groups[-1].name) == (16, "bought")
    assert boards_of(fleet)["orin-nano"] == pytest.approx(8, abs=1)
    assert fleet.groups[:-1] == lab.groups
    city = bought(load_scenario("city"), {"zero2w": 60}, beside=True)
    assert boards_of(city)["zero2w"] == pytest.approx(60, abs=3)


def test_a_purchase_that_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bloc of 8 devices needs as many boards"):
        bought(load_scenario("lab"), {"pi5": 7})
    with pytest.raises(ConfigError, match=r'no such group, did you mean "shops"\?'):
        bought(load_scenario("city"), {"pi5": 40}, where="shop")


def test_the_answer_begins_with_the_price() -> None:
    purchases = [{"pi5": 40}, {"orin-nano": 20}]
    sides = [Side("40 × Pi 5", (run(1),)), Side("20 × Jetson Orin Nano", (run(1, hours=0.5),))]
    found = answer(load_scenario("lab"), purchases, sides, 0.25)
    assert found.question == "40 × Pi 5, or 20 × Jetson Orin Nano, in the place and with the campaign of lab?"
    (verdict,) = found.verdicts
    assert verdict.answer.startswith(
        "40 × Pi 5 cost less; 20 × Jetson Orin Nano ended at a lower loss, was sooner"
    )
    assert (
        verdict.figures[0]
        == "Price, boards alone: 40 × Pi 5 3,200 US$, 20 × Jetson Orin Nano 4,980 US$ (1.56x)."
    )
    assert answer(load_scenario("lab"), purchases, sides, None).target == common_target(sides)
