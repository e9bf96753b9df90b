"""How blocs are formed: every honest card checks, and no card with one thing moved does."""

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import formation, limits
from fedge.errors import ProtocolError
from fedge.formation import Candidate, Tree, check_card, cut, make_cards, root_from, sort_key
from fedge.messages import BlocCard, Facts, Ready, encode

SECRET = hashlib.sha256(b"secret").digest()
COMMITMENT = formation.beacon_commitment(SECRET)
ADAPTER_BYTES = 8_192


def candidate(number: int, *, stay: int = 86_400, **facts: float) -> Candidate:
    ready = Ready(
        campaign="c1",
        device=f"d{number:03d}",
        counter=1,
        prekey=hashlib.sha256(b"%d" % number).digest(),
        stay_seconds=stay,
        facts=Facts(samples_bucket=9, **facts),
    )
    body = encode(ready)
    return Candidate(ready, hashlib.sha256(body).digest(), b"envelope of " + body)


def formed(candidates: list[Candidate], devices: int = 5, number: int = 1) -> list[BlocCard]:
    beacon = formation.beacon_of(SECRET, number)
    blocs = cut(candidates, devices, beacon, ADAPTER_BYTES)
    names = [f"bloc-{index}" for index in range(len(blocs))]
    return make_cards("c1", blocs, names, beacon=beacon, formation=number)


def readys_of(card: BlocCard, candidates: list[Candidate]) -> list[tuple[Ready, bytes]]:
    by_name = {one.ready.device: (one.ready, one.digest) for one in candidates}
    return [by_name[member] for member in card.members]


def refused(card: BlocCard, readys: list[tuple[Ready, bytes]], commitment: bytes = COMMITMENT) -> str:
    with pytest.raises(ProtocolError) as refusal:
        check_card(card, readys, commitment, ADAPTER_BYTES)
    assert refusal.value.name == "bad-formation"
    return refusal.value.field


fleets = st.lists(
    st.tuples(
        st.sampled_from([60, 700, 4_000, 86_400]),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.5, 7.0, 90.0]),
        st.integers(0, 16),
    ),
    min_size=5,
    max_size=60,
).map(
    lambda rows: [
        candidate(number, stay=stay, history_bucket=history, seconds_per_step=pace, link_bucket=link)
        for number, (stay, history, pace, link) in enumerate(rows)
    ]
)


# ---------------------------------------------------------------- an honest formation
@given(candidates=fleets, devices=st.integers(5, 9), number=st.integers(1, limits.FORMATIONS_MAX))
@settings(max_examples=60, deadline=None)
def test_every_card_of_a_formation_checks(candidates: list[Candidate], devices: int, number: int) -> None:
    if len(candidates) < devices:
        assert cut(candidates, devices, SECRET, ADAPTER_BYTES) == []
        return
    cards = formed(candidates, devices, number)
    assert len(cards) == len(candidates) // devices
    assert len({card.root for card in cards}) == 1
    placed = [member for card in cards for member in card.members]
    assert len(placed) == len(set(placed)) == len(cards) * devices
    for card in cards:
        check_card(card, readys_of(card, candidates), COMMITMENT, ADAPTER_BYTES)


