"""The strip as it is recorded: everybody until blocs are formed, then whole blocs and some devices in none."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from firmware_sim.world import timeline
from firmware_sim.world.devices import GONE
from firmware_sim.world.timeline import DEVICES, Timeline, evenly


def fleet(count: int) -> list[Any]:
    """Devices that are off, every third for good."""
    board = SimpleNamespace(board=SimpleNamespace(name="pi5"))
    return [SimpleNamespace(number=n, off=GONE if n % 3 == 0 else 1 << 20, parts=board) for n in range(count)]


def recorded(count: int, blocs: list[str], looks: tuple[bool, ...]) -> timeline.outcome.Strip:
    line = Timeline(fleet(count), blocs)
    for formed in looks:
        line.look(formed)
    return line.strip(600.0)


def test_a_small_fleet_is_shown_as_it_is() -> None:
    found = recorded(6, ["b1"] * 5 + [""], (False, True))
    assert found.devices == [f"d{number:06d}" for number in range(6)]
    assert found.rows == ["xx", "..", "..", "xx", "..", ".."]
    assert found.blocs == ["b1"] * 5 + [""]


def test_of_a_large_fleet_whole_blocs_are_shown_from_the_first_column_on() -> None:
    blocs = [f"b{number % 50}" if number < 400 else "" for number in range(1_000)]
    found = recorded(1_000, blocs, (False, False, True))
    sizes = {name: found.blocs.count(name) for name in set(found.blocs) - {""}}
    assert len(found.rows) == DEVICES
    assert set(sizes.values()) == {8}
    assert len(sizes) == 13
    for device, row in zip(found.devices, found.rows, strict=True):
        assert row == ("xxx" if int(device[1:]) % 3 == 0 else "...")


@pytest.mark.parametrize("count", [1_000, timeline.ALL_MAX + 1])
def test_a_large_fleet_without_blocs_is_shown_evenly(count: int) -> None:
    found = recorded(count, [""] * count, (False, False))
    assert len(found.rows) == DEVICES
    numbers = [int(device[1:]) for device in found.devices]
    steps = {after - before for before, after in pairwise(numbers)}
    assert steps <= {count // DEVICES, count // DEVICES + 1}


def test_opened_sums_are_counted_in_their_column_and_cut_with_the_rows() -> None:
    line = Timeline(fleet(2), ["", ""])
    for share in (0.0, 0.001, 0.5, 1.0):
        line.count_opened(share)
    assert (line.opened[0], line.opened[120], line.opened[239], sum(line.opened)) == (2, 1, 1, 4)
    line.look(False)
    assert line.strip(1.0).opened == [2]


def test_evenly_never_takes_more_than_there_are() -> None:
    assert evenly([1, 2], 5) == [1, 2]
    assert evenly(list(range(10)), 3) == [0, 3, 6]
    assert evenly([1, 2], 0) == []
