"""The agent as a screenplay, continued: its board, its owner's policy, and the pace that a hub asks for."""

from __future__ import annotations

import msgspec
import pytest
from playbook import Fleet, campaign
from scene import CANCELLED, Scene, at, names

from edge_agent import effects
from edge_agent.round import Phase
from fedge.messages import Facts, Ready, decode, decode_envelope


# ---------------------------------------------------------------- what the board can do now
def said(scene: Scene) -> Ready:
    return decode(decode_envelope(scene.saved.ready).body, Ready)


def test_before_any_conditions_a_device_is_allowed_and_stays_a_day() -> None:
    ready = said(at(Phase.OFFERED))
    assert (ready.stay_seconds, ready.facts) == (86_400, Facts(samples_bucket=9))


def test_changed_facts_or_stay_are_said_anew_with_the_same_prekey() -> None:
    scene = at(Phase.OFFERED)
    first = said(scene)
    assert scene.conditions() == [], "nothing has changed"
    assert names(scene.conditions(hot=True)) == ["Save", "Publish ready", "SetTimer ready"]
    second = said(scene)
    assert second == msgspec.structs.replace(first, counter=2, facts=Facts(samples_bucket=9, hot=True))
    assert names(scene.conditions(hot=True, stay=600)) == ["Save", "Publish ready", "SetTimer ready"]
    assert (said(scene).prekey, said(scene).counter, said(scene).stay_seconds) == (first.prekey, 3, 600)
    assert names(scene.when(effects.TimerFired("ready"))) == ["Publish ready", "SetTimer ready"]


def test_present_but_not_now_is_a_stay_of_nothing() -> None:
    scene = at(Phase.OFFERED)
    assert names(scene.conditions(allowed=False)) == ["Tell", "Save", "Publish ready", "SetTimer ready"]
    assert said(scene).stay_seconds == 0
    assert "on battery" not in str(said(scene)), "the reason never leaves"
    assert scene.conditions(allowed=False) == []
    assert names(scene.conditions()) == ["Save", "Publish ready", "SetTimer ready"]
    assert said(scene).stay_seconds == 86_400


def test_conditions_are_in_the_ready_that_follows_a_round() -> None:
    scene = at(Phase.SENDING)
    before = scene.saved
    assert scene.conditions(hot=True, stay=600) == []
    assert scene.saved == before
    scene.hears(scene.receipt(accepted=True))
    scene.hears(scene.result())
    assert said(scene).facts == Facts(samples_bucket=9, hot=True, seconds_per_step=0.2)
    assert said(scene).stay_seconds == 600


def test_an_open_may_hold_any_ready_of_ours_with_the_current_prekey() -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.card())
    early = scene.opening()
    scene.conditions(hot=True)
    assert scene.saved.ready not in early.roster
    assert names(scene.hears(early)) == ["Save", "CancelTimer ready", "SetTimer result", "FetchBlob"]
    out = scene.when(effects.Fetched(campaign(5).adapter.sha256))
    assert out[0].steps == 5


def test_an_open_with_a_spent_prekey_of_ours_is_refused() -> None:
    scene = at(Phase.AWAITING)
    spent = scene.opening().roster[2]
    scene.hears(scene.result())
    new = scene.opening(2)
    roster = (*new.roster[:2], spent, *new.roster[3:])
    out = scene.hears(msgspec.structs.replace(new, roster=roster))
    assert [tell.refusal for tell in out] == ["swapped-prekey"]
    assert scene.hears(new)[0].state.opened


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.TRAINING])
def test_work_that_is_no_longer_allowed_stops_and_goes_on_inside_the_window(phase: Phase) -> None:
    scene = at(phase)
    transcript, before = scene.agent.transcript, scene.saved
    out = scene.conditions(allowed=False)
    assert names(out) == ["Tell", "StopWork", "CancelTimer fetch"]
    assert out[1] == effects.StopWork(transcript)
    assert scene.agent.phase is Phase.INTERRUPTED
    assert scene.conditions(allowed=False, hot=True) == []
    assert scene.saved == before, "no decline, nothing is spent"
    assert [e.refusal for e in scene.when(effects.Trained(transcript, 9.0, 3, 3, 5, 1.0))] == ["stale-work"]
    assert names(scene.conditions()) == ["FetchBlob"]
    out = scene.when(effects.Fetched(campaign(5).adapter.sha256))
    assert (out[0].transcript, out[0].steps) == (transcript, 5)


def test_sealing_is_never_interrupted_because_masks_may_exist() -> None:
    scene = at(Phase.SEALING)
    assert names(scene.conditions(allowed=False)) == ["Tell"]
    assert scene.agent.phase is Phase.SEALING
    assert names(scene.when(effects.Sealed(scene.agent.transcript, b"\3" * 32, 150_000)))[0] == "Save"


def test_a_round_that_ends_while_interrupted() -> None:
    scene = at(Phase.INTERRUPTED)
    out = names(scene.hears(scene.result(opened=False, reason="window-over")))
    assert out == [*CANCELLED, "KeepCarry", "Save", "Save", "Publish ready", "SetTimer ready"]
    assert said(scene).stay_seconds == 0


