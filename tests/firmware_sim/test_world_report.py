"""A world's page: complete, offline, well-formed, honest about what did not happen; its JSON; the terminal's table."""

import json
import math
import re
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from page_reader import Page
from rich.console import Console
from world_values import bare_result, violation, world_result

from fedge.errors import DataError, NoInputError
from firmware_sim.pages import timelapse, world_charts
from firmware_sim.pages.timelapse import CLASSES, STATES, clusters, when_text
from firmware_sim.pages.world_charts import Line
from firmware_sim.pages.world_report import print_world, world_page, write_world_report
from firmware_sim.pages.world_words import celsius_text, energy_text, headline, hours_text, percent_text
from firmware_sim.world.outcome import (
    Point,
    Strip,
    WorldResult,
    decode_world,
    encode_world,
    read_world,
    write_world,
)

LABELS = {"pi5": "Pi 5"}


def changed(**fields: object) -> WorldResult:
    return msgspec.structs.replace(world_result(), **fields)


def read(result: WorldResult) -> Page:
    return Page(world_page(result))


def lapse_data(page: Page) -> dict[str, object]:
    (text,) = (text for text in page.scripts if text.startswith("{"))
    return dict(json.loads(text))


# ---------------------------------------------------------------- what is told
def test_the_page_tells_every_part_of_a_run() -> None:
    result = world_result()
    page = read(changed(judged=1_234))
    assert headline(result) in page.text
    for told in (
        "96 devices lived through 48 h", "12 blocs came from 3 formations", "451 sums opened", "96.5 %",
        "Pi Zero 2 W", "Jetson Orin Nano", "served once", "its bloc waits for a member", "1,020 h", "d000000",
        "power-cut", "bad-signature", "CRC 9f3a12c4", "fedge sim world phones --devices 96 --days 2 --seed 0",
        "No violation in 1,234 judgements",
    ):  # fmt: skip
        assert told in page.text, told


def test_a_headline_says_what_happened() -> None:
    assert headline(world_result()) == "90 of 96 devices took part; loss 2.28 → 0.55 in 48 h for 271 Wh"
    assert headline(bare_result()) == "No sum was opened: 0 of 1 device took part"
    assert headline(changed(loss=[])).endswith("; the loss was not measured")
    rising = [Point(hour=h, energy_kj=h, version=h, figures={"loss": 1.0 + h}) for h in range(3)]
    assert "loss did not fall: 1.00 → 3.00 in 2.0 h" in headline(changed(loss=rising))
    gone = [*rising, Point(hour=4, energy_kj=4, version=4, figures={"loss": math.nan})]
    assert headline(changed(loss=gone)).endswith("; training diverged")


def test_violations_are_shown_and_their_absence_is_said() -> None:
    page = read(changed(violations=[violation()]))
    assert "1 violation" in page.text
    assert "no update counted twice at event 40,321, day 2, 01:01: d000003 twice in b1 <7>" in page.text
    assert "1 broken" in page.text
    assert "No invariant was watched in this run" in read(world_result()).text


def test_a_note_of_the_run_stands_on_top() -> None:
    assert (
        "The run ended early, at day 1, 03:00"
        in read(changed(notes=["The run ended early, at day 1, 03:00."])).text
    )


def test_a_run_in_which_nothing_happened_has_a_whole_page() -> None:
    page = read(bare_result())
    for told in ("No sum was opened", "No loss was measured", "No time-lapse", "No fault struck", "Nothing was refused",
                 "No bloc had to wait", "not measured"):  # fmt: skip
        assert told in page.text, told
    assert "nan" not in page.text.lower().replace("orin nano", "").split()


@pytest.mark.parametrize("devices", [1, 8, 300, 5_000])
def test_fleets_of_any_size_have_a_page(devices: int) -> None:
    page = read(world_result(devices, shown=120))
    assert page.count("svg", "cells") == 1


