"""The agent as a screenplay: what comes in, what goes out, in which order. `Scene` drives the shipped machine."""

from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest
from playbook import Fleet, campaign
from scene import CANCELLED, Scene, at, names

from edge_agent import effects
from edge_agent.agent import ALWAYS, REFUSALS, TRANSITIONS, Agent
from edge_agent.round import Phase
from fedge.messages import (
    Announcement,
    BlobRef,
    BlocCard,
    Decline,
    Facts,
    HubState,
    Open,
    Ready,
    Receipt,
    Report,
    Result,
    decode,
    decode_envelope,
)

# ---------------------------------------------------------------- the table
EVENTS = {
    effects.Started: effects.Started(),
    effects.Connected: effects.Connected(),
    effects.Fetched: effects.Fetched(bytes(32)),
    effects.FetchFailed: effects.FetchFailed(bytes(32), "no route"),
    effects.Trained: effects.Trained(bytes(32), 1.0, 1, 1, 1, 1.0),
    effects.Sealed: effects.Sealed(bytes(32), bytes(32), 9),
    effects.WorkFailed: effects.WorkFailed(bytes(32), "no data"),
    effects.TimerFired: effects.TimerFired("ready"),
    effects.Conditions: effects.Conditions(True, 60, Facts(samples_bucket=9)),
}
MESSAGES: tuple[type, ...] = (HubState, Announcement, BlocCard, Open, Receipt, Result)


def test_the_tables_name_every_event_and_every_message_of_a_hub() -> None:
    assert set(EVENTS) == set(get_args(effects.Event)) - {effects.Received}
    for phase in Phase:
        for key in (*EVENTS, *MESSAGES):
            assert key in ALWAYS or key in TRANSITIONS[phase] or key in REFUSALS, (phase, key)
    keys = {key for row in TRANSITIONS.values() for key in row} | set(ALWAYS) | set(REFUSALS)
    assert keys == {*EVENTS, *MESSAGES}, "and nothing that never comes"


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("key", [*EVENTS, *MESSAGES])
def test_every_event_in_every_phase_is_a_transition_or_the_named_refusal(phase: Phase, key: type) -> None:
    scene = at(phase)
    before = scene.saved
    if key in EVENTS:
        out = scene.when(EVENTS[key])
    elif key is HubState:
        out = scene.hub_state(1)
    else:
        makers = {
            Announcement: scene.announcement,
            BlocCard: scene.card,
            Open: scene.opening,
            Receipt: scene.receipt,
            Result: scene.result,
        }
        out = scene.hears(makers[key]())
    if key not in ALWAYS and key not in TRANSITIONS[phase]:
        assert scene.saved == before
        assert scene.agent.phase is phase
        assert [t.refusal for t in out] == ([REFUSALS[key]] if REFUSALS[key] else [])


# ---------------------------------------------------------------- an ordinary campaign, line by line
def test_a_whole_round() -> None:
    scene = Scene()
    assert names(scene.when(effects.Started())) == ["Save"]
    assert names(scene.when(effects.Connected())) == []
    assert names(scene.hears(scene.announcement())) == [*CANCELLED, "Save", "FetchBundle"]
    assert names(scene.when(effects.Fetched(campaign(5).manifest.sha256))) == [
        "Save",
        "Save",
        "Publish ready",
        "SetTimer ready",
    ]
    assert names(scene.hears(scene.card())) == ["Save"]
    out = scene.hears(scene.opening())
    assert names(out) == ["Save", "CancelTimer ready", "SetTimer result", "FetchBlob"]
    assert out[2].seconds > scene.agent.open_message.window_seconds, "then it asks how the round ended"
    out = scene.when(effects.Fetched(campaign(5).adapter.sha256))
    assert names(out) == ["Train"]
    assert out[0].steps == 5
    out = scene.when(effects.Trained(scene.agent.transcript, 9.0, 3, 3, 5, 1.0))
    assert names(out) == ["Save", "Seal"], "consumed is durable before a mask is made"
    assert out[0].state.consumed == scene.agent.transcript == out[1].transcript
    assert out[1].position == 2
    out = scene.when(effects.Sealed(scene.agent.transcript, b"\3" * 32, 150_000))
    assert names(out) == ["Save", "Publish report", "SetTimer receipt"], "durable before it is offered"
    assert out[0].state.prekey == b""
    assert names(scene.hears(scene.receipt())) == [
        "SendChunk 0",
        "SendChunk 1",
        "SendChunk 2",
        "SetTimer receipt",
    ]
    assert names(scene.hears(scene.receipt(b"\x07"))) == ["SetTimer receipt"]
    assert names(scene.hears(scene.receipt(b"\x07", accepted=True))) == [
        "Save",
        "CancelTimer receipt",
        "SetTimer result",
    ]
    out = scene.hears(scene.result())
    assert names(out) == [*CANCELLED, "DropCarry", "Save", "Save", "Publish ready", "SetTimer ready"]
    assert scene.saved.rounds_opened == 1
    assert decode(decode_envelope(scene.saved.ready).body, Ready).counter == 2
    assert decode(decode_envelope(scene.saved.ready).body, Ready).facts.seconds_per_step == 0.2
    assert names(scene.hears(scene.announcement(closed=True))) == ["Save"]
    assert scene.agent.phase is Phase.CLOSED


