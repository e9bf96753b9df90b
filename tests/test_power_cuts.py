"""The power is cut before and after every Save of every process of a campaign: nothing is lost, nothing counts twice.

One undisturbed campaign (2 blocs of 5, 2 rounds) lists the Saves. Then the campaign runs once for each of them and each
side of it, is cut there, starts that process again from what was durable, and must end with the exact mean.
"""

from collections import Counter
from itertools import count

import pytest
from playbook import NOW, Fleet, PowerCut, campaign

from edge_agent.effects import Publish as DevicePublish
from edge_agent.effects import Save as DeviceSave
from edge_agent.effects import SendChunk
from hub.effects import Publish as HubPublish
from hub.effects import Save as HubSave

SAVES = DeviceSave | HubSave
SENDS = DevicePublish | SendChunk | HubPublish
SHARDS = 8


def campaign_cut(side: str, at: int | None, kind: type = SAVES) -> tuple[Fleet, list[str]]:
    """One campaign whose power fails `side` ("before", "after") the effect number `at`; and whose effects these are."""
    fleet, effects, whose = Fleet(10, seed=3), count(), []

    def hook(who: str, effect: object) -> None:
        if isinstance(effect, kind):
            whose.append(who)
            if next(effects) == at:
                raise PowerCut

    setattr(fleet, f"{side}_effect", hook)
    fleet.begin(campaign(10, bloc=5))
    fleet.settle()
    return fleet, whose


POINTS = len(campaign_cut("before", None)[1])


def ends_well(fleet: Fleet) -> None:
    fleet.check()
    assert fleet.campaign.closed
    assert Counter(row.bloc for row in fleet.opened()) == {"bloc-0": 2, "bloc-1": 2}
    assert all(entry.detail["contributors"] == 5 for entry in fleet.kinds("opened"))


def test_an_undisturbed_campaign_takes_no_time_and_refuses_nothing() -> None:
    fleet, whose = campaign_cut("before", None)
    ends_well(fleet)
    assert fleet.now == NOW
    assert not fleet.hub_told
    assert not [refusal for device in fleet.devices.values() for refusal in device.refusals]
    print("saves:", dict(Counter(whose)))


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("side", ["before", "after"])
def test_a_power_cut_at_every_save(side: str, shard: int) -> None:
    cuts, sat_out, twice = Counter(), 0, 0
    for at in range(shard, POINTS, SHARDS):
        fleet, whose = campaign_cut(side, at)
        ends_well(fleet)
        assert len(whose) > at, "the cut never happened"
        cuts["hub" if whose[at] == "hub" else "device"] += 1
        sat_out += len(fleet.kinds("sat-out"))
        twice += sum(device.saved.boot - 1 for device in fleet.devices.values())
    print(f"cut {side}: {dict(cuts)}, rounds that sat out: {sat_out}, devices started again: {twice}")
    assert cuts["hub"]
    assert cuts["device"]


def test_a_power_cut_before_every_fifth_message() -> None:
    for at in range(0, len(campaign_cut("before", None, SENDS)[1]), 5):
        ends_well(campaign_cut("before", at, SENDS)[0])


def test_the_matrix_sees_a_device_that_seals_twice() -> None:
    """The check itself can fail: a device that forgets `consumed` builds a second report under one transcript."""
    fleet, _ = campaign_cut("before", None)
    device = next(iter(fleet.devices.values()))
    device.seals.append(device.seals[0])
    with pytest.raises(AssertionError, match="masked twice"):
        fleet.check()
    device.seals.pop()
    device.parts[device.seals[1]] |= {device.seals[0]}
    with pytest.raises(AssertionError, match="counted twice"):
        fleet.check()
