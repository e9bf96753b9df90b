"""A device is a function of (scenario, seed, number): links, owners and whole draws."""

import math
from collections import Counter

import numpy as np
import pytest

from edge_agent.policy import Policy
from fedge.errors import ConfigError
from firmware_sim.parts.draw import DeviceParts, draw
from firmware_sim.parts.hours import DAY
from firmware_sim.parts.link import LINKS, Link, constant, series_of
from firmware_sim.parts.owner import ACTIONS, absence_seconds, actions, edited, policy_of
from firmware_sim.scenario import Group, LinkKind, Owner, Power, Presence, Scenario
from firmware_sim.traces.recorded import Traces
from firmware_sim.world.streams import Stream

FLEET = Scenario(
    name="mixed",
    groups=(
        Group(
            name="phones",
            share=3,
            boards={"pi4": 2, "pi5": 1},
            presence=Presence(kind="night", time_zones=5),
            power=Power(kind="battery"),
            link=LinkKind(kind="lte", metered=True, loss=0.02),
            owner=Owner(allows_metered=True, battery_min=0.4, hours="22:00-06:00"),
        ),
        Group(name="field", boards={"zero2w": 1}, power=Power(kind="solar"), enclosure="open"),
    ),
)


def told(parts: DeviceParts) -> list[object]:
    """Everything that can be seen of a device, and its first moves."""
    on = parts.presence.first(0.0)
    return [
        parts.number,
        parts.group.name,
        parts.board.name,
        parts.speed,
        parts.samples,
        parts.time_zone,
        parts.battery.wh,
        parts.battery.panel_watts,
        parts.battery.charge,
        parts.thermal.celsius,
        on,
        parts.presence.next(0.0, on),
        parts.presence.expected_stay(1.0),
        parts.link.upload_kbit,
        parts.link.transfer_seconds(5.0, 10_000, True),
        parts.link.latency(),
        parts.link.loss,
    ]


def test_a_device_is_the_same_in_a_fleet_of_any_size_and_in_any_order() -> None:
    small, large = draw(FLEET, 20, 7), draw(FLEET, 100_000, 7)
    backwards = {number: told(small[number]) for number in reversed(range(20))}
    assert [told(large[number]) for number in range(20)] == [backwards[number] for number in range(20)]
    assert [told(parts) for parts in small] == [told(parts) for parts in small[:]]
    assert told(draw(FLEET, 20, 8)[3]) != told(small[3])
    with pytest.raises(IndexError):
        small[20]


def test_known_answers_of_seed_seven() -> None:
    """A change here changes every recorded world."""
    parts = draw(FLEET, 5, 7)[2]
    assert (parts.group.name, parts.board.name, parts.time_zone, parts.samples) == KNOWN[:4]
    assert [parts.speed, parts.battery.wh, parts.link.upload_kbit] == pytest.approx(KNOWN[4:])


KNOWN = ("phones", "pi4", 2, 42, 0.9107756193509072, 56.48127358278905, 9725.024592755732)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_prefix_has_nearly_the_shares_that_were_asked_for(seed: int) -> None:
    fleet = draw(FLEET, 1_000, seed)
    for size in (8, 40, 200, 1_000):
        found = Counter((parts.group.name, parts.board.name) for parts in fleet[:size])
        shares = {("phones", "pi4"): 0.5, ("phones", "pi5"): 0.25, ("field", "zero2w"): 0.25}
        assert all(abs(found[kind] - part * size) <= 2.5 for kind, part in shares.items())


def test_what_a_group_says_reaches_its_devices() -> None:
    fleet = draw(FLEET, 400, 5)
    phones = [parts for parts in fleet if parts.group.name == "phones"]
    assert {parts.time_zone for parts in phones} == set(range(5))
    assert {parts.policy for parts in phones} == {Policy(hours="22:00-06:00", battery_min=0.4, metered=True)}
    assert len({id(parts.policy) for parts in phones}) == 1
    assert all(20.0 <= parts.battery.wh <= 60.0 and 0.4 <= parts.battery.charge <= 1.0 for parts in phones)
    assert all(parts.link.loss == pytest.approx(1 - 0.98 * (1 - LINKS["lte"].loss)) for parts in phones)
    assert float(np.median([parts.samples for parts in fleet])) == pytest.approx(math.exp(4.3), rel=0.15)
    assert float(np.median([parts.speed for parts in fleet])) == pytest.approx(1.0, rel=0.05)
    assert phones[0].tokens_per_second == phones[0].board.tokens_per_second * phones[0].speed
    assert phones[0].ambient(0.0) == pytest.approx(phones[0].thermal.celsius - phones[0].thermal.idle)


