"""A device checks how its bloc was formed: each card here is honest but for one thing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
import pytest
from scene import BEACONS, ME, MEMBERS, Scene, at, formed, names, stranger

from edge_agent import effects
from edge_agent.round import Phase
from fedge import formation
from fedge.messages import BlocCard, decode, decode_envelope, encode


def refused(scene: Scene, card: BlocCard) -> list[str]:
    before = scene.saved
    out = scene.hears(card)
    assert scene.saved == before
    return [effect.refusal for effect in out if isinstance(effect, effects.Tell)]


def readys(scene: Scene) -> dict[str, bytes]:
    return dict(zip(MEMBERS, scene.card().roster, strict=True))


def test_the_honest_card_is_pinned_with_its_proof() -> None:
    scene = at(Phase.OFFERED)
    assert scene.card().members == MEMBERS
    assert names(scene.hears(scene.card())) == ["Save"]
    assert decode(decode_envelope(scene.saved.card).body, BlocCard) == scene.card()


def test_newcomers_are_formed_with_a_later_beacon_of_the_same_chain() -> None:
    scene = at(Phase.OFFERED)
    card = formed(readys(scene).values(), number=7)
    assert card.beacon != scene.card().beacon
    assert names(scene.hears(card)) == ["Save"]


def test_the_ready_that_was_sorted_may_have_been_said_anew_since() -> None:
    scene = at(Phase.OFFERED)
    card = scene.card()
    scene.conditions(hot=True)
    assert scene.saved.ready not in card.roster
    assert names(scene.hears(card)) == ["Save"]


def no_roster(scene: Scene, card: BlocCard) -> BlocCard:
    return msgspec.structs.replace(card, roster=())


def too_short_a_roster(scene: Scene, card: BlocCard) -> BlocCard:
    return msgspec.structs.replace(card, roster=card.roster[:4])


def another_order(scene: Scene, card: BlocCard) -> BlocCard:
    """Sorted by hand: members, READYs and root agree with each other, and not with the public order."""
    members, roster = tuple(reversed(card.members)), tuple(reversed(card.roster))
    digests = [hashlib.sha256(decode_envelope(envelope).body).digest() for envelope in roster]
    root = formation.bloc_leaf(members, digests)
    return msgspec.structs.replace(card, members=members, roster=roster, root=root)


def a_beacon_of_its_own(scene: Scene, card: BlocCard) -> BlocCard:
    """Chosen after the READYs were heard."""
    return formed(card.roster, beacon=b"\6" * 32)


def a_later_beacon_as_the_first(scene: Scene, card: BlocCard) -> BlocCard:
    return formed(card.roster, number=1, beacon=formation.beacon_of(BEACONS, 2))


def another_root(scene: Scene, card: BlocCard) -> BlocCard:
    return msgspec.structs.replace(card, root=bytes(32))


def another_place_in_the_tree(scene: Scene, card: BlocCard) -> BlocCard:
    return msgspec.structs.replace(card, blocs=2)


def a_ready_of_somebody_else(scene: Scene, card: BlocCard) -> BlocCard:
    """d03 speaks in the name of d00."""
    forged = scene.fleet.devices["d03"].signer.seal(stranger("d00", "x"))
    return formed([forged, *card.roster[1:]])


def a_ready_for_another_campaign(scene: Scene, card: BlocCard) -> BlocCard:
    other = scene.fleet.devices["d00"].signer.seal(stranger("d00", "x", campaign="c2"))
    return formed([other, *card.roster[1:]])


def a_ready_that_nobody_signed(scene: Scene, card: BlocCard) -> BlocCard:
    envelope = decode_envelope(card.roster[0])
    return formed([encode(msgspec.structs.replace(envelope, signature=bytes(64))), *card.roster[1:]])


@pytest.mark.parametrize(
    "change",
    [
        no_roster,
        too_short_a_roster,
        another_order,
        a_beacon_of_its_own,
        a_later_beacon_as_the_first,
        another_root,
        another_place_in_the_tree,
        a_ready_of_somebody_else,
        a_ready_for_another_campaign,
        a_ready_that_nobody_signed,
    ],
)
def test_a_card_that_does_not_follow_is_refused(change: Callable[[Scene, BlocCard], BlocCard]) -> None:
    scene = at(Phase.OFFERED)
    assert refused(scene, change(scene, scene.card())) == ["bad-formation"]
    assert names(scene.hears(scene.card())) == ["Save"], "the one thing was the reason"


def test_a_ready_in_our_name_that_we_did_not_sign_is_refused() -> None:
    """A second certificate in our name: whoever can have one made still cannot put words into our mouth."""
    scene = at(Phase.OFFERED)
    double = Scene().fleet  # the same root, by the same seed
    key = double.devices["d04"].signer.key
    certificate = double.root.certify(
        ME, "device", key.public_key().public_bytes_raw(), serial=77, now=1_800_000_000.0, days=9
    )
    forged = type(scene.device.signer)(key, certificate).seal(stranger(ME, "x"))
    card = formed(forged if name == ME else ready for name, ready in readys(scene).items())
    assert refused(scene, card) == ["bad-formation"]


def test_the_beacon_of_a_running_campaign_may_not_change_and_its_pace_may() -> None:
    scene = at(Phase.OFFERED)
    out = scene.hears(scene.announcement(beacon=b"\7" * 32))
    assert [tell.refusal for tell in out] == ["changed-campaign"]
    assert names(scene.hears(scene.announcement(checkin_seconds=120))) == ["Save"]
