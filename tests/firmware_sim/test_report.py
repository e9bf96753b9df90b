"""The page: well-formed, offline, complete, honest about gaps; and the table of the terminal."""

import math
import re
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_result import run_values

from firmware_sim.pages.charts import dumbbells, loss_by_round, ticks
from firmware_sim.processes.report import page, print_table, write_report
from firmware_sim.processes.result import as_result

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Demands that every element is closed in order; collects text, elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def shapes(self, tag: str, kind: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag and attrs.get("class") == kind]


def read(values: dict[str, Any]) -> Reader:
    return Reader(page(as_result(values)))


def test_the_page_shows_every_figure() -> None:
    values = run_values()
    text = read(values).text
    for shown in (
        "4.601",
        "3.752",
        "4.553",
        "3.715",
        "3.736",
        "3.707",
        "184.6 KB",
        "1.69 MB",
        "262 MB",
        "104 MB",
        "43 MB",
    ):
        assert shown in text, shown
    assert "Held-out loss fell from 4.60 to 3.75" in text
    assert "lower for 10 of 10 people" in text
    assert "11 min 30 s" in text
    assert all(person["id"] in text for person in values["people"])
    assert "two agents & one hub were started again" in text
    assert "SmolLM2 <135M>" in text


def test_the_page_needs_no_network_and_no_script() -> None:
    reader = read(run_values())
    assert not {tag for tag, _ in reader.seen} & {"script", "link", "img", "iframe"}
    assert not [attrs for _, attrs in reader.seen if {"src", "href", "srcset"} & set(attrs)]
    assert "url(" not in page(as_result(run_values()))
    assert "@import" not in page(as_result(run_values()))


def test_names_from_outside_cannot_become_markup() -> None:
    values = run_values()
    attack = '"><script>alert(1)</script>$title'
    values["model"]["name"] = values["data"]["name"] = values["broker"] = attack
    values["people"][0]["id"] = values["round_log"][0]["bloc"] = values["notes"][0] = attack
    reader = read(values)
    assert "script" not in {tag for tag, _ in reader.seen}
    assert attack in reader.text


def test_a_loss_that_rose_is_said_to_have_risen() -> None:
    values = run_values()
    values["loss"]["took_part"] = 4.9
    values["people"][2]["after"] = 4.9
    reader = read(values)
    assert "Held-out loss did not fall: 4.60 before, 4.90 after" in reader.text
    assert "lower for 9 of 10 people" in reader.text
    assert len(reader.shapes("line", "worse")) == 2  # once for each width


def test_one_bad_figure_leaves_the_others() -> None:
    values = run_values()
    whole = read(values)
    values["round_log"][1]["training_loss"] = math.nan
    values["people"][0]["after"] = math.inf
    values["people"][11]["before"] = None
    reader = read(values)
    assert reader.text.count("diverged") >= 3
    assert "not measured" in reader.text
    assert len(reader.shapes("text", "cross middle")) == 3  # the legend, and one for each width
    assert len(reader.shapes("circle", "point")) == len(whole.shapes("circle", "point")) - 2
    assert len(reader.shapes("line", "bar")) == len(whole.shapes("line", "bar")) - 4
    assert "People without a finite figure are left out of the spread: 2." in reader.text
    assert not re.search(r"\b(nan|inf)\b", page(as_result(values)))


def test_a_run_that_diverged_from_the_start_still_has_a_page() -> None:
    values = run_values()
    for person in values["people"]:
        person["after"] = math.nan
    for entry in values["round_log"]:
        entry["training_loss"] = math.nan
    values["loss"] |= {"took_part": math.nan, "never_seen": math.nan, "pooled_reference": None}
    assert "Training diverged" in read(values).text


def test_nothing_measured_is_said_and_not_drawn() -> None:
    values = run_values()
    values["people"], values["round_log"] = [], []
    values["loss"] = dict.fromkeys(values["loss"])
    values["agent"] = dict.fromkeys(values["agent"])
    values["bytes"] = dict.fromkeys(values["bytes"])
    values["seconds"] = dict.fromkeys(values["seconds"])
    text = read(values).text
    assert "The loss was not measured" in text
    assert "No person's loss was measured." in text
    assert "diverged" not in text


def test_a_figure_is_drawn_where_its_axis_says() -> None:
    result = as_result(run_values())
    svg = Reader(loss_by_round(result, 820))
    rows = {
        float(words): float(attrs["y"] or 0) - 4
        for (_, attrs), words in zip(
            [entry for entry in svg.seen if entry[1].get("class") == "axis end"],
            [word for word in svg.words if "." in word],
            strict=False,
        )
    }
    low, high = min(rows), max(rows)
    after = svg.shapes("circle", "dot")[-1]
    share = (float(after["cy"] or 0) - rows[low]) / (rows[high] - rows[low])
    assert low + share * (high - low) == pytest.approx(3.7523, abs=0.002)


def test_a_dumbbell_runs_from_before_to_after() -> None:
    person = as_result(run_values()).people[0]
    svg = Reader(dumbbells([("one", [person])], 820))
    (ring,), (dot,) = svg.shapes("circle", "ring"), svg.shapes("circle", "dot")
    assert float(dot["cx"] or 0) < float(ring["cx"] or 0)
    assert "−0.800" in svg.text


@pytest.mark.parametrize(("low", "high"), [(3.7, 4.6), (0.0, 0.0), (-2.0, 90.0), (5.0, 5.0001)])
def test_ticks_enclose_their_range(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 13
    assert marks == sorted(set(marks))


def test_the_file_is_written_from_plain_values(tmp_path: Path) -> None:
    write_report(run_values(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(as_result(run_values()))


def test_the_terminal_sees_the_same_figures(tmp_path: Path) -> None:
    screen = StringIO()
    print_table(as_result(run_values()), tmp_path, console=Console(file=screen, width=120))
    text = unescape(screen.getvalue())
    for shown in (
        "4.601",
        "3.752",
        "−0.849",
        "10 of 10",
        "3.736",
        "184.6 KB a round",
        "262 MB",
        str(tmp_path),
    ):
        assert shown in text, shown
