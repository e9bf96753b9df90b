"""What a device may try on the hub, with its own genuine key. The hub refuses it by name and nothing else changes."""

import dataclasses
import hashlib
import random

import msgspec
import pytest
from adversary import Bench, changed, ready_of, stranger, tampered
from playbook import kind_of

from edge_agent.round import Phase
from fedge import topics
from fedge.frames import ChunkHeader, encode_frame
from fedge.identity import Signer
from fedge.messages import Decline, Report, Result, decode, decode_envelope
from hub import effects as hub_effects
from hub.effects import DeviceRow, RoundRow

THIEF, OTHER = "d03", "d05"


def in_round() -> Bench:
    """The round is open and everybody has sealed; what the thief would say is held back."""
    stage = Bench()
    for name, held in stage.held.items():
        stage.fleet.publish("hub", topics.commands(name), held["bloccard"], False)
        stage.fleet.publish("hub", topics.commands(name), held["open"], False)
    stage.fleet.filter = lambda to, topic, payload: [] if topics.device_of(topic) == THIEF else [payload]
    stage.accepts()
    stage.fleet.run()
    return stage


def report(stage: Bench, device: str = THIEF, **changes: object) -> Report:
    saved = stage.fleet.devices[device].saved
    honest = Report(
        campaign="c1",
        bloc="bloc-0",
        device=device,
        transcript=stage.fleet.devices[device].seals[0],
        digest=saved.report,
        size=saved.report_size,
    )
    return msgspec.structs.replace(honest, **changes)


def frames(stage: Bench, body: bytes, digest: bytes) -> None:
    frame = encode_frame(ChunkHeader(stage.victim.seals[0], digest, 0), body)
    stage.fleet.hub_event(hub_effects.Received(topics.chunks(THIEF), frame))


def row(stage: Bench) -> RoundRow:
    rounds = [row for row in stage.fleet.rows.values() if isinstance(row, RoundRow)]
    return min(rounds, key=lambda row: row.round)


def finish(stage: Bench) -> None:
    """The thief behaves from here on, and the campaign ends as if nothing had been tried."""
    stage.fleet.filter = lambda to, topic, payload: [payload]
    stage.fleet.settle()
    stage.fleet.check()
    assert len(stage.fleet.opened()) == 2


# ---------------------------------------------------------------- READY
def test_a_replayed_ready() -> None:
    """Somebody who listened says a device's old READY again, after a newer one and before the next."""
    stage = Bench()
    old = stage.victim.saved.ready
    newer = ready_of(THIEF, stage.victim.signer, counter=50)
    stage.held.clear()
    stage.fleet.filter = lambda to, topic, payload: []
    assert stage.tells_hub(THIEF, newer) == []
    stage.hub_refuses("replayed-ready", THIEF, ready_of(THIEF, stage.victim.signer, counter=49))
    assert stage.fleet.hub.contacts[THIEF].envelope == newer
    assert stage.tells_hub(THIEF, old) == [], "it opened the running round, so the answer is that OPEN"
    assert stage.fleet.hub.contacts[THIEF].envelope == newer


def test_a_ready_in_another_devices_name_or_topic() -> None:
    stage = Bench()
    own = ready_of(THIEF, stage.victim.signer)
    stage.hub_refuses("wrong-topic", THIEF, ready_of(OTHER, stage.victim.signer))
    stage.fleet.now += 61
    stage.hub_refuses("wrong-topic", OTHER, own)
    stage.fleet.now += 61
    stage.hub_refuses("wrong-topic", THIEF, ready_of(OTHER, stage.fleet.devices[OTHER].signer))
    stage.hub_refuses("unexpected", THIEF, own, topic="fl/v1/d/d03/up/x")
    stage.fleet.now += 61
    stage.hub_refuses("unexpected", THIEF, own, topic="fl/v1/hub/state")


def test_a_device_without_data_never_gets_a_place() -> None:
    stage = Bench()
    stage.hub_refuses("empty-member", THIEF, ready_of(THIEF, stage.victim.signer, samples_bucket=0))
    assert not stage.fleet.hub.contacts[THIEF].counted