# ---------------------------------------------------------------- safe, offline, for everyone
def test_the_page_loads_nothing_from_anywhere() -> None:
    text = world_page(world_result())
    page = Page(text)
    assert not {tag for tag, _ in page.seen} & {"link", "img", "iframe", "object"}
    assert not [
        attrs for _, attrs in page.seen if {"src", "href", "srcset", "onclick", "onload"} & set(attrs)
    ]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp|eval\(|innerHTML", text)


def test_names_from_outside_cannot_become_markup_or_script() -> None:
    attack = '"></script><script>alert(1)</script>$title'
    result = world_result()
    assert result.strip is not None
    strip = msgspec.structs.replace(result.strip, devices=[attack] * 96, blocs=[attack] * 96)
    page = read(
        changed(about=attack, scenario=attack, strip=strip, why_not_hours={attack: 1.0}, faults={attack: 1})
    )
    assert [tag for tag, _ in page.seen].count("script") == 2
    assert attack in page.text
    assert lapse_data(page)["about"][0].startswith(attack)  # type: ignore[index]


def test_controls_have_names_and_wait_for_the_script() -> None:
    page = read(world_result())
    buttons = [attrs for tag, attrs in page.seen if tag == "button"]
    assert any(attrs.get("aria-label") == "Play the time-lapse" for attrs in buttons)
    assert all("disabled" in attrs for attrs in buttons if "data-state" in attrs)
    assert all(attrs.get("aria-label") for tag, attrs in page.seen if tag in ("svg", "input"))
    assert [attrs for tag, attrs in page.seen if attrs.get("id") == "controls" and "hidden" in attrs]


# ---------------------------------------------------------------- the time-lapse
def strip(rows: list[str], blocs: list[str], opened: list[int] | None = None) -> Strip:
    return Strip(
        seconds=600.0,
        devices=[f"d{place:06d}" for place in range(len(rows))],
        boards=["pi5"] * len(rows),
        rows=rows,
        opened=opened if opened is not None else [0] * len(rows[0]),
        blocs=blocs,
    )


def test_blocs_that_are_shown_whole_stand_in_rings() -> None:
    found = clusters(strip(["w"] * 19, ["b10"] * 8 + ["b2"] * 8 + ["", "b3", "b4"]), LABELS)
    assert [(c.name, c.is_bloc, len(c.members)) for c in found] == [
        ("bloc b2", True, 8), ("bloc b10", True, 8), ("in other blocs", False, 2), ("in no bloc", False, 1),
    ]  # fmt: skip


def test_a_few_members_of_many_blocs_are_grouped_by_board() -> None:
    found = clusters(strip(["w"] * 12, [f"b{place}" for place in range(12)]), LABELS)
    assert [(c.name, c.is_bloc, len(c.members)) for c in found] == [("Pi 5", False, 12)]


def test_the_strip_draws_every_span_of_every_device_once() -> None:
    drawn = timelapse.figure(strip(["wwttx", "..iia"], ["", ""], [0, 0, 0, 1, 2]), LABELS)
    cells = drawn[drawn.index('class="cells"') :]
    spans = dict(re.findall(r'<path class="s-(\w)" d="([^"]+)"', cells))
    assert spans == {"w": "M0 0.5h2", "t": "M2 0.5h2", "x": "M4 0.5h1", "i": "M2 1.5h2", "a": "M4 1.5h1"}
    assert "Sums opened over time, 3 in all, at most 2 in one span" in drawn


def test_the_script_gets_the_rows_that_were_drawn() -> None:
    result = world_result()
    assert result.strip is not None
    data = lapse_data(read(result))
    rows = [
        "".join(letter * int(count) for letter, count in re.findall(r"(\D)(\d+)", row))
        for row in data["rows"]  # type: ignore[attr-defined]
    ]
    assert rows == result.strip.rows
    assert sorted(member for member, _ in data["tops"]) == list(range(96))  # type: ignore[attr-defined]


def test_the_still_picture_shows_the_busiest_moment() -> None:
    page = Page(timelapse.figure(strip(["wwt.", "wtt.", "wwwt"], ["", "", ""]), LABELS))
    assert lapse_data(page)["at"] == 2
    assert page.count("circle", "s-t") == 2


def test_every_state_has_a_colour_in_both_themes() -> None:
    text = world_page(world_result())
    assert set(CLASSES) == set(STATES)
    for kind in CLASSES.values():
        assert len(re.findall(rf"--{kind}: #", text)) == 2, kind
        assert f".{kind} {{ --state" in text, kind


def test_an_empty_strip_is_no_picture() -> None:
    assert timelapse.figure(Strip(seconds=1, devices=[], boards=[], rows=[], opened=[]), LABELS) == ""
    assert timelapse.figure(strip([""], [""], []), LABELS) == ""


def test_moments_are_told_by_day_and_hour() -> None:
    assert when_text(0) == "day 1, 00:00"
    assert when_text(2 * 86_400 - 60) == "day 2, 23:59"


# ---------------------------------------------------------------- charts and units
def test_a_line_has_gaps_where_the_loss_left_the_numbers() -> None:
    points = [(0.0, 2.0), (1.0, 1.5), (2.0, math.nan), (3.0, 1.0), (4.0, 0.5)]
    drawn = world_charts.lines([Line("a <b>", points)], "hours", "Loss", target=1.0)
    assert drawn.count("<polyline") == 2
    assert drawn.count('class="target"') == 1
    assert "a &lt;b&gt;: 0.500 at 4.0 hours" in drawn


def test_a_single_point_and_no_point_can_be_drawn() -> None:
    assert 'class="spot"' in world_charts.lines([Line("a", [(0.0, 1.0)])], "hours", "Loss")
    assert "No loss was measured" in world_charts.lines([Line("a", [(0.0, math.inf)])], "hours", "Loss")


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    points = [(float(place), 1.0 / (place + 1)) for place in range(5_001)]
    drawn = world_charts.lines([Line("a", points)], "hours", "Loss")
    assert len(drawn) < 30_000
    assert "at 5,000.0 hours" in drawn


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (energy_text(0), "0.0 Wh"), (energy_text(0.18), "50 mWh"), (energy_text(7.2), "2.0 Wh"),
        (energy_text(360), "100 Wh"), (energy_text(11_160), "3.1 kWh"), (celsius_text(0.0), "–"),
        (celsius_text(81.5), "82 °C"),
        (hours_text(0.5), "30 min"), (hours_text(2.25), "2.2 h"), (hours_text(21), "21 h"),
        (hours_text(96), "4.0 days"),
        (percent_text(None), "–"), (percent_text(1.0), "100 %"), (percent_text(0.999), "99.9 %"),
        (percent_text(0.5), "50 %"), (percent_text(0.021), "2.1 %"), (percent_text(0.0), "0 %"),
    ],
)  # fmt: skip
def test_units(text: str, told: str) -> None:
    assert text == told


