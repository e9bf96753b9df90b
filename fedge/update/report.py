"""One device's update into one sealed body; one bloc's opened sum back into numbers. The two ends side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedge.errors import IntegrityError
from fedge.secagg.bloc import seal
from fedge.secagg.masks import AGREEMENT, Agreement, Member
from fedge.secagg.ring import BodyLayout, MetadataWords, Words
from fedge.update import codec as coding
from fedge.update.metadata import METADATA_WORDS, Metadata, pack, unpack
from fedge.update.rotation import Vector, padded_length
from fedge.update.spec import UpdateCodec


@dataclass(frozen=True, slots=True)
class BuiltReport:
    """`body` and its SHA-256 go out. `sent` (float32, before rounding) stays: the carry if the bloc sits out.

    `norm`: L2 of what was to be sent, before clipping.
    """

    body: bytes
    digest: bytes
    sent: Vector
    norm: float


@dataclass(frozen=True, slots=True)
class BlocReading:
    """What a whole bloc says: the `total` of its devices' clipped updates, and the sums of their figures."""

    total: Vector
    metadata: Metadata


def report_layout(numbers: int, bits: int) -> BodyLayout:
    """Shape of a report's body for an adapter of `numbers` trained numbers."""
    return BodyLayout(bits=bits, words=padded_length(numbers), metadata_words=METADATA_WORDS)


def add_carry(delta: Vector, carry: Vector | None) -> Vector:
    """delta + carry * min(1, 2 |delta| / |carry|): work of rounds that sat out, never more than twice today's."""
    if carry is None or not (owed := coding.length(carry)):
        return delta
    return delta + carry * np.float32(min(1.0, 2 * coding.length(delta) / owed))


def build_report(
    delta: Vector,
    *,
    carry: Vector | None,
    loss_sum: float,
    labels: int,
    samples: int,
    steps: int,
    codec: UpdateCodec,
    h: bytes,
    position: int,
    roster: Sequence[Member],
    prekey_secret: bytes,
    entropy: bytes,
    agreement: Agreement = AGREEMENT,
) -> BuiltReport:
    """The report of the device at `position` in the bloc of transcript hash `h`. Pure: same input, same bytes.

    `delta`: the trained numbers' change; `carry`: what earlier rounds did not deliver; `loss_sum` in nats over
    `labels` tokens of `samples` samples in `steps` steps; `entropy`: 32 secret bytes for the rounding, never reused.
    ConfigError if the update or a figure is not finite or past its bound; ProtocolError for a bad roster.
    """
    sent, norm = coding.clip(add_carry(delta, carry), codec.clip)
    encoded = coding.encode(sent, codec, entropy)
    metadata = Metadata(
        contributors=int(norm > 0),
        steps=steps,
        samples=samples,
        labels=labels,
        loss_sum=loss_sum,
        norm=norm / codec.clip,
        strata=encoded.strata,
    )
    sealed = seal(
        encoded.words,
        pack(metadata),
        h=h,
        position=position,
        roster=roster,
        prekey_secret=prekey_secret,
        agreement=agreement,
    )
    return BuiltReport(body=sealed.body, digest=sealed.digest, sent=sent, norm=norm)


def read_sum(
    words: Words, metadata: MetadataWords, *, codec: UpdateCodec, devices: int, numbers: int
) -> BlocReading:
    """Decode what `BlocSum.open` gave. IntegrityError if a word wrapped or a mask did not cancel: apply nothing.

    A bloc in which nobody had anything to give reads as a total of zero with no contributors.
    """
    figures = unpack(metadata, devices)
    wrong = int(np.count_nonzero(coding.stratify(coding.centred(words)) != figures.strata))
    if wrong:
        raise IntegrityError(
            "sum does not match its check-sums: a word wrapped or a mask is left", field="strata", value=wrong
        )
    return BlocReading(total=coding.decode(words, codec, numbers), metadata=figures)
