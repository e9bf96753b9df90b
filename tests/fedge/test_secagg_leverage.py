"""The leverage audit: one partition is safe for ever, everything that is not whole blocs of it is refused."""

import numpy as np
import pytest

from fedge.errors import PolicyError
from fedge.secagg.leverage import leverages, require_leverage

DEVICES = [f"device-{i:02}" for i in range(40)]


def partition(order: list[str], size: int) -> list[list[str]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


BLOCS = partition(DEVICES, 8)


def test_nothing_opened_is_no_leverage() -> None:
    assert leverages([]) == {}
    require_leverage([], BLOCS[0])


@pytest.mark.parametrize("size", [5, 8, 10])
def test_one_partition_gives_one_over_k_however_often(size: int) -> None:
    blocs = partition(DEVICES, size)
    rounds = blocs * 30
    assert leverages(rounds) == pytest.approx(dict.fromkeys(DEVICES, 1 / size))
    for bloc in blocs:
        require_leverage(rounds, bloc)


def test_unions_of_whole_blocs_add_nothing() -> None:
    opened = [*BLOCS, BLOCS[0] + BLOCS[1], BLOCS[1] + BLOCS[4]]
    assert max(leverages(opened).values()) == pytest.approx(1 / 8)


def test_leave_one_out_after_the_total_is_refused() -> None:
    total, rest = BLOCS[0], BLOCS[0][1:]
    assert leverages([total, rest])["device-00"] == pytest.approx(1.0)
    with pytest.raises(PolicyError, match=r"1\.000 of device-00"):
        require_leverage([total], rest)
    with pytest.raises(PolicyError):
        require_leverage([rest], total)


def test_paired_subsets_are_refused() -> None:
    one, two = DEVICES[:8], DEVICES[8:16]
    halves, floors = one[:4] + two[:4], dict.fromkeys(DEVICES, 8)
    assert leverages([one, two, halves]) == pytest.approx(dict.fromkeys(one + two, 3 / 16))
    require_leverage([one, two], one + two, floors)
    with pytest.raises(PolicyError):
        require_leverage([one, two], halves, floors)


def test_a_second_partition_is_refused_at_its_first_bloc() -> None:
    order = [DEVICES[i] for i in np.random.default_rng(1).permutation(40)]
    with pytest.raises(PolicyError):
        require_leverage(BLOCS, partition(order, 8)[0])


def test_two_partitions_leak_twice_as_much() -> None:
    many = [f"device-{i:03}" for i in range(600)]
    order = [many[i] for i in np.random.default_rng(2).permutation(600)]
    shares = leverages(partition(many, 8) + partition(order, 8))
    assert np.mean(list(shares.values())) == pytest.approx(0.248, abs=0.002)
    assert max(shares.values()) > 0.25


def test_a_set_below_the_floor_is_refused_and_an_owner_may_demand_more() -> None:
    with pytest.raises(PolicyError):
        require_leverage([], DEVICES[:4])
    require_leverage([], DEVICES[:5])
    require_leverage([], DEVICES[:8], {"device-03": 8})
    with pytest.raises(PolicyError, match="device-03"):
        require_leverage([], DEVICES[:8], {"device-03": 9})


def test_nobody_can_waive_the_floor() -> None:
    with pytest.raises(PolicyError):
        require_leverage([], DEVICES[:2], dict.fromkeys(DEVICES, 1))
