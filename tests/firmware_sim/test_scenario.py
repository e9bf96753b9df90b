"""Scenario files: the ready ones load; everything wrong with a file is told at once, with key, value, line and rule."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from fedge.errors import ConfigError, DataError, FedgeError, NoInputError
from firmware_sim.scenario import Scenario, load_scenario, parse_scenario, ready, ready_text

LEAST = """\
name = "x"
[[groups]]
name = "a"
"""


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_scenario(text, "my.toml")
    return caught.value


def refusal(text: str) -> str:
    """Of one problem: `key = value: where and what`."""
    error = refused(text)
    return (
        f"{error.field} = {msgspec.json.encode(error.value).decode()}: {error.what.removeprefix('my.toml, ')}"
    )


@pytest.mark.parametrize("name", ["lab", "vineyard", "city", "phones"])
def test_a_ready_scenario_loads_by_name_and_as_a_file(name: str, tmp_path: Path) -> None:
    assert name in ready()
    copy = tmp_path / "my.toml"
    copy.write_text(ready_text(name))
    found = load_scenario(name)
    assert found == load_scenario(copy) == load_scenario(str(copy))
    assert found.name == name
    assert found.about


def test_a_file_needs_only_names() -> None:
    found = parse_scenario(LEAST, "my.toml")
    assert isinstance(found, Scenario)
    assert (found.devices, found.groups[0].boards) == (100, {"pi5": 1.0})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("devices = 0", 'devices = 0: line 2: must be a whole number from 1 to 10,000,000'),
        ("devices = 2.5", "devices = 2.5: line 2: must be a whole number"),
        ("days = nan", "days = null: line 2: must be a number above 0 and at most 3,650"),
        ("days = inf", "days = null: "),
        ('days = "one"', 'days = "one": line 2: must be a number above 0'),
        ("device = 5", 'device = 5: line 2: unknown key, did you mean "devices"?'),
        ("zzz = 5", "zzz = 5: line 2: unknown key; known: about, campaign, days, devices, faults, groups, name"),
        ("campaign = 3", "campaign = 3: line 2: must be a table"),
        ("campaign = { bloc = 4 }", "campaign.bloc = 4: line 2: must be a whole number from 5 to 64"),
        ('campaign = { task = "blow" }', 'must be one of "bowl", "mlp", "real", did you mean "bowl"?'),
        ("campaign = { training_share = 1.5 }", "campaign.training_share = 1.5: line 2: must be a number from 0 to 1"),
        ("campaign = { normalise_steps = 1 }", "must be true or false"),
        ("faults = { power-cuts = 1 }", 'faults.power-cuts = 1: line 2: unknown name, did you mean "power-cut"?'),
        ("faults = { power-cut = -1 }", "faults.power-cut = -1: line 2: must be a number from 0 to 1,000,000"),
        ("faults = 1", "faults = 1: line 2: must be a table of names and numbers"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_the_scenario(line: str, told: str) -> None:
    assert told in refusal(LEAST.replace('name = "x"\n', f'name = "x"\n{line}\n'))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("boards = { pi6 = 1 }", 'groups[0].boards.pi6 = 1: line 4: unknown name, did you mean "pi5"?'),
        ("boards = { pi5 = 0 }", "groups[0].boards.pi5 = 0: line 4: must be a number above 0 and at most 1,000,000"),
        ("ambient_celsius = [30, 20]", "= [30,20]: line 4: must be two numbers, the lower one first"),
        ("ambient_celsius = [30]", "must be two numbers, the lower one first"),
        ("ambient_celsius = [nan, 20]", "must be two numbers"),
        ("samples = [4.0, 9.0]", "must be [a number from 0 to 14, a number from 0 to 3]"),
        ('enclosure = "fans"', 'must be one of "open", "heatsink", "fan", did you mean "fan"?'),
        ('link = { kind = "lt" }', 'groups[0].link.kind = "lt": line 4: must be one of "ethernet"'),
        ("link = { loss = 2 }", "groups[0].link.loss = 2: line 4: must be a number from 0 to 1"),
        ("presence = { on_hour = 2 }", 'groups[0].presence.on_hour = 2: line 4: unknown key, did you mean "on_hours"?'),
        ("power = { battery_wh = [5, 1] }", "groups[0].power.battery_wh = [5,1]: line 4: must be two numbers"),
        ('owner = { hours = "22-6" }', 'must be hours like "22:00-06:00", or ""'),
        ('owner = { hours = "25:00-06:00" }', 'must be hours like "22:00-06:00", or ""'),
    ],
)  # fmt: skip
def test_a_wrong_line_of_a_group(line: str, told: str) -> None:
    assert told in refusal(f"{LEAST}{line}\n")


def test_all_that_is_wrong_is_told_at_once_with_its_lines() -> None:
    text = """\
days = 0
[campaign]
stps = 3
rounds = 0

[[groups]]
name = "Upper"

[[groups]]
name = "b"
[groups.link]
kind = "carrier-pigeon"
"""
    told = str(refused(text))
    assert told.startswith(
        "my.toml, line 1: must be a number above 0 and at most 3,650 (days=0). 6 problems in all: "
    )
    for part in (
        'line 3: campaign.stps = 3: unknown key, did you mean "steps"?',
        "line 4: campaign.rounds = 0",
        'line 7: groups[0].name = "Upper": must be small letters, digits and hyphens of at most 40 characters',
        'line 12: groups[1].link.kind = "carrier-pigeon"',
        "name: is missing",
    ):
        assert part in told, part


def test_the_first_problem_is_in_the_fields_of_the_error() -> None:
    error = refused(LEAST + "share = -1\n")
    assert (error.field, error.value, error.exit_code) == ("groups[0].share", -1, 78)


def test_a_long_list_of_problems_is_cut() -> None:
    told = str(refused(LEAST + "".join(f"wrong{number} = 1\n" for number in range(30))))
    assert "30 problems in all" in told
    assert told.endswith("; and 22 more")


def test_two_groups_cannot_have_one_name() -> None:
    assert "groups[1].name" in refusal(LEAST + '[[groups]]\nname = "a"\n')


def test_a_scenario_needs_a_group() -> None:
    assert "groups = null: my.toml: is missing; it must be a list of at least one table" in refusal(
        'name = "x"'
    )
    assert "groups = []: line 2: must be a list" in refusal('name = "x"\ngroups = []')


@pytest.mark.parametrize(
    ("source", "kind", "told"),
    [
        ("vineyrd", NoInputError, 'no such scenario, did you mean "vineyard"?'),
        ("zzz", NoInputError, "no such scenario; ready: city, lab, phones, storm, vineyard"),
        ("not-here.toml", NoInputError, "cannot read not-here.toml: No such file"),
    ],
)
def test_a_scenario_that_is_not_there(source: str, kind: type[FedgeError], told: str) -> None:
    with pytest.raises(kind, match=told.replace("?", r"\?")):
        load_scenario(source)


def test_a_file_that_is_not_toml_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("name = \n")
    with pytest.raises(DataError, match=r"is not TOML: .*line 1"):
        load_scenario(path)
    path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(DataError, match="larger than a scenario"):
        load_scenario(path)
    with pytest.raises(NoInputError, match="cannot read"):
        load_scenario(tmp_path)


@pytest.mark.parametrize("name", ["lab", "vineyard", "city", "phones"])
def test_a_ready_scenario_explains_itself(name: str) -> None:
    text = ready_text(name)
    assert text.startswith("# ")
    assert text.count("#") >= 5
    assert len(text.splitlines()) <= 70
    assert set(tomllib.loads(text)) == {"name", "about", "devices", "days", "campaign", "groups", "faults"}
