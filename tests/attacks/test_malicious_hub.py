"""What a hub may try on a device. Everything is sealed with the hub's own key; the device refuses it by name."""

import dataclasses
import hashlib
import random

import msgspec
import pytest
from adversary import VICTIM, Bench, changed, ready_of, stranger, tampered
from playbook import campaign, kind_of, signer

from edge_agent.policy import Policy
from edge_agent.round import Phase
from fedge import topics
from fedge.identity import Signer
from fedge.messages import BlobRef, Open, Receipt, Result, decode_envelope

NUMBERS = campaign(8).numbers


def bench() -> Bench:
    return Bench().pins_card()


def with_ready(stage: Bench, member: str, envelope: bytes) -> Open:
    roster = list(stage.opening.roster)
    roster[stage.card.members.index(member)] = envelope
    return changed(stage.opening, roster=tuple(roster))


# ---------------------------------------------------------------- rosters
def test_a_swapped_prekey() -> None:
    """The hub puts another prekey in the victim's place: one that the victim itself once signed."""
    stage = bench()
    older = ready_of(VICTIM, stage.victim.signer, counter=0)
    stage.refuses("swapped-prekey", with_ready(stage, VICTIM, older))
    stage.accepts()


def test_a_prekey_changed_under_a_signature() -> None:
    stage = bench()
    position = stage.card.members.index("d05")
    forged = tampered(stage.opening.roster[position], lambda raw: raw.update(prekey=b"\1" * 32))
    stage.refuses("bad-signature", with_ready(stage, "d05", forged))
    stage.refuses("wrong-role", with_ready(stage, "d05", ready_of("d05", stage.hub)))
    stage.accepts()


def test_an_invented_member() -> None:
    """A member for whom no fleet root vouches: self-made, or of another fleet."""
    stage = bench()
    stage.refuses("bad-certificate", with_ready(stage, "d05", ready_of("d05", stranger("d05"))))
    own = Signer(stage.hub.key, decode_envelope(stage.opening.roster[0]).certificate)
    stage.refuses(
        "bad-signature", with_ready(stage, stage.card.members[0], ready_of(stage.card.members[0], own))
    )
    stage.accepts()


def test_a_cloned_member_in_a_card() -> None:
    stage = Bench()
    members = (VICTIM, "d00", "d01", "d02", "d04", "d00", "d00", "d00")
    stage.refuses("cloned-member", changed(stage.card, members=members))
    stage.accepts()


def test_two_members_with_one_prekey() -> None:
    """Two colluders say the same prekey, so that their masks cancel between them."""
    stage = bench()
    for name in ("d05", "d06"):
        clone = ready_of(name, stage.fleet.devices[name].signer, counter=7)
        stage.opening = with_ready(stage, name, clone)
    stage.refuses("cloned-member", stage.opening)
    stage.accepts()


def test_a_roster_that_is_not_the_bloc() -> None:
    stage = bench()
    outsider = signer(stage.fleet.root, "d77", "device", 77)
    roster = stage.opening.roster
    stage.refuses("foreign-roster", with_ready(stage, "d05", ready_of("d77", outsider)))
    stage.refuses("foreign-roster", with_ready(stage, "d05", ready_of("d05", outsider)))
    stage.refuses("foreign-roster", changed(stage.opening, roster=roster[::-1]))
    stage.refuses("foreign-roster", changed(stage.opening, roster=roster[:-1]))
    stage.refuses(
        "foreign-roster", changed(stage.opening, roster=roster[:-1], steps=stage.opening.steps[:-1])
    )
    stage.refuses("foreign-bloc", changed(stage.opening, card=hashlib.sha256(b"another bloc").digest()))
    stage.accepts()


def test_a_ready_said_for_another_campaign() -> None:
    stage = bench()
    other = stage.card.members[0]
    forged = tampered(
        stage.opening.roster[0], lambda raw: raw.update(campaign="c9"), stage.fleet.devices[other].signer
    )
    stage.refuses("other-campaign", with_ready(stage, other, forged))
    stage.accepts()


def test_a_member_with_an_empty_sample_bucket() -> None:
    stage = bench()
    idle = ready_of("d05", stage.fleet.devices["d05"].signer, samples_bucket=0)
    stage.refuses("empty-member", with_ready(stage, "d05", idle))
    stage.accepts()


# ---------------------------------------------------------------- blocs
def test_a_bloc_below_the_floor() -> None:
    stage = Bench()
    stage.refuses("small-bloc", changed(stage.card, members=(VICTIM, "d00", "d01", "d02")))
    stage.refuses("small-bloc", changed(stage.card, members=(VICTIM,)))
    stage.accepts()


def test_a_bloc_below_the_owners_own_floor() -> None:
    stage = Bench(policy=Policy(bloc_devices_min=9))
    stage.refuses("small-bloc", stage.card_envelope)
    stage.refuses("no-card", stage.open_envelope)


