"""The hub as a screenplay, with the shipped agents as its cast: rounds, losses, restarts, memory and campaigns."""

import hashlib

import numpy as np
import pytest
from playbook import NOW, NUMBERS, Fleet, campaign, kind_of

from edge_agent import effects as device_effects
from edge_agent.round import Phase
from fedge import topics
from fedge.messages import Facts
from hub import effects as hub_effects
from hub.effects import BlocRow, RoundRow


def five(seed: int = 0, *, rounds: int = 2, devices: int = 5) -> Fleet:
    """One bloc of five, ready to begin."""
    fleet = Fleet(devices, seed=seed)
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.begin(campaign(devices, bloc=5, rounds=rounds))
    return fleet


def losing(fleet: Fleet, kind: str, times: int, only: str = "") -> Fleet:
    """The link loses the next `times` messages of this kind (to or from one device)."""
    left = [times]

    def drop(to: str, topic: str, payload: bytes) -> list[bytes]:
        if left[0] and kind_of(payload) == kind and (not only or topics.device_of(topic) == only):
            left[0] -= 1
            return []
        return [payload]

    fleet.filter = drop
    return fleet


def rounds(fleet: Fleet) -> list[RoundRow]:
    return sorted(
        (row for row in fleet.rows.values() if isinstance(row, RoundRow)), key=lambda row: row.round
    )


# ---------------------------------------------------------------- an ordinary campaign
def test_a_campaign_from_ready_to_closed() -> None:
    fleet = five()
    fleet.settle()
    fleet.check()
    kinds = [entry.kind for entry in fleet.ledger]
    one = ["ready"] * 5
    reports = ["report"] * 5
    assert kinds[:9] == ["campaign", *one, "formed", "open", "report"]
    assert kinds.count("open") == kinds.count("opened") == 2
    assert [kind for kind in kinds if kind == "report"] == reports * 2
    assert kinds[-1] == "closed"
    assert fleet.campaign.adapter_version == 2
    assert all(device.saved.rounds_opened == 2 for device in fleet.devices.values())


def test_the_figures_of_a_round_are_the_sums_of_the_devices() -> None:
    fleet = five(rounds=1)
    fleet.settle()
    detail = fleet.kinds("opened")[0].detail
    assert (detail["devices"], detail["contributors"], detail["steps"]) == (5, 5, 25)
    assert (detail["labels"], detail["samples"], detail["training_loss"]) == (50, 100, 4.0)


def test_two_blocs_keep_their_own_time() -> None:
    """One bloc waits for a member for hours; the other finishes its campaign meanwhile."""
    fleet = Fleet(10)
    fleet.begin(campaign(10, bloc=5))
    while not any(isinstance(row, BlocRow) for row in fleet.rows.values()):
        fleet.step()
    slow = next(row for row in fleet.rows.values() if isinstance(row, BlocRow) and row.id == "bloc-0")
    absent = slow.members[0]
    fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) == absent else [payload]
    fleet.run()
    assert [entry.bloc for entry in fleet.kinds("opened")] == ["bloc-1", "bloc-1"]
    assert not fleet.campaign.closed
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    assert [entry.bloc for entry in fleet.kinds("opened")] == ["bloc-1", "bloc-1", "bloc-0", "bloc-0"]


# ---------------------------------------------------------------- what gets lost
@pytest.mark.parametrize(
    "kind", ["open", "bloccard", "report", "chunk", "receipt", "result", "announcement", "ready"]
)
@pytest.mark.parametrize("times", [1, 4])
def test_a_lost_message_of_every_kind(kind: str, times: int) -> None:
    fleet = losing(Fleet(5), kind, times)
    fleet.begin(campaign(5, bloc=5))
    fleet.settle()
    fleet.check()
    assert len(fleet.opened()) == 2
    assert not fleet.kinds("sat-out")


def test_a_device_that_misses_a_whole_round_comes_back_with_a_fresh_ready() -> None:
    """OPEN, its repeats and the RESULT lost until the window is over: nobody may be stuck."""
    fleet = Fleet(5)
    deaf = "d02"
    fleet.filter = lambda to, topic, payload: [] if topics.commands(deaf) == topic else [payload]
    fleet.begin(campaign(5, bloc=5))
    for _ in range(40):
        fleet.run()
        fleet.fire_timers()
    assert [row.state for row in rounds(fleet)] == ["sat-out"]
    assert fleet.kinds("sat-out")[0].detail == {"reason": "window-over"}
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    assert len(fleet.opened()) == 2
    assert not fleet.devices[deaf].refusals


def test_a_result_lost_for_ever_is_answered_when_the_device_asks() -> None:
    fleet = losing(Fleet(5), "result", 99, only="d01")
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    assert fleet.devices["d01"].agent.phase is Phase.AWAITING
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.fire_timers("result")
    fleet.run()
    assert fleet.campaign.closed


