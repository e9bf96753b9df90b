"""A hub that wants to choose who stands beside whom. Every card is sealed with its own key; the device refuses it.

What a hub can still do is in the last tests, said plainly: it may leave READYs out, and then it shows another root.
"""

import hashlib

import pytest
from adversary import VICTIM, Bench, changed, ready_of, stranger
from playbook import Fleet, campaign, signer

from fedge import formation
from fedge.formation import Candidate, cut, make_cards
from fedge.messages import BlocCard, Facts, Ready, decode, decode_envelope


def candidate(envelope: bytes) -> Candidate:
    body = decode_envelope(envelope).body
    return Candidate.of(decode(body, Ready), body, envelope)


def formed_by(stage: Bench, envelopes: list[bytes], beacon: bytes = b"", number: int = 1) -> list[BlocCard]:
    """The cards that a hub makes of these READYs, each with a flawless path to one root."""
    beacon = beacon or stage.card.beacon
    blocs = cut([candidate(one) for one in envelopes], 8, beacon, stage.announcement.adapter.size)
    names = [f"bloc-{index}" for index in range(len(blocs))]
    return make_cards("c1", blocs, names, beacon=beacon, formation=number)


def outsiders(stage: Bench, count: int) -> list[bytes]:
    """Genuine READYs of further devices of the fleet, which the hub may have invented if it holds the CA as well."""
    return [
        ready_of(name, signer(stage.fleet.root, name, "device", 60 + index), secret=bytes([index + 1]) * 32)
        for index, name in enumerate(f"e{index:02d}" for index in range(count))
    ]


def test_the_honest_card_made_again_is_the_same_card() -> None:
    """The bench's own tool: what is refused below is refused for the one thing that is wrong."""
    stage = Bench()
    assert formed_by(stage, list(stage.card.roster)) == [stage.card]
    stage.accepts()


# ---------------------------------------------------------------- members
def test_a_member_moved_to_another_place() -> None:
    stage = Bench()
    card = stage.card
    order = [1, 0, *range(2, 8)]
    members = tuple(card.members[place] for place in order)
    roster = tuple(card.roster[place] for place in order)
    moved = changed(card, members=members, roster=roster)
    stage.refuses("bad-formation", moved)
    leaf = formation.bloc_leaf(members, [candidate(envelope).digest for envelope in roster])
    stage.refuses("bad-formation", changed(moved, root=leaf))
    stage.accepts()


def test_a_member_swapped_for_a_colluder_with_the_old_path() -> None:
    stage = Bench()
    place = next(place for place, member in enumerate(stage.card.members) if member != VICTIM)
    (colluder,) = outsiders(stage, 1)
    members, roster = list(stage.card.members), list(stage.card.roster)
    members[place], roster[place] = "e00", colluder
    stage.refuses("bad-formation", changed(stage.card, members=tuple(members), roster=tuple(roster)))
    stage.accepts()


def test_members_without_their_readys() -> None:
    stage = Bench()
    stage.refuses("bad-formation", changed(stage.card, roster=()))
    stage.refuses("bad-formation", changed(stage.card, roster=stage.card.roster[:-1]))
    stage.refuses("bad-formation", changed(stage.card, roster=stage.card.roster[::-1]))
    stage.accepts()


def test_a_ready_that_its_member_never_signed() -> None:
    """The hub says of a member that it is slow, or has another prekey, to move it in the order."""
    stage = Bench()
    for name, by in ((VICTIM, stage.hub), ("d05", stage.hub), ("d05", stranger("d05"))):
        forged = ready_of(name, by)
        roster = [
            forged if member == name else envelope
            for member, envelope in zip(stage.card.members, stage.card.roster, strict=True)
        ]
        (card,) = formed_by(stage, roster)
        stage.refuses("bad-formation", card)
    stage.accepts()


def test_a_member_said_to_be_another_device() -> None:
    stage = Bench()
    other = signer(stage.fleet.root, "e01", "device", 61)
    (card,) = formed_by(stage, [*stage.card.roster[:-1], ready_of(stage.card.members[-1], other)])
    stage.refuses("bad-formation", card)
    stage.accepts()