def test_traces_are_replayed_and_missing_ones_named() -> None:
    group = Group(name="g", link=LinkKind(kind="trace"))
    with pytest.raises(ConfigError, match="--traces") as caught:
        draw(Scenario(name="x", groups=(group,)), 3, 1)
    assert caught.value.field == "link.kind"
    traces = Traces("two rates", series=(constant(800.0), constant(80.0)))
    seconds = {
        round(parts.link.transfer_seconds(9.0, 100_000, False), 6)
        for parts in draw(Scenario(name="x", groups=(group,)), 30, 1, traces)
    }
    assert seconds == {1.0, 10.0}


def test_an_unknown_board_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(ConfigError, match="orin-nano"):
        draw(Scenario(name="x", groups=(Group(name="g", boards={"orin-nanoo": 1}),)), 3, 1)


# ---------------------------------------------------------------- links
@pytest.mark.parametrize("kind", LINKS)
def test_rates_are_log_normal_around_the_kinds_median(kind: str) -> None:
    own = LINKS[kind]
    links = [Link(kind, Stream(1, number)) for number in range(3_000)]
    rates = np.array([8e-3 * 1e6 / link.transfer_seconds(1e5, 1_000_000, False) for link in links])
    assert float(np.median(rates)) == pytest.approx(own.down_kbit, rel=0.1)
    spread = math.hypot(own.between, own.within)
    assert float(np.std(np.log(rates))) == pytest.approx(spread, rel=0.1)
    late = [link.latency() for link in links]
    assert float(np.median(late)) == pytest.approx(own.latency, rel=0.1)


def test_a_rate_is_remembered_for_its_hold_time() -> None:
    own = LINKS["3g"]
    pairs = []
    for number in range(3_000):
        link = Link("3g", Stream(2, number))
        scale = own.down_kbit * link.upload_kbit / own.up_kbit
        first, second = (
            math.log(8e3 / link.transfer_seconds(now, 1_000_000, False) / scale)
            for now in (1e5, 1e5 + own.hold_seconds)
        )
        pairs.append((first, second))
    assert float(np.corrcoef(np.array(pairs).T)[0, 1]) == pytest.approx(math.exp(-1.0), abs=0.06)


def test_a_series_gives_each_moment_its_own_rate_and_starts_again() -> None:
    series = series_of(np.array([0.0, 10.0, 20.0]), np.array([1.0, 0.0, 4.0]))  # 30 s, 50 Mbit
    assert series.seconds(0.0, 5.0) == pytest.approx(5.0)
    assert series.seconds(5.0, 5.0 + 8.0) == pytest.approx(5.0 + 10.0 + 2.0)
    assert series.seconds(20.0, 40.0 + 10.0) == pytest.approx(30.0)
    assert series.seconds(0.0, 500.0) == pytest.approx(300.0)
    assert series.mean_kbit == pytest.approx(50_000 / 30)


# ---------------------------------------------------------------- owners
def test_owners_act_as_often_as_asked_until_they_revoke() -> None:
    owner = Owner(unplugs=2.0, travels=0.5, policy_edits=0.5)
    found = [action for n in range(200) for _, action in actions(owner, Stream(4, n), 10.0)]
    assert len(found) / 2_000 == pytest.approx(3.0, rel=0.05)
    assert found.count("unplug") / len(found) == pytest.approx(2 / 3, abs=0.03)
    assert list(actions(Owner(), Stream(4), 1e4)) == []
    ended = list(actions(Owner(unplugs=1.0, revokes=1.0), Stream(6), 1e4))
    assert [action for _, action in ended].count("revoke") == 1
    assert ended[-1][1] == "revoke"
    times = [at for at, _ in ended]
    assert times == sorted(times)
    assert set(found) <= set(ACTIONS)


def test_travel_takes_a_day_and_more_and_an_edit_keeps_a_policy_valid() -> None:
    assert min(absence_seconds("travel", Stream(1, n)) for n in range(200)) >= DAY
    assert float(np.median([absence_seconds("unplug", Stream(1, n)) for n in range(500)])) == pytest.approx(
        1_200.0, rel=0.15
    )
    start = policy_of(Owner())
    policies = {edited(start, Stream(1, n)) for n in range(60)}
    assert start not in policies
    assert any(each.metered for each in policies)
    assert {each.bloc_devices_min for each in policies} >= {start.bloc_devices_min, 8, 16, 32}