@given(candidates=fleets, seed=st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_who_came_first_changes_nothing(candidates: list[Candidate], seed: object) -> None:
    shuffled = list(candidates)
    seed.shuffle(shuffled)
    assert formed(shuffled) == formed(candidates)


@given(candidates=fleets)
@settings(max_examples=30, deadline=None)
def test_blocs_follow_each_other_in_the_public_order(candidates: list[Candidate]) -> None:
    beacon = formation.beacon_of(SECRET, 1)
    facts = {one.ready.device: sort_key(one.ready, one.digest, beacon, ADAPTER_BYTES) for one in candidates}
    keys = [facts[member] for card in formed(candidates) for member in card.members]
    assert keys == sorted(keys)


def test_stay_comes_before_history_and_history_before_speed() -> None:
    def order(*candidates: Candidate) -> list[str]:
        blocs = cut(candidates, 1, SECRET, ADAPTER_BYTES)
        return [bloc[0].ready.device for bloc in blocs]

    short = candidate(0, stay=60, history_bucket=4)
    slow = candidate(1, seconds_per_step=90.0, history_bucket=3)
    new = candidate(2, history_bucket=1)
    far = candidate(3, history_bucket=1, link_bucket=1)
    assert order(short, far, new, slow) == ["d001", "d002", "d003", "d000"]


def test_the_beacon_breaks_ties_and_nothing_else() -> None:
    equal = [candidate(number) for number in range(16)]
    assert formed(equal, 8, 1)[0].members != formed(equal, 8, 2)[0].members
    mixed = [*equal[:8], *(candidate(number, stay=60) for number in range(20, 28))]
    for number in (1, 2):
        first, last = formed(mixed, 8, number)
        assert set(first.members) == {one.ready.device for one in equal[:8]}
        assert set(last.members) == {f"d{number:03d}" for number in range(20, 28)}


# ---------------------------------------------------------------- one thing moved
def test_a_moved_or_swapped_member_is_refused() -> None:
    candidates = [candidate(number) for number in range(10)]
    first, second = formed(candidates)
    readys, others = readys_of(first, candidates), readys_of(second, candidates)
    moved = (*first.members[1:], first.members[0])
    assert refused(msgspec.structs.replace(first, members=moved), [*readys[1:], readys[0]]) == "members"
    swapped = (*first.members[:-1], second.members[-1])
    assert refused(msgspec.structs.replace(first, members=swapped), [*readys[:-1], others[-1]]) in (
        "root",
        "members",
    )
    assert refused(first, others) == "roster"
    assert refused(first, readys[:-1]) == "roster"


def test_a_ready_that_was_not_sorted_is_refused() -> None:
    """The same device with other facts, or another prekey, has another place."""
    candidates = [candidate(number) for number in range(10)]
    card = formed(candidates)[0]
    readys = readys_of(card, candidates)
    ready, _ = readys[2]
    newer = msgspec.structs.replace(ready, counter=2)
    forged = [*readys[:2], (newer, hashlib.sha256(encode(newer)).digest()), *readys[3:]]
    assert refused(card, forged) in ("root", "members")


def test_another_beacon_or_formation_is_refused() -> None:
    candidates = [candidate(number) for number in range(10)]
    card = formed(candidates)[0]
    readys = readys_of(card, candidates)
    assert refused(msgspec.structs.replace(card, beacon=bytes(32)), readys) == "beacon"
    assert refused(msgspec.structs.replace(card, formation=2), readys) == "beacon"
    assert refused(card, readys, commitment=bytes(32)) == "beacon"
    for number in (0, limits.FORMATIONS_MAX + 1, 2**62):
        assert refused(msgspec.structs.replace(card, formation=number), readys) == "formation"


def test_a_grown_beacon_does_not_help_to_guess_the_next() -> None:
    """The beacon of a formation is the hash of the next one's: known beacons lead backwards only."""
    chain = [formation.beacon_of(SECRET, number) for number in (1, 2, 3)]
    assert hashlib.sha256(chain[1]).digest() == chain[0]
    assert hashlib.sha256(chain[2]).digest() == chain[1]
    assert formation.beacon_of(SECRET, limits.FORMATIONS_MAX) == SECRET
    for number in (0, limits.FORMATIONS_MAX + 1):
        with pytest.raises(ProtocolError) as refusal:
            formation.beacon_of(SECRET, number)
        assert refusal.value.name == "no-beacon"


@given(count=st.integers(5, 60), place=st.integers(0, 11), change=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_a_wrong_place_path_or_root_is_refused(count: int, place: int, change: int) -> None:
    candidates = [candidate(number) for number in range(count)]
    cards = formed(candidates)
    card = cards[place % len(cards)]
    wrong = [
        {"index": card.index + 1},
        {"blocs": 2 * card.blocs + 1},
        {"path": (*card.path, bytes(32))},
        {"path": card.path[1:]} if card.path else {"path": (bytes(32),)},
        {"root": hashlib.sha256(card.root).digest()},
        {"blocs": 0},
    ][change]
    refused(msgspec.structs.replace(card, **wrong), readys_of(card, candidates))


def test_a_card_of_another_formation_is_under_another_root() -> None:
    """Two devices that were shown two partitions hold two roots, whatever else they were shown."""
    candidates = [candidate(number) for number in range(20)]
    without = [one for one in candidates if one.ready.device != "d003"]
    assert formed(candidates)[0].root != formed(without)[0].root


# ---------------------------------------------------------------- the tree
@given(leaves=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_every_path_leads_to_the_root_and_only_from_its_place(leaves: int) -> None:
    data = [hashlib.sha256(b"%d" % leaf).digest() for leaf in range(leaves)]
    tree = Tree(data)
    for index, leaf in enumerate(data):
        path = tree.path(index)
        assert root_from(leaf, index, leaves, path) == tree.root
        assert len(path) <= limits.PATH_HASHES_MAX
        if leaves > 1:
            assert leads_to(leaf, index ^ 1, leaves, path) != tree.root
            assert leads_to(leaf, index, leaves, path[:-1]) != tree.root


def leads_to(leaf: bytes, index: int, leaves: int, path: tuple[bytes, ...]) -> bytes | None:
    try:
        return root_from(leaf, index, leaves, path)
    except ProtocolError:
        return None


def test_an_inner_node_is_no_leaf() -> None:
    """Leaves and nodes are hashed apart (RFC 6962): a hub cannot pass half of the tree off as one bloc."""
    data = [formation.bloc_leaf([f"d{number:03d}"], [bytes(32)]) for number in range(4)]
    tree = Tree(data)
    inner = Tree(data[:2]).root
    assert root_from(inner, 0, 2, tree.path(0)[1:]) == tree.root, "as a node it is in the tree"
    assert inner != hashlib.sha256(b"\0" + data[0] + data[1]).digest()
    assert inner == hashlib.sha256(b"\1" + data[0] + data[1]).digest()