def test_a_bloc_without_the_device() -> None:
    stage = Bench()
    members = tuple(member for member in stage.card.members if member != VICTIM)
    stage.refuses("foreign-bloc", changed(stage.card, members=members))
    stage.refuses("other-campaign", changed(stage.card, campaign="c9"))
    stage.refuses("no-card", stage.open_envelope)
    stage.accepts()


def test_a_second_partition() -> None:
    stage = bench()
    stage.refuses("second-partition", changed(stage.card, bloc="bloc-9"))
    stage.refuses("second-partition", changed(stage.card, members=stage.card.members[::-1]))
    stage.refuses("second-partition", changed(stage.card, members=(*stage.card.members[:7], "d77")))
    stage.accepts()
    stage.honest_round()
    stage.refuses("no-campaign", changed(stage.card, bloc="bloc-9"))


# ---------------------------------------------------------------- rounds
def test_a_replayed_open() -> None:
    stage = Bench()
    stage.honest_round()
    assert len(stage.victim.seals) == 2
    assert stage.says(stage.open_envelope) == ["no-ready"]
    assert len(stage.victim.seals) == 2


def test_an_open_replayed_while_the_next_ready_is_out() -> None:
    stage = bench()
    stage.fleet.filter = lambda to, topic, payload: [] if kind_of(payload) == "ready" else [payload]
    for name, held in stage.held.items():
        stage.fleet.publish("hub", topics.commands(name), held["bloccard"], False)
        stage.fleet.publish("hub", topics.commands(name), held["open"], False)
    stage.fleet.run()
    assert stage.victim.agent.phase is Phase.OFFERED
    stage.refuses("stale-round", stage.open_envelope)
    stage.refuses("stale-round", changed(stage.opening, window_seconds=9))
    stage.refuses("swapped-prekey", changed(stage.opening, round=2))  # with the READYs of the first round


def test_an_open_repeated_in_its_round_is_answered_with_the_same_bytes() -> None:
    stage = bench()
    stage.accepts()
    report = stage.victim.reports[stage.victim.seals[0]]
    for _ in range(5):
        assert stage.says(stage.open_envelope) == []
    assert len(stage.victim.seals) == 1
    assert stage.victim.reports[stage.victim.seals[0]] == report


def test_two_opens_for_one_round() -> None:
    stage = bench()
    stage.accepts()
    codec = changed(stage.opening.codec, bits=8)
    for other in (
        changed(stage.opening, codec=codec),
        changed(stage.opening, adapter=BlobRef(b"\7" * 32, stage.opening.adapter.size)),
        changed(stage.opening, window_seconds=9),
        changed(stage.opening, round=2),
    ):
        stage.refuses("second-open", other)


def test_another_model_under_the_campaign() -> None:
    stage = bench()
    stage.refuses("other-model", changed(stage.opening, manifest=b"\7" * 32))
    stage.refuses("other-model", changed(stage.opening, adapter=BlobRef(stage.opening.adapter.sha256, 8)))
    stage.refuses("other-campaign", changed(stage.opening, campaign="c9"))
    stage.accepts()


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 12), ("bits", 32), ("step", 0.0), ("clip", float("nan")), ("seed", b"")]
)
def test_a_codec_that_is_none(field: str, value: object) -> None:
    stage = bench()
    forged = tampered(stage.open_envelope, lambda raw: raw["codec"].update({field: value}), stage.hub)
    stage.refuses("bad-codec", forged)
    stage.accepts()


def test_a_plan_that_idles_all_but_one() -> None:
    stage = bench()
    for steps in (
        (1, 1, 1, 100, 1, 1, 1, 1),
        (0, 0, 0, 5, 0, 0, 0, 0),
        (2, 2, 2, 6, 2, 2, 2, 2),
        (10**5,) * 8,
    ):
        stage.refuses("idle-plan", changed(stage.opening, steps=steps))
    stage.accepts()


# ---------------------------------------------------------------- who speaks
def test_another_hub_of_the_fleet() -> None:
    stage = bench()
    other = signer(stage.fleet.root, "hub-2", "hub", 66)
    stage.refuses("wrong-hub", stage.opening, by=other)
    stage.refuses("wrong-hub", changed(stage.announcement, sequence=99), topic="fl/v1/ann/c1", by=other)
    stage.accepts()
    transcript = stage.victim.seals[0]
    result = Result(campaign="c1", bloc="bloc-0", round=1, transcript=transcript, opened=True)
    stage.refuses("wrong-hub", result, by=other)
    accepted = Receipt(transcript=transcript, digest=stage.victim.saved.report, have=b"", accepted=True)
    stage.refuses("wrong-hub", accepted, topic=topics.receipts(VICTIM), by=other)