# ---------------------------------------------------------------- rounds that end otherwise
def test_window_over_sits_out_and_the_work_is_carried() -> None:
    fleet = Fleet(5)
    slow = "d04"
    fleet.filter = lambda to, topic, payload: [] if topics.chunks(slow) == topic else [payload]
    fleet.begin(campaign(5, bloc=5, rounds=1))
    for _ in range(35):
        fleet.run()
        fleet.fire_timers()
    assert fleet.kinds("sat-out")[0].detail == {"reason": "window-over"}
    first = rounds(fleet)[0]
    assert first.sum == b"", "what was in the sum is gone"
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.settle()
    fleet.check()
    last = fleet.opened()[0]
    assert all(first.transcript in device.parts[last.transcript] for device in fleet.devices.values())


def test_a_decline_sits_the_bloc_out_at_once() -> None:
    fleet = Fleet(5)
    refusing = fleet.devices["d01"]
    train, declined = fleet.delta, []

    def fail_once(device: object, effect: device_effects.Train) -> np.ndarray:
        if device is refusing and not declined:
            declined.append(effect.transcript)
            fleet.device_event("d01", device_effects.WorkFailed(effect.transcript, "no memory"))
        return train(device, effect)

    fleet.delta = fail_once
    fleet.begin(campaign(5, bloc=5, rounds=1))
    fleet.settle()
    fleet.check()
    assert fleet.kinds("sat-out")[0].detail == {"reason": "d01: work-failed"}
    assert fleet.now < NOW + 3600, "long before the window is over"
    assert len(fleet.opened()) == 1
    assert declined[0] not in refusing.seals


def test_a_bloc_without_contributors_leaves_the_adapter_byte_for_byte() -> None:
    """F23: every weight is zero. The round counts, the adapter stays."""
    fleet = Fleet(5)
    for device in fleet.devices.values():
        device.scale = 0.0
    fleet.begin(campaign(5, bloc=5))
    before = fleet.adapter().tobytes()
    fleet.settle()
    assert [entry.detail["contributors"] for entry in fleet.kinds("opened")] == [0, 0]
    assert fleet.adapter().tobytes() == before
    assert fleet.campaign.closed


def test_one_contributor_of_five_counts_by_a_fifth() -> None:
    fleet = Fleet(5)
    for device in list(fleet.devices.values())[1:]:
        device.scale = 0.0
    fleet.begin(campaign(5, bloc=5, rounds=1))
    fleet.settle()
    fleet.check()
    only = fleet.devices["d00"].words[fleet.opened()[0].transcript]
    assert fleet.kinds("opened")[0].detail["contributors"] == 1
    assert np.linalg.norm(fleet.adapter()) == pytest.approx(0.01 * NUMBERS**0.5 / 5, rel=0.1)
    assert only[0].any()


def test_a_bad_sum_is_seen_and_not_applied() -> None:
    """A member sends noise instead of its report: the check-sums say so, nothing is opened, all carry on."""
    fleet = Fleet(5)
    liar = fleet.devices["d03"]
    seal, lies = fleet._seal, []

    def lie_once(device: object, effect: device_effects.Seal) -> device_effects.Event:
        sealed = seal(device, effect)
        if device is not liar or lies:
            return sealed
        body = np.random.default_rng(1).bytes(sealed.size)
        lies.append(body)
        liar.reports[effect.transcript] = body
        return device_effects.Sealed(effect.transcript, hashlib.sha256(body).digest(), len(body))

    fleet._seal = lie_once
    fleet.begin(campaign(5, bloc=5, rounds=1))
    before = fleet.adapter().tobytes()
    while not fleet.kinds("sat-out"):
        fleet.step()
    assert fleet.kinds("sat-out")[0].detail == {"reason": "bad-sum"}
    assert fleet.adapter().tobytes() == before
    assert fleet.campaign.adapter_version == 0
    fleet.settle()
    fleet.check()
    assert len(fleet.opened()) == 1


def test_a_device_without_data_is_in_no_bloc() -> None:
    fleet = Fleet(6)
    fleet.devices["d02"].facts = Facts(samples_bucket=0)
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    fleet.settle()
    bloc = next(row for row in fleet.rows.values() if isinstance(row, BlocRow))
    assert "d02" not in bloc.members
    assert {tell.refusal for tell in fleet.hub_told} == {"empty-member"}
    assert len(fleet.kinds("refused")) == 1


# ---------------------------------------------------------------- restarts
@pytest.mark.parametrize("seed", range(3))
def test_the_hub_restarts_again_and_again(seed: int) -> None:
    """Every fiftieth message meets a new process; what the old one had only in memory is gone."""
    fleet = Fleet(10, seed=seed)
    fleet.begin(campaign(10, bloc=5))
    for count in range(1_000):
        if not fleet.queue:
            break
        fleet.step()
        if count % 50 == 49:
            fleet.start_hub()
    fleet.settle()
    fleet.check()
    assert fleet.epoch > 4
    assert len(fleet.opened()) == 4


