"""How blocs are formed, so that a device can check its own: a public order, a beacon fixed in advance, one signed root.

Devices that are READY are sorted by public facts (expected stay, history, speed and link) and cut into runs of k.
Ties are broken by SHA-256(beacon || READY): the announcement commits to the beacon before any READY is said, and every
READY holds a fresh prekey of its device, so neither side can aim. What is left to a hub is to leave READYs out; it
cannot reorder those that it takes. Beacons form a hash chain (Lamport 1981): that of formation n gives the announced
commitment when hashed n times, and later newcomers are formed with the next one.
A bloc card carries its members' READYs, and a Merkle path (RFC 6962, section 2.1) to the root over all blocs of its
formation, which is signed and logged: two devices that were shown different partitions hold two roots.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fedge import limits
from fedge.errors import ProtocolError
from fedge.messages import BlocCard, Ready

STAY_BUCKETS: Final = (600, 3_600, 4 * 3_600)  # seconds
WORK_BUCKETS: Final = (60, 120, 240, 420, 700, 1_400)  # seconds
NOMINAL_STEPS: Final = 20  # a common measure for boards; the real plan is the scheduler's

Key = tuple[int, int, int, bytes]
Bloc = tuple["Candidate", ...]


def sort_key(ready: Ready, digest: bytes, beacon: bytes, adapter_bytes: int) -> Key:
    """Where a device stands in the order: longest stay first, best history, fastest; then the beacon decides.

    `digest` is the SHA-256 of the READY's bytes.
    """
    facts = ready.facts
    return (
        -bucket(ready.stay_seconds, STAY_BUCKETS),
        -facts.history_bucket,
        bucket(work_seconds(ready, NOMINAL_STEPS, adapter_bytes), WORK_BUCKETS),
        hashlib.sha256(beacon + digest).digest(),
    )


def work_seconds(ready: Ready, steps: int, adapter_bytes: int) -> float:
    """Estimated seconds of `steps` local steps and the transfer both ways, from public facts alone."""
    return steps * ready.facts.seconds_per_step + transfer_seconds(ready, 2 * adapter_bytes)


def transfer_seconds(ready: Ready, size: int) -> float:
    """Seconds for `size` bytes over the link as its bucket tells it; 0 while nothing is known of it."""
    link = ready.facts.link_bucket
    return size * 8 / (1_000 * 2.0 ** (link - 0.5)) if link else 0.0


def bucket(value: float, edges: Sequence[float]) -> int:
    """How many of the rising `edges` are reached."""
    return bisect_right(edges, value)


# ---------------------------------------------------------------- what a hub does
@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that is READY: what it said, the SHA-256 of those bytes, and their signed envelope."""

    ready: Ready
    digest: bytes
    envelope: bytes

    @classmethod
    def of(cls, ready: Ready, body: bytes, envelope: bytes) -> Candidate:
        """From a verified READY and its bytes."""
        return cls(ready, hashlib.sha256(body).digest(), envelope)


def cut(candidates: Iterable[Candidate], devices: int, beacon: bytes, adapter_bytes: int) -> list[Bloc]:
    """The candidates in the public order, cut into blocs of exactly `devices`; a tail that fills none waits."""
    order = sorted(candidates, key=lambda one: sort_key(one.ready, one.digest, beacon, adapter_bytes))
    whole = len(order) // devices * devices
    return [tuple(order[start : start + devices]) for start in range(0, whole, devices)]


def make_cards(
    campaign: str, blocs: Sequence[Bloc], names: Sequence[str], *, beacon: bytes, formation: int
) -> list[BlocCard]:
    """The cards of one formation, in its order; `names` are the blocs' ids."""
    tree = Tree([bloc_leaf(_members(bloc), [one.digest for one in bloc]) for bloc in blocs])
    return [
        BlocCard(
            campaign=campaign,
            bloc=name,
            members=_members(bloc),
            beacon=beacon,
            formation=formation,
            roster=tuple(one.envelope for one in bloc),
            index=index,
            blocs=len(blocs),
            path=tree.path(index),
            root=tree.root,
        )
        for index, (name, bloc) in enumerate(zip(names, blocs, strict=True))
    ]