def test_a_fresh_prekey_for_every_ready() -> None:
    scene = at(Phase.AWAITING)
    spent = scene.opening().roster[2]
    scene.hears(scene.result())
    one, two = (decode(decode_envelope(envelope).body, Ready) for envelope in (spent, scene.saved.ready))
    assert one.prekey != two.prekey
    assert one.counter < two.counter


# ---------------------------------------------------------------- what gets lost
def test_a_lost_ready_is_said_again_word_for_word() -> None:
    scene = at(Phase.OFFERED)
    out = scene.when(effects.TimerFired("ready"))
    assert names(out) == ["Publish ready", "SetTimer ready"]
    assert out[0].payload == scene.saved.ready


def test_a_lost_result_is_asked_for() -> None:
    scene = at(Phase.AWAITING)
    assert names(scene.when(effects.TimerFired("result"))) == ["Publish report", "SetTimer result"]
    assert names(scene.hears(scene.result()))[4] == "DropCarry"


def test_lost_receipts_are_asked_for_and_only_missing_chunks_go_again() -> None:
    scene = at(Phase.SENDING)
    scene.hears(scene.receipt())
    assert names(scene.when(effects.TimerFired("receipt"))) == ["Publish report", "SetTimer receipt"]
    assert names(scene.hears(scene.receipt(b"\x05"))) == ["SetTimer receipt"], "it may still be on its way"
    assert names(scene.hears(scene.receipt(b"\x05", offer=2))) == ["SendChunk 1", "SetTimer receipt"]


def test_five_silences_tell_the_owner_once() -> None:
    scene = at(Phase.SENDING)
    told = [
        e for _ in range(9) for e in scene.when(effects.TimerFired("receipt")) if isinstance(e, effects.Tell)
    ]
    assert [tell.refusal for tell in told] == ["hub-silent"]


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.TRAINING, Phase.INTERRUPTED, Phase.SEALING])
def test_a_round_ends_on_the_device_too_when_its_result_was_lost(phase: Phase) -> None:
    """Otherwise a slow device works for hours for a round that is over, and its bloc waits for it."""
    scene = at(phase)
    stopped = ["StopWork"] if phase in (Phase.TRAINING, Phase.SEALING) else []
    out = scene.when(effects.TimerFired("result"))
    assert names(out) == [*stopped, "Save", "Publish decline", "SetTimer result"]
    assert scene.agent.phase is Phase.AWAITING
    assert scene.when(effects.TimerFired("receipt")) == []


def test_an_owner_who_becomes_stricter_in_a_round_is_obeyed_before_any_mask() -> None:
    scene = at(Phase.TRAINING)
    scene.agent.policy = msgspec.structs.replace(scene.agent.policy, bloc_devices_min=6)
    out = scene.when(effects.Trained(scene.agent.transcript, 9.0, 3, 3, 5, 1.0))
    assert names(out) == ["Tell", "Save", "Publish decline", "SetTimer result"]
    assert out[0].refusal == "small-bloc"
    assert scene.agent.phase is Phase.AWAITING


def test_a_round_that_was_missed_altogether_spends_the_ready() -> None:
    """OPEN lost, window over: the RESULT of a round unknown here says that our READY is used up."""
    scene = at(Phase.OFFERED)
    old = scene.saved
    out = scene.hears(scene.result(opened=False, round=1, transcript=b"\7" * 32))
    assert names(out) == ["Save", "Save", "Publish ready", "SetTimer ready"]
    assert scene.saved.ready != old.ready
    assert scene.saved.prekey != old.prekey
    assert scene.saved.last_round == 1
    assert scene.hears(scene.result(opened=False, round=1, transcript=b"\7" * 32)) == [], "once"


@pytest.mark.parametrize("phase", [Phase.OFFERED, Phase.SENDING, Phase.AWAITING])
def test_a_new_link_or_a_new_hub_hears_what_waits_for_an_answer(phase: Phase) -> None:
    scene = at(phase)
    word = "Publish ready" if phase is Phase.OFFERED else "Publish report"
    assert word in names(scene.when(effects.Connected()))
    assert word in names(scene.hub_state(7))
    assert scene.hub_state(7) == [], "the same start of the hub says nothing new"
    assert scene.hub_state(8, up=False) == []