def test_an_open_that_comes_when_work_is_not_allowed_waits_for_better_times() -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.card())
    scene.conditions(allowed=False)
    assert names(scene.hears(scene.opening())) == ["Save", "CancelTimer ready", "SetTimer result"]
    assert scene.agent.phase is Phase.INTERRUPTED
    assert names(scene.conditions()) == ["FetchBlob"]


def test_a_bundle_is_not_fetched_while_nothing_is_allowed() -> None:
    scene = Scene()
    scene.when(effects.Started())
    assert names(scene.conditions(allowed=False)) == ["Tell"]
    assert names(scene.hears(scene.announcement())) == [*CANCELLED, "Save"]
    assert scene.agent.phase is Phase.FETCHING
    assert scene.when(effects.TimerFired("fetch")) == []
    assert names(scene.conditions()) == ["FetchBundle"]
    assert scene.conditions(hot=True) == [], "once"


# ---------------------------------------------------------------- the pace of the hub
def waits(out: list[effects.Effect]) -> list[float]:
    return [effect.seconds for effect in out if isinstance(effect, effects.SetTimer)]


def test_a_waiting_device_checks_in_at_the_campaigns_pace() -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.announcement(checkin_seconds=960))
    found = [waits(scene.when(effects.TimerFired("ready")))[0] for _ in range(200)]
    assert 720 <= min(found) < 780
    assert 1_140 < max(found) <= 1_200


def test_a_large_fleet_does_not_greet_a_new_hub_in_one_second() -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.announcement(checkin_seconds=960))
    found = []
    for epoch in range(1, 200):
        out = scene.hub_state(epoch)
        assert names(out) == ["SetTimer ready"]
        found += waits(out)
    assert 0 <= min(found) < 60
    assert 840 < max(found) <= 900
    small = at(Phase.OFFERED)
    assert names(small.hub_state(1)) == ["Publish ready", "SetTimer ready"]


# ---------------------------------------------------------------- how deep the work goes
@pytest.mark.parametrize(
    ("depths", "ours"), [((), 0), ((3,) * 5, 3), ((4, 4, 2, 4, 4), 2), ((0, 0, 1, 0, 0), 1)]
)
def test_the_plan_says_how_many_layers_we_adapt(depths: tuple[int, ...], ours: int) -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.card())
    assert "Save" in names(scene.hears(msgspec.structs.replace(scene.opening(), depths=depths)))
    assert scene.when(effects.Fetched(campaign(5).adapter.sha256))[0].depth == ours


@pytest.mark.parametrize(
    ("steps", "depths"),
    [
        ((5,) * 5, (3,) * 4),
        ((5,) * 5, (3, 3, -1, 3, 3)),
        ((5,) * 5, (1, 1, 30, 1, 1)),
        ((5,) * 5, (1, 1, 0, 1, 1)),
        ((2, 2, 5, 2, 2), (1, 1, 2, 1, 1)),
        ((1, 1, 5, 1, 1), (30, 30, 1, 30, 30)),
    ],
)
def test_a_plan_in_which_one_member_does_most_of_the_work_is_refused(
    steps: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    """However the work is shared out over steps and layers: a hub must not let four idle and open the fifth."""
    scene = at(Phase.OFFERED)
    scene.hears(scene.card())
    plan = msgspec.structs.replace(scene.opening(), steps=steps, depths=depths)
    assert [tell.refusal for tell in scene.hears(plan)] == ["idle-plan"]
    assert scene.agent.phase is Phase.OFFERED


def test_devices_accept_a_hubs_plan_of_three_deep_and_five_shallow_members() -> None:
    """Where depths differ they are all named: a device does not know how many layers `all` is."""
    fleet = Fleet(8)
    for number, device in enumerate(fleet.devices.values()):
        pace = 1.0 if number < 3 else 700.0
        device.saved = msgspec.structs.replace(device.saved, seconds_per_step=pace)
    fleet.begin(campaign(8, rounds=1, layers=24))
    fleet.settle()
    assert [device.refusals for device in fleet.devices.values()] == [[]] * 8
    assert len(fleet.opened()) == 1


# ---------------------------------------------------------------- the window is a lease
@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.TRAINING, Phase.INTERRUPTED, Phase.SEALING])
def test_a_round_whose_window_is_over_ends_even_when_its_result_was_lost(phase: Phase) -> None:
    """Not a decline for an interruption: the time in which it might have gone on is over."""
    scene = at(phase)
    stopped = ["StopWork"] if phase in (Phase.TRAINING, Phase.SEALING) else []
    expected = [*stopped, "Save", "Publish decline", "SetTimer result"]
    assert names(scene.when(effects.TimerFired("result"))) == expected
    assert scene.agent.phase is Phase.AWAITING
    assert scene.saved.consumed == scene.agent.transcript, "whatever was begun is never sealed"
    assert "KeepCarry" in names(scene.hears(scene.result(opened=False, reason="window-over")))