def test_a_foreign_fleet_and_a_device_that_plays_the_hub() -> None:
    stage = bench()
    colluder = stage.fleet.devices["d05"].signer
    stage.refuses("bad-certificate", stage.opening, by=stranger("hub", "hub"))
    stage.refuses("wrong-role", stage.opening, by=colluder)
    stage.refuses("wrong-role", stage.card, by=colluder)
    stage.accepts()
    result = Result(campaign="c1", bloc="bloc-0", round=1, transcript=stage.victim.seals[0], opened=True)
    accepted = Receipt(
        transcript=stage.victim.seals[0], digest=stage.victim.saved.report, have=b"", accepted=True
    )
    stage.refuses("wrong-role", result, by=colluder)
    stage.refuses("wrong-role", accepted, topic=topics.receipts(VICTIM), by=colluder)
    stage.refuses("wrong-role", changed(stage.announcement, sequence=99), topic="fl/v1/ann/c1", by=colluder)
    as_hub = Signer(colluder.key, stage.hub.certificate)
    stage.refuses("bad-signature", result, by=as_hub)
    stage.refuses("bad-signature", accepted, topic=topics.receipts(VICTIM), by=as_hub)
    stage.refuses("bad-signature", changed(stage.announcement, sequence=99), topic="fl/v1/ann/c1", by=as_hub)
    assert stage.says(result) == []
    assert stage.victim.carry is None


def test_a_revoked_hub() -> None:
    stage = bench()
    stage.victim.agent.verifier = dataclasses.replace(stage.victim.verifier, revoked={1001})
    stage.refuses("revoked", stage.open_envelope)
    stage.victim.agent.verifier = stage.victim.verifier
    stage.accepts()


def test_an_older_announcement_is_ignored() -> None:
    stage = Bench()
    stage.honest_round()
    before = stage.victim.saved
    assert before.sequence > stage.announcement.sequence
    old = stage.hub.seal(stage.announcement)
    assert stage.says(old, topic="fl/v1/ann/c1") == []
    assert stage.victim.saved == before


def test_a_campaign_that_changes_under_way() -> None:
    stage = bench()
    topic = topics.announcement("c1")
    now = changed(stage.announcement, sequence=99)
    training = changed(stage.announcement.training, rate=5.0)
    for forged in (
        changed(now, training=training),
        changed(now, manifest=BlobRef(b"\7" * 32, 8)),
        changed(now, publisher=b"\7" * 32),
        changed(now, lora=changed(stage.announcement.lora, r=16)),
        changed(now, adapter=BlobRef(b"\7" * 32, 5)),
    ):
        stage.refuses("changed-campaign", forged, topic=topic)
    assert stage.says(changed(now, adapter_version=5), topic=topic) == []
    stage.refuses("changed-campaign", changed(now, sequence=100, adapter_version=4), topic=topic)
    stage.accepts()


def test_a_closed_campaign_cannot_open_again() -> None:
    stage = Bench()
    stage.honest_round()
    assert stage.victim.agent.phase is Phase.CLOSED
    stage.refuses("changed-campaign", changed(stage.announcement, sequence=99), topic="fl/v1/ann/c1")


def test_a_publisher_whom_the_owner_does_not_know() -> None:
    stage = bench()
    stage.victim.agent.policy = Policy(publishers=("ab" * 32,))
    stage.refuses("policy", changed(stage.announcement, sequence=99), topic="fl/v1/ann/c1")


# ---------------------------------------------------------------- bytes
@pytest.mark.parametrize(
    "topic", [topics.commands(VICTIM), topics.receipts(VICTIM), "fl/v1/ann/c1", topics.HUB_STATE]
)
def test_oversize_and_malformed(topic: str) -> None:
    stage = bench()
    stage.refuses("oversize", bytes(70_000), topic=topic)
    for noise in (
        b"",
        b"\xc1",
        b"\x91" * 60_000,
        b"\x81\xa1x" + b"\x91" * 60_000,
        random.Random(1).randbytes(500),
    ):
        stage.refuses("malformed", noise, topic=topic)
    nested = stage.hub.key.sign(b"")  # a signature of the right length over something else
    envelope = msgspec.msgpack.encode([b"\x81\xa1x" + b"\x91" * 60_000, stage.hub.certificate, nested])
    if topic != topics.HUB_STATE:
        assert stage.says(envelope, topic=topic) in (["malformed"], ["bad-signature"])
    stage.accepts()


def test_messages_of_a_kind_that_no_hub_sends() -> None:
    stage = bench()
    stage.refuses("unexpected", stage.opening.roster[0])
    stage.refuses("unexpected", stage.announcement)
    stage.refuses("unexpected", stage.opening, topic=topics.receipts(VICTIM))
    stage.refuses("unexpected", stage.opening, topic="fl/v1/ann/c1")
    stage.accepts()


def test_the_honest_hub_is_refused_nothing() -> None:
    stage = Bench()
    stage.honest_round()
    stage.fleet.check()
    assert stage.fleet.campaign.closed
    assert not [refusal for device in stage.fleet.devices.values() for refusal in device.refusals]
    assert not stage.fleet.hub_told