def test_a_ready_for_a_campaign_that_never_was() -> None:
    stage = Bench()
    ready = tampered(
        ready_of(THIEF, stage.victim.signer), lambda raw: raw.update(campaign="c9"), stage.victim.signer
    )
    stage.hub_refuses("no-campaign", THIEF, ready)


def test_a_foreign_fleet_a_hubs_key_and_a_broken_signature() -> None:
    stage = Bench()
    stage.hub_refuses("bad-certificate", THIEF, ready_of(THIEF, stranger(THIEF)))
    stage.hub_refuses("wrong-role", THIEF, ready_of(THIEF, stage.hub))
    thief = Signer(stage.victim.signer.key, stage.fleet.devices[OTHER].signer.certificate)
    stage.hub_refuses("bad-signature", OTHER, ready_of(OTHER, thief))
    forged = tampered(stage.opening.roster[0], lambda raw: raw.update(counter=99))
    stage.hub_refuses("bad-signature", stage.card.members[0], forged)


def test_a_revoked_identity() -> None:
    stage = in_round()
    serial = 1000 + 10 + 3
    stage.fleet.hub.verifier = dataclasses.replace(stage.fleet.hub.verifier, revoked={serial})
    stage.hub_refuses("revoked", THIEF, report(stage))
    stage.fleet.now += 61
    stage.hub_refuses("revoked", THIEF, ready_of(THIEF, stage.victim.signer))
    stage.fleet.hub.verifier = dataclasses.replace(stage.fleet.hub.verifier, revoked=frozenset())
    finish(stage)


def test_an_expired_certificate() -> None:
    stage = Bench()
    stage.fleet.now += 4_000 * 86_400
    stage.hub_refuses("expired", THIEF, ready_of(THIEF, stage.victim.signer))


# ---------------------------------------------------------------- REPORT
def test_a_report_twice_is_counted_once() -> None:
    stage = in_round()
    body = stage.victim.reports[stage.victim.seals[0]]
    digest = hashlib.sha256(body).digest()
    for _ in range(3):
        assert stage.tells_hub(OTHER, report(stage, OTHER)) == []
    before = row(stage).sum
    assert stage.tells_hub(OTHER, report(stage, OTHER)) == []
    frames(stage, body, digest)
    assert row(stage).sum == before, "chunks without an offer are nothing"
    finish(stage)
    counted = [(entry.round, entry.device) for entry in stage.fleet.kinds("report")]
    assert len(counted) == len(set(counted)) == 16


def test_a_report_replayed_into_the_next_round_only_hears_the_result() -> None:
    stage = in_round()
    old = stage.victim.signer.seal(report(stage))
    stage.fleet.filter = lambda to, topic, payload: [] if kind_of(payload) == "open" else [payload]
    stage.fleet.fire_timers("receipt")
    stage.fleet.run()
    assert row(stage).state == "opened"
    assert stage.fleet.hub.campaigns["c1"].blocs["bloc-0"].row.round == 2
    before = dict(stage.fleet.rows)
    stage.fleet.filter = lambda to, topic, payload: []
    assert stage.tells_hub(THIEF, old) == ["unknown-round"]
    to, _, answer = stage.fleet.queue[-1]
    assert to == THIEF
    assert decode(decode_envelope(answer).body, Result).reason == "unknown-round"
    assert stage.fleet.rows == before


def test_a_resend_with_changed_input() -> None:
    """A second report under one transcript would give away the difference of two updates."""
    stage = in_round()
    assert stage.tells_hub(THIEF, report(stage)) == []
    before = row(stage)
    assert stage.tells_hub(THIEF, report(stage, digest=b"\7" * 32)) == ["changed-report"]
    assert row(stage) == before
    assert stage.fleet.rows[DeviceRow, ("", THIEF)].quarantined
    stage.hub_refuses("quarantined", THIEF, report(stage))


def test_a_changed_report_after_the_first_was_counted() -> None:
    stage = in_round()
    before = row(stage)
    assert stage.tells_hub(OTHER, report(stage, OTHER, digest=b"\7" * 32)) == ["changed-report"]
    assert row(stage) == before


def test_a_body_that_is_not_what_was_offered() -> None:
    stage = in_round()
    before, body = row(stage), stage.victim.reports[stage.victim.seals[0]]
    assert stage.tells_hub(THIEF, report(stage)) == []
    frames(stage, bytes(len(body)), stage.victim.saved.report)
    assert stage.fleet.hub_told[-1].refusal == "integrity"
    assert row(stage) == before
    finish(stage)