# ---------------------------------------------------------------- duplicates
def test_everything_twice_changes_nothing() -> None:
    fleet = Fleet(5, seed=5)
    fleet.filter = lambda to, topic, payload: [payload, payload]
    fleet.begin(campaign(5, bloc=5))
    fleet.settle()
    fleet.check()
    assert len(fleet.opened()) == 2
    assert all(len(device.seals) == 2 for device in fleet.devices.values())


def test_late_outcomes_of_an_older_round_are_ignored() -> None:
    scene = at(Phase.TRAINING)
    old = b"\7" * 32
    assert scene.when(effects.Trained(old, 1.0, 1, 1, 1, 1.0)) == []
    assert scene.when(effects.WorkFailed(old, "killed")) == []
    assert scene.hears(scene.result(transcript=old)) == []
    scene = at(Phase.SEALING)
    assert scene.when(effects.Sealed(old, old, 9)) == []
    scene = at(Phase.SENDING)
    assert scene.hears(Receipt(transcript=old, digest=old, have=b"", accepted=True)) == []
    assert scene.agent.phase is Phase.SENDING


# ---------------------------------------------------------------- rounds that end otherwise
@pytest.mark.parametrize(
    "phase", [Phase.LOADING, Phase.TRAINING, Phase.SEALING, Phase.SENDING, Phase.AWAITING]
)
def test_a_bloc_that_sat_out_leaves_the_carry(phase: Phase) -> None:
    scene = at(phase)
    out = names(scene.hears(scene.result(opened=False, reason="window-over")))
    assert "KeepCarry" in out
    assert "DropCarry" not in out
    assert ("StopWork" in out) == (phase in (Phase.TRAINING, Phase.SEALING))
    assert out[-2:] == ["Publish ready", "SetTimer ready"]
    assert scene.saved.rounds_opened == 0


def test_a_round_that_the_hub_does_not_know_leaves_nothing() -> None:
    """Its sum may have been opened before the hub lost its memory: count nothing twice."""
    scene = at(Phase.AWAITING)
    out = names(scene.hears(scene.result(opened=False, reason="unknown-round", round=0)))
    assert "DropCarry" in out
    assert "KeepCarry" not in out
    assert scene.agent.phase is Phase.OFFERED


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.SEALING])
def test_work_that_failed_is_declined_and_never_sealed_later(phase: Phase) -> None:
    scene = at(phase)
    out = scene.when(effects.WorkFailed(scene.agent.transcript, "out of memory"))
    assert names(out) == ["Tell", "Save", "Publish decline", "SetTimer result"]
    decline = decode(decode_envelope(out[2].payload).body, Decline)
    assert (decline.transcript, decline.reason) == (scene.agent.transcript, "work-failed")
    assert out[1].state.consumed == scene.agent.transcript
    assert names(scene.when(effects.TimerFired("result"))) == ["Save", "Publish decline", "SetTimer result"]
    scene.new_process()
    assert "Publish decline" in names(scene.when(effects.Started()))


def test_a_round_that_is_too_large_for_the_board_is_declined_by_that_name() -> None:
    scene = at(Phase.TRAINING)
    out = scene.when(effects.WorkFailed(scene.agent.transcript, "140 MB, the owner allows 60 MB", "memory"))
    decline = decode(decode_envelope(out[2].payload).body, Decline)
    assert decline.reason == "memory"
    assert "60 MB" in out[0].text


def test_an_adapter_that_cannot_be_had_is_declined() -> None:
    scene = at(Phase.LOADING)
    out = scene.when(effects.FetchFailed(bytes(32), "no route"))
    assert names(out) == ["Tell", "SetTimer fetch"]
    assert names(scene.when(effects.TimerFired("fetch"))) == ["FetchBlob"]
    out = scene.when(effects.FetchFailed(bytes(32), "gone", final=True))
    assert "Publish decline" in names(out)


def test_a_refused_report_waits_for_the_end_of_the_round() -> None:
    scene = at(Phase.SENDING)
    out = scene.hears(scene.receipt(refused="changed-report"))
    assert [e.refusal for e in out if isinstance(e, effects.Tell)] == ["changed-report"]
    assert scene.agent.phase is Phase.AWAITING
    assert not scene.saved.accepted