# ---------------------------------------------------------------- files and terminal
def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = changed(judged=7, notes=["a"], violations=[violation()])
    write_world(result, tmp_path / "world.json")
    assert read_world(tmp_path) == read_world(tmp_path / "world.json") == result
    write_world_report(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == world_page(result)


def test_the_json_is_strict_even_when_training_diverged() -> None:
    point = Point(hour=1.0, energy_kj=1.0, version=1, figures={"loss": math.nan, "accuracy": 0.5})
    data = encode_world(changed(loss=[point]))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(data, parse_constant=refuse)["loss"][0]["figures"] == {"loss": None, "accuracy": 0.5}
    (again,) = decode_world(data).loss
    assert math.isnan(again.figures["loss"])
    assert json.loads(data)["rounds"]["yield"] == 0.965


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"loss": 3}', b'{"loss": [1]}', b"\xff"])
def test_a_file_that_is_no_result_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "world.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not the result of a world"):
        read_world(path)
    with pytest.raises(NoInputError, match="cannot read"):
        read_world(tmp_path / "nothing")


@pytest.mark.parametrize(
    "result",
    [world_result(), bare_result(), changed(violations=[violation()], loss=[])],
    ids=["whole", "bare", "bad"],
)
def test_the_terminal_tells_the_same(result: WorldResult) -> None:
    screen = Console(file=StringIO(), width=120)
    print_world(result, Path("out"), console=screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert headline(result) in text
    assert "Look at out/report.html" in text
    assert ("BROKEN, first: d000003 twice" in text) == bool(result.violations)
