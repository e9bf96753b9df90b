"""Both ends of a whole-bloc sum: the device seals one report, the hub adds it to a running sum.

Law 1 lives here as arithmetic: `BlocSum` gives its numbers out only when every member is in, and what it holds
before that is a uniform residue. It never keeps a single report, only their sum and the digest of each, so memory
is one body whatever the bloc's size, and its bytes are one row of the hub's store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from fedge.errors import ConfigError, IntegrityError, ProtocolError
from fedge.limits import BLOC_DEVICES_MAX, BLOC_DEVICES_MIN
from fedge.secagg.masks import AGREEMENT, Agreement, Member, mask_in_place, open_edges
from fedge.secagg.ring import BodyLayout, MetadataWords, Words, add_words


class SealedReport(msgspec.Struct, frozen=True):
    """What leaves the device: `body` (masked words || masked metadata) and its SHA-256."""

    body: bytes
    digest: bytes


def seal(
    words: Words,
    metadata: MetadataWords,
    *,
    h: bytes,
    position: int,
    roster: Sequence[Member],
    prekey_secret: bytes,
    agreement: Agreement = AGREEMENT,
) -> SealedReport:
    """Mask `words` and `metadata` for the OPEN of transcript hash `h`. Pure: the same input gives the same bytes.

    The caller has verified the roster's signatures and written `consumed(h)`: a second report under one h with
    other words would give away their difference.
    """
    _check_size(len(roster))
    body = bytearray(words.tobytes() + metadata.tobytes())
    layout = BodyLayout(bits=8 * words.itemsize, words=words.size, metadata_words=metadata.size)
    mask_in_place(*layout.views(body), open_edges(h, position, roster, prekey_secret, agreement))
    return SealedReport(body=bytes(body), digest=hashlib.sha256(body).digest())


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    h: bytes
    members: tuple[str, ...]
    layout: BodyLayout
    digests: dict[str, bytes]
    total: bytes


class BlocSum:
    """The running sum of one bloc under one transcript hash, and which members are in it."""

    __slots__ = ("_digests", "_total", "h", "layout", "members")

    def __init__(self, h: bytes, members: Sequence[str], layout: BodyLayout) -> None:
        _check_size(len(members))
        if len(set(members)) != len(members):
            raise ProtocolError("cloned-member", "one device stands twice in the bloc", field="members")
        self.h, self.members, self.layout = h, tuple(members), layout
        self._digests: dict[str, bytes] = {}
        self._total = bytearray(layout.size)

    @property
    def missing(self) -> tuple[str, ...]:
        """Members that have not reported, in roster order."""
        return tuple(member for member in self.members if member not in self._digests)

    @property
    def whole(self) -> bool:
        return len(self._digests) == len(self.members)

    def digest_of(self, device: str) -> bytes | None:
        """SHA-256 of the report that `device` has in the sum, if it has one."""
        return self._digests.get(device)

    def add(self, device: str, body: bytes) -> bool:
        """Add a report; False if these very bytes are in already. The caller has verified the signature.

        Raises ProtocolError for a stranger, a wrong size, and a second, different report of one device.
        """
        if device not in self.members:
            raise ProtocolError("not-a-member", "report from outside the bloc", field="device", value=device)
        if len(body) != self.layout.size:
            raise ProtocolError("report-size", "report has the wrong size", field="bytes", value=len(body))
        digest = hashlib.sha256(body).digest()
        if (known := self._digests.get(device)) is not None:
            if known == digest:
                return False
            raise ProtocolError(
                "second-report", "device sent another report before", field="device", value=device
            )
        for total, part in zip(self.layout.views(self._total), self.layout.views(body), strict=True):
            add_words(total, part)
        self._digests[device] = digest
        return True

    def open(self) -> tuple[Words, MetadataWords]:
        """The sums of all words and of all metadata words, unmasked by being whole. ProtocolError before that."""
        if not self.whole:
            raise ProtocolError(
                "bloc-not-whole", "members are missing from the sum", field="missing", value=self.missing
            )
        return self.layout.views(bytes(self._total))

    def to_bytes(self) -> bytes:
        """Everything, as one row for the store."""
        row = _Row(self.h, self.members, self.layout, self._digests, bytes(self._total))
        return msgspec.msgpack.encode(row)

    @classmethod
    def from_bytes(cls, data: bytes) -> BlocSum:
        """The sum that `to_bytes` wrote; IntegrityError for anything else."""
        try:
            row = msgspec.msgpack.decode(data, type=_Row)
            bloc = cls(row.h, row.members, row.layout)
        except (msgspec.MsgspecError, ValueError, ConfigError, ProtocolError) as error:
            raise IntegrityError("stored sum cannot be read", field="row", value=str(error)) from error
        if len(row.total) != row.layout.size or not row.digests.keys() <= set(row.members):
            raise IntegrityError("stored sum contradicts itself", field="row", value=row.layout)
        bloc._digests.update(row.digests)
        bloc._total[:] = row.total
        return bloc


def _check_size(devices: int) -> None:
    if not BLOC_DEVICES_MIN <= devices <= BLOC_DEVICES_MAX:
        raise ProtocolError(
            "small-bloc" if devices < BLOC_DEVICES_MIN else "large-bloc",
            f"a bloc has {BLOC_DEVICES_MIN} to {BLOC_DEVICES_MAX} devices",
            field="devices",
            value=devices,
        )
