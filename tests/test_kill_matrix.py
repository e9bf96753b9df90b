"""The kill matrix: the power is cut before, during and after every Save of every machine of a whole campaign.

A campaign of 8 devices and 2 rounds runs once undisturbed and lists its Saves; then once for each of them and each
side of it. `during` tears the write itself: the device's state goes through the real Journal whose new file is cut in
the middle, the hub's transaction through the real Store which is stopped between two rows; what they then load is what
the machine starts from. Every run is judged by the world's invariants at every effect, and must end with the aggregate
of the undisturbed run, or with one round that sat out and all of its work in a later sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playbook import NOW, NUMBERS, PowerCut, campaign
from watched_fleet import WatchedFleet

from edge_agent.effects import AgentState, SendChunk
from edge_agent.effects import Publish as DevicePublish
from edge_agent.effects import Save as DeviceSave
from edge_agent.journal import Journal
from fedge.io import durable
from fedge.update import codec as coding
from hub.effects import Publish as HubPublish
from hub.effects import Row
from hub.effects import Save as HubSave
from hub.store import Store

DEVICES, ROUNDS = 8, 2
SAVES = DeviceSave | HubSave
SENDS = DevicePublish | SendChunk | HubPublish
ROUNDING = 0.1  # of the adapter's norm; one update of the 16 left out, or counted twice, moves it by 0.25


class CutFleet(WatchedFleet):
    """One campaign whose power fails on one `side` of effect number `at` among those of `kinds`."""

    def __init__(self, side: str, at: int | None, folder: Path, kinds: object = SAVES) -> None:
        self.side, self.at, self.folder, self.cut_kinds = side, at, folder, kinds
        self.whose: list[str] = []  # whose effect each of them was
        super().__init__(DEVICES, seed=3)
        self.before_effect, self.after_effect = self._before, self._after
        self.begin(campaign(DEVICES, rounds=ROUNDS))
        self.settle()

    @property
    def _now(self) -> bool:
        return len(self.whose) - 1 == self.at

    def _before(self, who: str, effect: object) -> None:
        if isinstance(effect, self.cut_kinds):
            self.whose.append(who)
            if self._now and self.side == "torn":
                self._tear(who, effect)
            if self._now and self.side != "after":
                raise PowerCut

    def _after(self, who: str, effect: object) -> None:
        if isinstance(effect, self.cut_kinds) and self._now and self.side == "after":
            raise PowerCut

    def _tear(self, who: str, effect: object) -> None:
        if isinstance(effect, DeviceSave):
            self.devices[who].saved = torn_state(self.folder / who, self.devices[who].saved, effect.state)
        elif isinstance(effect, HubSave):
            kept = torn_transaction(self.folder, list(self.rows.values()), effect.row)
            assert sorted(map(repr, kept)) == sorted(map(repr, self.rows.values())), (
                "a part of an event stayed"
            )

    # ---------------------------------------------------------------- how it ended
    def sat_out(self) -> list[bytes]:
        """Transcripts of the rounds that were not opened."""
        return [found for found, (_, fate) in self.invariants.hub_rules.ended.items() if fate == "sat-out"]

    def work_is_carried(self) -> bool:
        """Whether all that was trained in rounds that sat out is in an opened sum."""
        counted = self.invariants.hub_rules.counted
        missing = set(self.sat_out())
        return all(trained & missing <= counted[name] for name, trained in self.trained.items())

    def aggregate_of(self, other: CutFleet) -> bool:
        """Whether this campaign ended where `other` did, up to the rounding of its words."""
        away = np.linalg.norm(self.adapter() - other.adapter())
        return bool(away <= ROUNDING * np.linalg.norm(other.adapter()))


def torn_state(folder: Path, old: AgentState, new: AgentState) -> AgentState:
    """What a real Journal loads when the write of `new` was cut: its file is there in part, and never renamed."""
    folder.mkdir(exist_ok=True)
    path = folder / "state.bin"
    Journal(path).save(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.os, "fsync", power_fails)
        with pytest.raises(PowerCut):
            Journal(path).save(new)
    durable.part_name(path).write_bytes(path.read_bytes()[:-7])
    return Journal(path).load()


def power_fails(handle: int) -> None:
    raise PowerCut


def torn_transaction(folder: Path, rows: list[Row], new: Row) -> list[Row]:
    """What a real Store loads when a transaction was cut after its first row."""

    def cut() -> Iterator[Row]:
        yield new
        raise PowerCut

    store = Store.open(folder / "hub.sqlite")
    store.transaction(rows)
    with pytest.raises(PowerCut):
        store.transaction(cut())
    kept = store.load()
    store.close()
    return kept


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> CutFleet:
    fleet = CutFleet("before", None, tmp_path_factory.mktemp("undisturbed"))
    fleet.check()
    return fleet


def test_an_undisturbed_campaign_takes_no_time_and_refuses_nothing(undisturbed: CutFleet) -> None:
    assert undisturbed.now == NOW
    assert not undisturbed.hub_told
    assert not [refusal for device in undisturbed.devices.values() for refusal in device.refusals]
    assert set(undisturbed.whose) == {"hub", *undisturbed.devices}
    print("saves:", dict(Counter(undisturbed.whose)))


@pytest.mark.parametrize("side", ["before", "torn", "after"])
def test_a_cut_at_every_save(undisturbed: CutFleet, side: str, tmp_path: Path) -> None:
    counts, saves = Counter[str](), len(undisturbed.whose)
    for at in range(saves):
        (tmp_path / str(at)).mkdir()
        fleet = CutFleet(side, at, tmp_path / str(at))
        ends_well(fleet)
        counts["of the hub" if fleet.whose[at] == "hub" else "of devices"] += 1
        if fleet.sat_out():
            assert fleet.work_is_carried()
            counts["sat out, carried"] += 1
        else:
            assert fleet.aggregate_of(undisturbed)
            counts["same aggregate"] += 1
    print(f"cut {side}: {saves} cases,", dict(counts))
    assert counts["of the hub"] + counts["of devices"] == saves
    assert counts["of the hub"] > 4 * ROUNDS
    assert counts["of devices"] > 4 * ROUNDS * DEVICES
    # Between `consumed` and the finished report masks may exist: only there a cut costs the round.
    assert counts["sat out, carried"] == DEVICES * ROUNDS
    assert counts["same aggregate"] == saves - DEVICES * ROUNDS


def ends_well(fleet: CutFleet) -> None:
    """The exact fold of whole blocs, every update once, and everybody has heard the end."""
    fleet.check()
    assert fleet.campaign.closed
    assert [row.bloc for row in fleet.opened()] == ["bloc-0"] * ROUNDS
    assert all(entry.detail["contributors"] == DEVICES for entry in fleet.kinds("opened"))
    looked = fleet.invariants.looked
    assert looked["opened"] == looked["exact"] == looked["fold"] == ROUNDS
    assert looked["accepted"] >= DEVICES * ROUNDS - 1  # the RESULT may come instead of one receipt


def test_a_cut_before_every_fifth_message(undisturbed: CutFleet, tmp_path: Path) -> None:
    messages = len(CutFleet("before", None, tmp_path, SENDS).whose)
    for at in range(0, messages, 5):
        fleet = CutFleet("before", at, tmp_path, SENDS)
        ends_well(fleet)
        assert fleet.aggregate_of(undisturbed)


def test_an_update_too_many_or_too_few_is_another_aggregate(undisturbed: CutFleet, tmp_path: Path) -> None:
    """The comparison can fail: one of the 16 updates in or out is seen."""
    fleet = CutFleet("before", None, tmp_path)
    assert fleet.aggregate_of(undisturbed)
    device = fleet.devices["d00"]
    update = next(iter(device.words.values()))
    one = coding.decode(update[0], update[1], NUMBERS) / np.float32(DEVICES)
    with pytest.MonkeyPatch.context() as patch:
        for sign in (1, -1):
            patch.setattr(fleet, "adapter", lambda sign=sign: undisturbed.adapter() + sign * one)
            assert not fleet.aggregate_of(undisturbed)