def _members(bloc: Bloc) -> tuple[str, ...]:
    return tuple(one.ready.device for one in bloc)


# ---------------------------------------------------------------- beacons
def beacon_commitment(secret: bytes) -> bytes:
    """What an announcement says of a campaign's beacons, from the hub's secret."""
    return _hash_times(secret, limits.FORMATIONS_MAX)


def beacon_of(secret: bytes, formation: int) -> bytes:
    """The beacon of formation 1, 2, …; ProtocolError when the chain is used up."""
    if not 1 <= formation <= limits.FORMATIONS_MAX:
        raise ProtocolError("no-beacon", "too many formations", field="formation", value=formation)
    return _hash_times(secret, limits.FORMATIONS_MAX - formation)


def _hash_times(data: bytes, times: int) -> bytes:
    for _ in range(times):
        data = hashlib.sha256(data).digest()
    return data


# ---------------------------------------------------------------- the tree over all blocs of a formation
def bloc_leaf(members: Sequence[str], digests: Sequence[bytes]) -> bytes:
    """The leaf of a bloc: its members in order and the SHA-256 of the READY with which each was sorted."""
    text = b"".join(member.encode() + b"\0" + digest for member, digest in zip(members, digests, strict=True))
    return hashlib.sha256(b"\0" + text).digest()


class Tree:
    """A Merkle tree over at least one leaf; an odd node out moves up as it is."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._levels = [list(leaves)]
        while len(below := self._levels[-1]) > 1:
            pairs = [_node(*below[i : i + 2]) for i in range(0, len(below) - 1, 2)]
            self._levels.append(pairs + below[len(below) & ~1 :])

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """The siblings of leaf `index`, from below; an odd node out has none on its level."""
        path = []
        for level in self._levels[:-1]:
            if (sibling := index ^ 1) < len(level):
                path.append(level[sibling])
            index >>= 1
        return tuple(path)


def root_from(leaf: bytes, index: int, leaves: int, path: Sequence[bytes]) -> bytes:
    """The root that `leaf` at `index` of `leaves` leads to; ProtocolError `bad-formation` for a path that cannot be."""
    if not 0 <= index < leaves:
        raise ProtocolError("bad-formation", "no such place in the tree", field="index", value=index)
    rest, node = list(path), leaf
    while leaves > 1:
        if index ^ 1 < leaves:
            if not rest:
                raise ProtocolError("bad-formation", "path is too short", field="path", value=len(path))
            sibling = rest.pop(0)
            node = _node(sibling, node) if index & 1 else _node(node, sibling)
        index, leaves = index >> 1, (leaves + 1) >> 1
    if rest:
        raise ProtocolError("bad-formation", "path is too long", field="path", value=len(path))
    return node


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


# ---------------------------------------------------------------- what a device checks
def check_card(
    card: BlocCard, readys: Sequence[tuple[Ready, bytes]], commitment: bytes, adapter_bytes: int
) -> None:
    """ProtocolError `bad-formation` unless the card follows from its READYs, its beacon and its root.

    `readys` are the members' verified READYs with their digests, in the card's order; `commitment` is the
    announcement's.
    """
    if not 1 <= card.formation <= limits.FORMATIONS_MAX:
        raise ProtocolError("bad-formation", "no such formation", field="formation", value=card.formation)
    if _hash_times(card.beacon, card.formation) != commitment:
        raise ProtocolError("bad-formation", "not the beacon that was announced", field="beacon")
    if tuple(ready.device for ready, _ in readys) != card.members:
        raise ProtocolError("bad-formation", "READYs of other devices", field="roster", value=len(readys))
    keys = [sort_key(ready, digest, card.beacon, adapter_bytes) for ready, digest in readys]
    if keys != sorted(keys):
        raise ProtocolError("bad-formation", "members are not in the public order", field="members")
    leaf = bloc_leaf(card.members, [digest for _, digest in readys])
    if root_from(leaf, card.index, card.blocs, card.path) != card.root:
        raise ProtocolError(
            "bad-formation", "the card is not under its root", field="root", value=card.root.hex()
        )