# ---------------------------------------------------------------- beacons
def test_a_beacon_chosen_after_the_readys_were_said() -> None:
    """The hub tries beacons until the victim stands where it wants it; none of them leads to the commitment."""
    stage = Bench()
    for attempt in range(20):
        beacon = hashlib.sha256(b"%d" % attempt).digest()
        for card in formed_by(stage, list(stage.card.roster), beacon):
            stage.refuses("bad-formation", card)
    stage.accepts()


@pytest.mark.parametrize("number", [0, 2, 1_024, 1_025])
def test_the_beacon_of_another_formation(number: int) -> None:
    stage = Bench()
    stage.refuses("bad-formation", changed(stage.card, formation=number))
    if 1 < number <= 1_024:
        later = formation.beacon_of(stage.fleet.campaign.beacon_secret, number)
        stage.refuses("bad-formation", changed(stage.card, beacon=later))
    stage.accepts()


def test_an_announcement_that_changes_its_commitment() -> None:
    stage = Bench()
    secret = b"\7" * 32
    swapped = changed(stage.announcement, sequence=99, beacon=formation.beacon_commitment(secret))
    topic = "fl/v1/ann/c1"
    stage.refuses("changed-campaign", swapped, topic=topic)
    stage.accepts()


# ---------------------------------------------------------------- roots
def test_a_path_to_another_root() -> None:
    stage = Bench()
    wrong = bytes(32)
    for change in (
        {"root": wrong},
        {"path": (wrong,)},
        {"path": (wrong,), "blocs": 2},
        {"index": 1},
        {"index": 1, "blocs": 2},
        {"blocs": 0},
    ):
        stage.refuses("bad-formation", changed(stage.card, **change))
    stage.accepts()


def test_two_partitions_shown_to_two_halves_are_under_two_roots() -> None:
    """Each card is flawless by itself. Whoever compares roots, or reads the ledger, sees that there were two."""
    stage = Bench()
    shown = formed_by(stage, [*stage.card.roster, *outsiders(stage, 8)])
    assert len({card.root for card in shown}) == 1
    assert stage.card.root not in {card.root for card in shown}
    roots = {entry.detail["root"] for entry in stage.fleet.kinds("formed")}
    assert roots == {stage.card.root.hex()}, "the ledger has the one that was formed"


# ---------------------------------------------------------------- what is left
def test_a_hub_cannot_reorder_those_that_it_takes() -> None:
    """Whichever READYs it leaves out, two devices that it takes keep their order: it can only move the cuts."""
    fleet = Fleet(24)
    fleet.begin(campaign(24))
    fleet.settle()
    rows = sorted((row for row in fleet.hub.campaigns["c1"].blocs.values()), key=lambda bloc: bloc.row.id)
    cards = [decode(decode_envelope(bloc.row.card).body, BlocCard) for bloc in rows]
    everyone = [candidate(envelope) for card in cards for envelope in card.roster]
    order = [one.ready.device for one in everyone]
    for left_out in range(24):
        taken = [one for place, one in enumerate(everyone) if place != left_out]
        blocs = cut(taken, 8, cards[0].beacon, fleet.campaign.adapter.size)
        placed = [one.ready.device for bloc in blocs for one in bloc]
        assert placed == [name for name in order if name in placed]


def test_nobody_can_be_aimed_at_by_name() -> None:
    """Among equals, who stands beside the victim follows from a hash: over many beacons, anybody."""
    ready = Ready(
        campaign="c1",
        device="d00",
        counter=1,
        prekey=bytes(32),
        stay_seconds=9,
        facts=Facts(samples_bucket=9),
    )
    everyone = []
    for number in range(24):
        body = b"ready of %d" % number
        told = changed(ready, device=f"d{number:02d}")
        everyone.append(Candidate(told, hashlib.sha256(body).digest(), body))
    beside: set[str] = set()
    for attempt in range(40):
        for bloc in cut(everyone, 8, hashlib.sha256(b"%d" % attempt).digest(), 8_192):
            names = {one.ready.device for one in bloc}
            if VICTIM in names:
                beside |= names
    assert beside == {f"d{number:02d}" for number in range(24)}