# ---------------------------------------------------------------- after a cut
@pytest.mark.parametrize(
    ("phase", "first"),
    [
        (Phase.IDLE, []),
        (Phase.FETCHING, ["FetchBundle"]),
        (Phase.OFFERED, ["Publish ready", "SetTimer ready"]),
        (Phase.LOADING, ["SetTimer result", "FetchBlob"]),
        (Phase.TRAINING, ["SetTimer result", "FetchBlob"]),
        (Phase.INTERRUPTED, ["SetTimer result", "FetchBlob"]),
        (Phase.SEALING, ["Save", "Publish decline", "SetTimer result"]),
        (Phase.SENDING, ["Publish report", "SetTimer receipt"]),
        (Phase.AWAITING, ["Publish report", "SetTimer result"]),
        (Phase.CLOSED, []),
    ],
)
def test_the_phase_after_a_cut_follows_from_the_saved_state(phase: Phase, first: list[str]) -> None:
    scene = at(phase)
    scene.new_process()
    assert names(scene.when(effects.Started())) == ["Save", *first]
    back = {Phase.TRAINING: Phase.LOADING, Phase.INTERRUPTED: Phase.LOADING, Phase.SEALING: Phase.AWAITING}
    assert scene.agent.phase is back.get(phase, phase)


def test_a_report_is_offered_with_the_same_digest_after_a_cut() -> None:
    scene = at(Phase.SENDING)
    digest = scene.saved.report
    scene.new_process()
    offer = scene.when(effects.Started())[1]
    assert decode(decode_envelope(offer.payload).body, Report).digest == digest


# ---------------------------------------------------------------- campaigns
def test_a_new_campaign_takes_nothing_over_from_the_closed_one() -> None:
    """RESULT first, then the closing: a READY for the old campaign is already out."""
    scene = at(Phase.AWAITING)
    scene.hears(scene.result())
    scene.hears(scene.announcement(closed=True))
    assert scene.agent.phase is Phase.CLOSED
    out = scene.hears(scene.announcement("c2"))
    assert names(out) == [*CANCELLED, "DropCarry", "Save", "Save", "Publish ready", "SetTimer ready"]
    ready = decode(decode_envelope(scene.saved.ready).body, Ready)
    assert (ready.campaign, ready.counter) == ("c2", 3)
    assert (scene.saved.card, scene.saved.last_round) == (b"", 0)


def test_a_round_of_a_closed_campaign_is_given_up_for_the_next() -> None:
    scene = at(Phase.TRAINING)
    old = scene.agent.transcript
    assert names(scene.hears(scene.announcement(closed=True))) == ["Save"]
    out = scene.hears(scene.announcement("c2"))
    assert out[0] == effects.StopWork(old)
    assert effects.DropCarry(old) in out
    assert scene.agent.phase is Phase.OFFERED
    assert scene.when(effects.Trained(old, 9.0, 3, 3, 5, 1.0))[0].refusal == "stale-work"


def test_another_campaign_waits_until_the_running_one_is_closed() -> None:
    scene = at(Phase.OFFERED)
    waiting = scene.announcement("c2", sequence=50)
    assert scene.hears(waiting) == []
    scene.hears(scene.announcement(closed=True))
    assert decode(decode_envelope(scene.saved.ready).body, Ready).campaign == "c2"


def test_the_bundle_of_another_manifest_is_fetched_first() -> None:
    scene = at(Phase.OFFERED)
    scene.hears(scene.announcement(closed=True))
    other = BlobRef(b"\7" * 32, 8)
    assert names(scene.hears(scene.announcement("c2", manifest=other)))[-1] == "FetchBundle"
    assert scene.when(effects.TimerFired("ready")) == []
    assert names(scene.when(effects.TimerFired("fetch"))) == ["FetchBundle"]
    assert scene.when(effects.Fetched(b"\6" * 32)) == []
    assert "Publish ready" in names(scene.when(effects.Fetched(b"\7" * 32)))


def test_a_device_that_joins_when_the_blocs_are_formed_just_waits() -> None:
    fleet = Fleet(6)
    fleet.begin(campaign(5, bloc=5))
    fleet.run()
    members = next(row for row in fleet.rows.values() if hasattr(row, "members")).members
    late = next(device for device in fleet.devices.values() if device.name not in members)
    assert late.refusals == []
    assert late.seals == []
    assert fleet.campaign.closed
    assert late.agent.phase is Phase.CLOSED


def test_effects_decided_before_a_refusal_stand() -> None:
    """State in memory and on the disk are one, whatever goes wrong after a Save."""
    scene = at(Phase.FETCHING)

    def handler(agent: Agent, now: float, event: object) -> Iterator[effects.Effect]:
        yield agent._save(boot=77)
        agent.verifier.open(b"\xc1", Open, role="hub", now=now)

    row = TRANSITIONS[Phase.FETCHING]
    kept = row[effects.TimerFired]
    row[effects.TimerFired] = handler
    try:
        out = scene.when(effects.TimerFired("fetch"))
    finally:
        row[effects.TimerFired] = kept
    assert names(out) == ["Save", "Tell"]
    assert scene.saved == scene.agent.state