def test_a_report_of_another_size() -> None:
    stage = in_round()
    stage.hub_refuses("oversize", THIEF, report(stage, size=report(stage).size + 1))
    finish(stage)


def test_a_report_to_a_bloc_that_is_not_ones_own() -> None:
    stage = in_round()
    stage.hub_refuses("not-a-member", THIEF, report(stage, bloc="bloc-9"))
    stage.fleet.now += 61
    stage.hub_refuses("not-a-member", THIEF, report(stage, campaign="c9"))
    stage.hub_refuses("wrong-topic", THIEF, report(stage, OTHER))
    finish(stage)


def test_a_decline_for_another_device() -> None:
    stage = in_round()
    decline = Decline(
        campaign="c1", bloc="bloc-0", device=OTHER, transcript=stage.victim.seals[0], reason="no"
    )
    stage.hub_refuses("wrong-topic", THIEF, decline)
    stage.hub_refuses("wrong-topic", OTHER, decline, by=stage.victim.signer)
    finish(stage)


# ---------------------------------------------------------------- chunks and bytes
def test_chunks_that_do_not_fit() -> None:
    stage = in_round()
    assert stage.tells_hub(THIEF, report(stage)) == []
    digest, topic = stage.victim.saved.report, topics.chunks(THIEF)
    past = encode_frame(ChunkHeader(stage.victim.seals[0], digest, 9), b"x")
    short = encode_frame(ChunkHeader(stage.victim.seals[0], digest, 0), b"x")
    stage.hub_refuses("bad-chunk", THIEF, past, topic=topic)
    stage.fleet.now += 61
    stage.hub_refuses("bad-chunk", THIEF, short, topic=topic)
    stage.hub_refuses("oversize", THIEF, bytes(100_000), topic=topic)
    stage.hub_refuses("malformed", THIEF, b"FG\x01\xff\xff", topic=topic)
    finish(stage)


@pytest.mark.parametrize("topic", [topics.control(THIEF), topics.state(THIEF), topics.chunks(THIEF)])
def test_oversize_and_malformed(topic: str) -> None:
    stage = Bench()
    stage.hub_refuses("oversize", THIEF, bytes(100_000), topic=topic)
    for noise in (
        b"\xc1",
        b"\x91" * 60_000,
        b"\x81\xa1x" + b"\x91" * 60_000,
        random.Random(1).randbytes(500),
    ):
        stage.fleet.now += 61
        stage.hub_refuses("malformed", THIEF, noise, topic=topic)


def test_a_deeply_nested_message_under_a_genuine_certificate() -> None:
    stage = Bench()
    nested = b"\x81\xa1x" + b"\x91" * 60_000
    key = stage.victim.signer.key
    envelope = msgspec.msgpack.encode(
        [nested, stage.victim.signer.certificate, key.sign(b"fedge message v1\x00" + nested)]
    )
    stage.hub_refuses("malformed", THIEF, envelope)


def test_a_flood_of_refusals_writes_one_line_a_minute() -> None:
    stage = Bench()
    before = len(stage.fleet.ledger)
    for number in range(500):
        stage.fleet.now += 0.5
        stage.tells_hub(THIEF, b"\xc1" * (1 + number % 50))
    assert len(stage.fleet.kinds("refused")) == 5
    assert len(stage.fleet.ledger) == before + 5
    stage.fleet.now += 120
    stage.fleet.hub_event(hub_effects.TimerFired("tick"))
    assert not stage.fleet.hub.refused, "and is forgotten"


def test_a_flood_of_newer_readys_writes_no_line() -> None:
    stage = Bench()
    before = len(stage.fleet.ledger)
    for counter in range(50, 150):
        assert stage.tells_hub(THIEF, ready_of(THIEF, stage.victim.signer, counter=counter)) == []
    assert len(stage.fleet.ledger) == before


def test_a_changed_announcement_or_result_is_not_a_devices_to_send() -> None:
    stage = Bench()
    stage.hub_refuses("unexpected", THIEF, changed(stage.announcement, sequence=99))
    assert stage.victim.agent.phase is Phase.OFFERED
