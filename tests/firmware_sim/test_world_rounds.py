"""Rounds in a world: whatever goes wrong, the adapter is the exact mean of what whole blocs said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from world_scenes import Books, adapter_of, mean_share, plain, small

from edge_agent.round import Phase
from fedge.errors import StorageError
from firmware_sim.world import devices, hubside
from firmware_sim.world.disk import Disk
from firmware_sim.world.standins import HUB
from firmware_sim.world.world import World


def kept(world: World, number: int) -> object:
    """What is durable on a device, or in the hub's database."""
    store = world.hub.store
    return (store.rows(), len(store.ledger or ())) if number == HUB else world.devices[number].disk.state


class Once:
    """A fault at one chosen Save, for tests: `where` is before, torn or after."""

    def __init__(self, number: int, where: str, nth: int) -> None:
        self.number, self.where, self.left = number, where, nth
        self.counts: dict[str, int] = {}
        self.struck = 0.0
        self.kept: list[bool] = []  # whether what was durable is still all that is, right after the cut

    def arm(self, world: World) -> None:
        """Nothing strikes by the clock."""

    def on_save(self, world: World, number: int) -> str:
        if number != self.number or self.left < 0:
            return ""
        self.left -= 1
        if self.left >= 0:
            return ""
        self.struck = world.now
        before = kept(world, number)
        world.at(world.now, lambda world: self.kept.append(kept(world, number) == before))
        return self.where

    def on_message(
        self, world: World, to: int, topic: str, payload: bytes
    ) -> list[tuple[float, bytes]] | None:
        return None

    def on_blob(self, world: World, number: int, data: bytes) -> bytes:
        return data


def check_books(world: World, books: Books) -> None:
    """What must hold at the end of every run."""
    assert adapter_of(world).tobytes() == books.expected_adapter(mean_share(world)).tobytes()
    assert len(set(books.sealed)) == len(books.sealed), "one transcript was masked twice"
    opened = {row.transcript for row in books.opened}
    assert len(opened) == len(books.opened), "one sum was opened twice"
    for row in world.hub.store.rounds.values():
        accepted = {number for transcript, number in books.accepted if transcript == row.transcript}
        assert row.state != "opened" or accepted <= set(books.members(row))


def test_adapter_is_the_exact_mean_of_the_devices_own_words() -> None:
    world = small(devices=16, hours=1.0)
    books = Books(world)
    result = world.run()
    assert result.crypto == "real"
    assert result.rounds.opened >= 8
    assert result.rounds.yield_ is not None
    assert result.rounds.yield_ > 0.9
    assert result.loss[-1].figures["loss"] < 0.5 * result.loss[0].figures["loss"]
    check_books(world, books)


def test_real_and_hashed_cryptography_open_the_same_sums() -> None:
    adapters, ends = [], []
    for crypto in ("real", "hashed"):
        world = small(devices=8, hours=1.0, crypto=crypto)
        result = world.run()
        assert result.rounds.opened > 3
        adapters.append(adapter_of(world).tobytes())
        ends.append((result.events, result.adapter_version))
    assert adapters[0] == adapters[1]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("with_memory", [True, False])
def test_broker_restart_is_recovered_from(with_memory: bool) -> None:
    world = small(devices=16, hours=3.0, crypto="hashed")
    books = Books(world)
    for at in (1_500.0, 3_000.0, 3_900.0):
        world.at(at, lambda world: world.restart_broker(20.0, with_memory))
    world.until(4_000.0)
    before = len(books.opened)
    result = world.run()
    assert len(books.opened) > before > 0
    assert result.rounds.sat_out <= 3
    check_books(world, books)


def test_hub_crash_loses_no_acknowledged_report() -> None:
    world = small(devices=16, hours=4.0, crypto="hashed")
    books = Books(world)
    for at in range(1_200, 12_000, 301):
        world.at(float(at), lambda world: world.crash_hub(15.0))
    result = world.run()
    assert result.rounds.opened > 10
    check_books(world, books)
    ended = {row.transcript for row in books.opened}
    open_now = {row.transcript: row for row in world.hub.store.rounds.values() if row.state == "open"}
    for transcript, number in books.accepted:
        if transcript in open_now:
            assert world.devices[number].disk.state.accepted
        else:
            assert transcript in ended or world.recorder.ledger["sat-out"] > 0


@pytest.mark.parametrize("where", ["before", "torn", "after"])
@pytest.mark.parametrize("number", [2, HUB])
def test_cut_at_a_save(number: int, where: str) -> None:
    """Every fifth of the first Saves, on a device and on the hub."""
    for nth in range(3, 48, 9):
        faults = Once(number, where, nth)
        world = small(devices=8, hours=1.5, crypto="hashed", faults=faults)
        books = Books(world)
        result = world.run()
        assert faults.kept == [where != "after"], "a write is whole or was never begun"
        assert result.rounds.opened > 0
        check_books(world, books)