def test_a_restart_says_open_to_those_who_are_missing_and_to_nobody_else() -> None:
    fleet = Fleet(5)
    fleet.filter = lambda to, topic, payload: [] if topic == topics.chunks("d01") else [payload]
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    assert len(fleet.kinds("report")) == 4
    fleet.queue.clear()
    fleet.start_hub()
    opens = [to for to, _, payload in fleet.queue if kind_of(payload) == "open"]
    assert opens == ["d01"]


# ---------------------------------------------------------------- memory
def test_memory_keeps_one_round_of_a_bloc_and_the_rows_keep_all() -> None:
    fleet = five(rounds=4)
    fleet.settle()
    assert len(rounds(fleet)) == 4
    hub = fleet.hub
    assert [state.row.round for state in hub.rounds.values()] == [4]
    assert not any(state.incoming or state.open for state in hub.rounds.values())
    assert not any(contact.envelope or contact.counted for contact in hub.contacts.values())
    for order in (1, -1):
        fleet.rows = dict(sorted(fleet.rows.items(), key=repr)[::order])
        fleet.start_hub()
        assert [state.row.round for state in fleet.hub.rounds.values()] == [4]


def test_a_device_that_slept_through_its_round_hears_its_end_after_days_and_restarts() -> None:
    fleet = Fleet(5)
    sleeper = "d02"
    fleet.filter = lambda to, topic, payload: (
        [] if kind_of(payload) == "result" and to == sleeper else [payload]
    )
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    fleet.now += 10 * 86_400
    fleet.start_hub()
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.boot(sleeper)
    fleet.settle()
    fleet.check()
    assert not fleet.devices[sleeper].refusals


def test_a_hub_that_lost_a_round_gives_a_signed_end_to_it() -> None:
    """The database was restored from before the round: no device may ask for ever, none may count it twice."""
    fleet = Fleet(5)
    fleet.filter = lambda to, topic, payload: [] if kind_of(payload) == "result" else [payload]
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    lost = rounds(fleet)[0].transcript
    del fleet.rows[RoundRow, lost]
    fleet.start_hub()
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.run()
    fleet.fire_timers("result")
    fleet.run()
    assert {tell.refusal for tell in fleet.hub_told} == {"unknown-round"}
    assert all(device.carry is None for device in fleet.devices.values())
    assert all(device.agent.phase is not Phase.AWAITING for device in fleet.devices.values())


# ---------------------------------------------------------------- campaigns
def test_a_second_campaign_after_a_closed_one() -> None:
    fleet = five()
    fleet.settle()
    first = fleet.adapter().tobytes()
    fleet.hub_event(hub_effects.CampaignAsked(campaign(5, bloc=5, name="c2")))
    fleet.settle()
    second = fleet.hub.campaigns["c2"].row
    assert second.closed
    assert second.adapter_version == 2
    assert fleet.adapter().tobytes() == first
    assert all(len(device.seals) == 4 for device in fleet.devices.values())
    assert not fleet.hub_told
    assert not [refusal for device in fleet.devices.values() for refusal in device.refusals]


def test_two_campaigns_asked_at_once_run_one_after_the_other() -> None:
    fleet = Fleet(5)
    fleet.hub_event(hub_effects.CampaignAsked(campaign(5, bloc=5, name="c1")))
    fleet.hub_event(hub_effects.CampaignAsked(campaign(5, bloc=5, name="c2")))
    for name in fleet.devices:
        fleet.boot(name)
    fleet.settle()
    assert all(campaign.row.closed for campaign in fleet.hub.campaigns.values())
    assert all(len(device.seals) == 4 for device in fleet.devices.values())


def test_a_campaigns_name_is_used_once() -> None:
    fleet = five()
    fleet.hub_event(hub_effects.CampaignAsked(campaign(5, bloc=5)))
    assert [tell.refusal for tell in fleet.hub_told] == ["campaign-exists"]


def test_a_ready_for_a_closed_campaign_is_answered_with_the_closing() -> None:
    fleet = five()
    fleet.filter = lambda to, topic, payload: (
        [] if kind_of(payload) == "announcement" and to == "d02" and fleet.campaign.closed else [payload]
    )
    fleet.run()
    assert fleet.devices["d02"].agent.phase is Phase.OFFERED
    fleet.filter = lambda to, topic, payload: [payload]
    fleet.fire_timers("ready")
    assert [kind_of(payload) for _, _, payload in fleet.queue].count("ready") == 1
    fleet.run()
    assert fleet.devices["d02"].agent.phase is Phase.CLOSED
    assert not fleet.hub_told
