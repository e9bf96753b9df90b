"""Faults: drawn from the seed alone, as often as asked, over when they should be; what is tampered with is refused."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

import pytest
from playbook import NOW, Fleet, campaign, kind_of

from fedge import topics
from fedge.errors import ConfigError, ProtocolError
from fedge.identity import Verifier
from fedge.messages import Announcement, HubState, Message, Open, decode_envelope, encode
from firmware_sim.faults import tampering
from firmware_sim.faults.strikes import DAY, FAULTS, HUB, Faults, number_of, quiet_from
from firmware_sim.world.streams import Stream


class Surface:
    """Notes what faults ask for, and lets time pass."""

    def __init__(self) -> None:
        self.now, self.done = 0.0, []
        self._later, self._order = [], count()

    def at(self, seconds: float, action: Callable[[object], None]) -> None:
        heapq.heappush(self._later, (seconds, next(self._order), action))

    def run(self, until: float) -> list[tuple[object, ...]]:
        while self._later and self._later[0][0] <= until:
            self.now, _, action = heapq.heappop(self._later)
            action(self)
        return self.done

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__") or name == "hub_signer":
            raise AttributeError(name)
        return lambda *words, **named: self.done.append((self.now, name, *words, *named.values()))


def struck(
    rates: dict[str, float], devices: int, days: float = 2.0, seed: int = 4
) -> list[tuple[object, ...]]:
    faults, surface = Faults(rates, seed, devices, days), Surface()
    faults.arm(surface)
    return surface.run(days * DAY)


def test_an_unknown_fault_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean power-cut"):
        Faults({"power-cuts": 1.0}, 0, 5, 1.0)


def test_a_rate_is_a_rate() -> None:
    days, devices = 4.0, 300
    cuts = [entry for entry in struck({"power-cut": 2.0}, devices, days) if entry[1] == "power_cut"]
    expected = 2.0 * devices * quiet_from(days) / DAY
    assert abs(len(cuts) - expected) < 4 * expected**0.5
    assert len({entry[2] for entry in cuts}) > 0.99 * devices, "everybody has its share"
    crashes = [entry for entry in struck({"hub-crash": 20.0}, devices, days) if entry[1] == "crash_hub"]
    assert 30 < len(crashes) < 130, "of the hub, a day; not of each device"


def test_the_end_of_a_run_is_quiet() -> None:
    done = struck({"power-cut": 50.0, "partition": 20.0}, 10, 0.25)
    assert max(entry[0] for entry in done if entry[1] in ("power_cut", "partition")) < quiet_from(0.25)
    assert quiet_from(0.25) == pytest.approx(0.15 * DAY)
    assert quiet_from(10.0) == 10 * DAY - 3 * 3_600
    faults = Faults({"loss": 1_000.0}, 0, 1, 1.0)
    surface = Surface()
    faults.arm(surface)
    surface.run(DAY)
    assert faults.on_message(surface, 0, topics.commands("d000000"), b"x") is None


def test_a_device_meets_the_same_fate_in_any_fleet_and_beside_any_other_fault() -> None:
    def of_device_3(done: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
        return [entry for entry in done if entry[1] in ("power_cut", "power_on") and entry[2] == 3]

    few = of_device_3(struck({"power-cut": 5.0}, 4))
    many = of_device_3(struck({"power-cut": 5.0, "loss": 9.0, "hub-crash": 3.0}, 80))
    assert few == many != []
    assert few != of_device_3(struck({"power-cut": 5.0}, 4, seed=5))


def test_no_rate_no_cost() -> None:
    surface = Surface()
    Faults(dict.fromkeys(FAULTS, 0.0), 0, 5, 1.0).arm(surface)
    assert not surface._later


def test_what_strikes_comes_to_an_end() -> None:
    """A clock is right again, a network unmetered, a slow device fast, a cut device has power."""
    rates = dict.fromkeys(("clock-jump", "metered-flip", "slow-device", "power-cut"), 3.0)
    last = {(entry[1], entry[2]): entry for entry in struck(rates, 20, 3.0)}
    for (name, _), entry in last.items():
        assert entry[3:] in {
            "set_clock_offset": [(0.0,)],
            "set_metered": [(False,)],
            "slow": [(1.0,)],
        }.get(name, [()])
    assert all(last["power_on", number][0] >= last["power_cut", number][0] for number in range(20))


@pytest.mark.parametrize(("name", "copies"), [("loss", 0), ("duplicate", 2), ("reorder", 1)])
def test_messages_are_lost_doubled_and_late(name: str, copies: int) -> None:
    faults, surface = Faults({name: 2_000.0}, 1, 2, 1.0), Surface()
    faults.arm(surface)
    surface.run(3_600.0)
    told = faults.on_message(surface, HUB, topics.control("d000001"), b"payload")
    assert told is not None
    assert len(told) == copies
    assert all(payload == b"payload" for _, payload in told)
    assert any(delay > 0 for delay, _ in told) == (copies > 0)
    assert faults.counts[name] == 1


def test_a_save_is_cut_once_and_a_download_has_one_wrong_bit() -> None:
    faults, surface = (
        Faults({"power-cut-at-save": 100.0, "hub-crash-at-save": 100.0, "bit-flip": 100.0}, 1, 1, 1.0),
        Surface(),
    )
    faults.arm(surface)
    surface.run(7_200.0)
    for number in (0, HUB):
        assert faults.on_save(surface, number) in ("before", "torn", "after")
        assert faults.on_save(surface, number) == ""
    data = bytes(1_000)
    flipped = faults.on_blob(surface, 0, data)
    assert sum(byte.bit_count() for byte in flipped) == 1
    assert faults.on_blob(surface, 0, data) is data
    assert faults.counts == {"power-cut-at-save": 1, "hub-crash-at-save": 1, "bit-flip": 1}


# ---------------------------------------------------------------- tampering
@pytest.fixture(scope="module")
def heard() -> tuple[Fleet, dict[str, bytes]]:
    """One message of each kind, as it was on its way."""
    fleet, messages = Fleet(5), {}
    fleet.filter = lambda to, topic, payload: [messages.setdefault(kind_of(payload), payload) and payload]
    fleet.begin(campaign(5, bloc=5, rounds=1))
    fleet.settle()
    return fleet, messages


def test_a_kind_is_seen_without_decoding(heard: tuple[Fleet, dict[str, bytes]]) -> None:
    _, messages = heard
    assert {"announcement", "ready", "open", "bloccard", "report", "chunk", "receipt", "result"} <= set(
        messages
    )
    for kind, payload in messages.items():
        assert tampering.tag(payload) == kind
    assert tampering.tag(encode(HubState(hub="h", up=True, epoch=1))) == "hubstate"
    assert tampering.tag(b"") == tampering.tag(b"\x93" * 60) == ""


@pytest.mark.parametrize("kind", ["open", "announcement"])
def test_a_forgery_is_refused(heard: tuple[Fleet, dict[str, bytes]], kind: str) -> None:
    fleet, messages = heard
    verifier = Verifier("test", fleet.root.root_public)
    message: type[Message] = Open if kind == "open" else Announcement
    refusals = set()
    for seed in range(20):
        forged = tampering.forged_envelope(messages[kind], messages["ready"], Stream(seed))
        with pytest.raises(ProtocolError) as caught:
            verifier.open(forged, message, role="hub", now=NOW)
        refusals.add(caught.value.name)
    assert refusals == {"bad-signature", "wrong-role"}


def test_a_second_open_is_the_hub_s_own_and_another(heard: tuple[Fleet, dict[str, bytes]]) -> None:
    fleet, messages = heard
    second = tampering.second_open(messages["open"], fleet.hub_signer, Stream(1))
    opened = Verifier("test", fleet.root.root_public).open(second, Open, role="hub", now=NOW)
    assert opened.body != decode_envelope(messages["open"]).body


def test_a_report_is_altered_where_it_matters(heard: tuple[Fleet, dict[str, bytes]]) -> None:
    _, messages = heard
    chunk = tampering.forged_report(messages["chunk"], Stream(1))
    half = len(chunk) // 2
    assert chunk[:half] == messages["chunk"][:half]
    assert chunk[half:] != messages["chunk"][half:]
    assert tampering.forged_report(messages["report"], Stream(1)) != messages["report"]


def test_whose_topic_it_is() -> None:
    assert number_of(topics.control("d000041")) == 41
    assert number_of(topics.state("d000007")) == 7
    assert number_of(topics.HUB_STATE) == number_of(topics.announcement("c1")) == HUB