def test_power_cut_keeps_what_is_durable() -> None:
    world = small(devices=8, hours=3.0, crypto="hashed")
    world.begin()
    device = world.devices[4]
    while device.agent is None or device.agent.phase is not Phase.AWAITING:
        world.until(world.now + 0.5)
    state, files = device.disk.state, device.disk.round
    assert state.accepted
    assert files is not None
    assert files.report
    world.power_off(4, 60.0)
    assert device.disk.state is state
    assert device.disk.round is files
    assert device.agent is None
    while device.agent is None:
        world.until(world.now + 1.0)
    assert device.disk.state.boot == state.boot + 1
    assert device.disk.state.counter >= state.counter


def test_pending_files_are_lost_and_synced_ones_are_not() -> None:
    disk, delta = Disk(), np.ones(4, np.float32)
    disk.write_delta(b"h" * 32, delta)
    disk.lose()
    disk.sync()
    assert disk.delta(b"h" * 32) is None
    disk.write_delta(b"h" * 32, delta)
    disk.sync()
    disk.lose()
    assert disk.delta(b"h" * 32) is delta
    disk.full = True
    with pytest.raises(StorageError):
        disk.save(disk.state)


def test_full_disk_ends_the_machine_until_there_is_room() -> None:
    world = small(devices=8, hours=3.0, crypto="hashed")
    books = Books(world)
    world.begin()
    while world.devices[1].job is None:
        world.until(world.now + 1.0)
    world.fill_disk(1, 900.0)
    world.until(world.now + 600.0)
    assert world.devices[1].agent is None or world.devices[1].agent.phase is not Phase.TRAINING
    result = world.run()
    assert world.devices[1].agent is not None
    assert result.classes
    assert result.rounds.opened > 0
    check_books(world, books)


def test_board_that_wakes_in_1970_waits_for_the_right_time() -> None:
    world = small(devices=8, hours=2.0)
    world.set_clock_offset(0, -1_800_000_000.0)
    world.until(1_800.0)
    assert world.devices[0].waits
    assert world.devices[0].agent is None
    assert world.recorder.ledger["formed"] == 0, "eight of eight are needed"
    world.set_clock_offset(0, 0.0)
    world.until(3_600.0)
    assert world.devices[0].agent is not None
    assert world.recorder.ledger["opened"] > 0


def test_last_will_tells_the_hub_after_one_and_a_half_keepalives() -> None:
    world = small(devices=8, hours=2.0)
    world.until(600.0)
    world.power_cut(5)
    here: dict[str, Any] = world.hub.machine.contacts  # type: ignore[union-attr,assignment]
    world.until(640.0)
    assert here["d000005"].here
    world.until(650.0)
    assert not here["d000005"].here


def test_revoked_device_is_heard_no_more() -> None:
    world = small(devices=8, hours=2.0, scenario=plain(form_at_share=1.0))
    world.until(5.0)
    world.revoke(2)
    world.until(1_800.0)
    assert world.recorder.refusals["revoked"] > 0
    assert world.recorder.ledger["formed"] == 0


def test_device_that_leaves_is_gone_for_good() -> None:
    world = small(devices=16, hours=2.0, crypto="hashed")
    world.until(600.0)
    world.leave(7)
    world.power_on(7)
    world.until(7_000.0)
    assert world.devices[7].agent is None
    assert not world.devices[7].on


def test_large_world_keeps_old_rounds_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a hub that starts again reads them there."""
    results = []
    for small_devices in (2_000, 4):
        monkeypatch.setattr(hubside, "SMALL_DEVICES_MAX", small_devices)
        world = small(devices=16, hours=2.0, crypto="hashed")
        for at in range(1_500, 6_000, 700):
            world.at(float(at), lambda world: world.crash_hub(20.0))
        results.append((world.run().crc, adapter_of(world).tobytes(), world.hub.store.ledger is None))
    (crc, adapter, without), (other_crc, other_adapter, other_without) = results
    assert (crc, adapter) == (other_crc, other_adapter)
    assert not without
    assert other_without


def test_void_timers_leave_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which changes nothing but how much waits."""
    adapters, waiting = [], []
    for most in (1_000, 5):
        monkeypatch.setattr(devices, "_STALE_MIN", most)
        world = small(devices=16, hours=2.0, crypto="hashed")
        world.until(5_400.0)
        adapters.append(adapter_of(world).tobytes())
        waiting.append(len(world.entries))
    assert adapters[0] == adapters[1]
    assert waiting[1] < waiting[0]


def test_carry_is_kept_as_the_files_of_a_real_device_keep_it() -> None:
    disk, one, two, sent = Disk(), *(np.full(4, value, np.float32) for value in (1.0, 2.0, 3.0))
    disk.write_delta(b"1" * 32, one)
    disk.sync()
    disk.keep_carry(b"1" * 32)
    assert disk.carry is one, "a delta, where there is no carry yet"
    disk.write_delta(b"2" * 32, two)
    disk.sync()
    disk.keep_carry(b"2" * 32)
    assert disk.carry is one, "and not in place of one that it does not include"
    disk.write_delta(b"3" * 32, two)
    disk.sync()
    disk.write_report(b"3" * 32, sent, b"report")
    disk.sync()
    disk.keep_carry(b"3" * 32)
    assert disk.carry is sent, "what was to be sent includes the old carry"
    disk.drop_carry(b"4" * 32)
    assert disk.carry is None
    assert disk.round is None
