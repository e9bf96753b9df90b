"""From masked reports to a new adapter: running sums only, opened whole, applied at once.

LoRA rule `ffa`: A is frozen and public, the trained numbers are the B tensors, so the mean of the updates is exactly
the mean of the adapters. The server step is the plain uniform mean, rate 1: each opened sum is divided by the number
of devices in *all* blocs of the campaign. Two blocs that train side by side from the same adapter then add up to the
mean over both, where two means of one bloc each would overshoot (a server rate of 1.75 loses 0.27 nats).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import IntegrityError, ProtocolError
from fedge.messages import Open, decode, decode_envelope
from fedge.secagg.bloc import BlocSum
from fedge.update import codec as coding
from fedge.update.report import read_sum, report_layout
from fedge.update.spec import UpdateCodec
from hub.effects import CampaignRow, RoundRow

Vector = NDArray[np.float32]
_LITTLE: Final = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class OpenedSum:
    """What an opened bloc says: the `total` of its devices' clipped updates, and sums over all of them."""

    total: Vector
    bits: int  # width of the words it came in
    devices: int
    contributors: int
    spread: float  # of the total, per number: the next step follows from it
    mean_norm: float  # of the members' updates before clipping: the next clip follows from it
    loss_sum: float
    labels: int
    samples: int
    steps: int

    def summary(self) -> dict[str, float | int | str]:
        """The public figures of the round, for the ledger."""
        loss = self.loss_sum / self.labels if self.labels else 0.0
        return {
            "devices": self.devices,
            "bits": self.bits,
            "contributors": self.contributors,
            "training_loss": round(loss, 6),
            "labels": self.labels,
            "samples": self.samples,
            "steps": self.steps,
            "mean_norm": round(self.mean_norm, 6),
            "sum_norm": round(float(np.linalg.norm(self.total)), 6),
        }


def next_codec(campaign: CampaignRow, steps: int, seed: bytes) -> UpdateCodec:
    """The codec of the next OPEN: from the last opened sum, or from public bounds (16 bits) while there is none."""
    if campaign.spread <= 0 or campaign.mean_norm <= 0:
        rate = campaign.training.rate
        return coding.first_codec(steps, rate, campaign.numbers, campaign.bloc_devices, seed)
    return coding.next_codec(campaign.spread, campaign.mean_norm, campaign.bloc_devices, seed)


def empty_sum(body: bytes, members: tuple[str, ...], numbers: int, codec: UpdateCodec) -> bytes:
    """The running sum of a round that was just opened with an OPEN of these bytes."""
    return BlocSum(hashlib.sha256(body).digest(), members, report_layout(numbers, codec.bits)).to_bytes()


def missing(row: RoundRow) -> tuple[str, ...]:
    """Members whose report is not in the running sum."""
    return BlocSum.from_bytes(row.sum).missing


def body_size(row: RoundRow) -> int:
    """Bytes of a report of this round."""
    return BlocSum.from_bytes(row.sum).layout.size


def digest_in(row: RoundRow, device: str) -> bytes | None:
    """The digest of the report that `device` has in the sum."""
    return BlocSum.from_bytes(row.sum).digest_of(device)


def add_report(row: RoundRow, device: str, body: bytes) -> RoundRow:
    """The row with one more report in its sum: one value, so one transaction."""
    total = BlocSum.from_bytes(row.sum)
    total.add(device, body)
    return msgspec.structs.replace(row, sum=total.to_bytes())


def open_sum(row: RoundRow, numbers: int) -> OpenedSum:
    """Opens a whole bloc. ProtocolError `bad-sum` when check-sums say that a word wrapped or a mask is left."""
    codec = decode(decode_envelope(row.envelope).body, Open).codec
    total = BlocSum.from_bytes(row.sum)
    words, metadata = total.open()
    devices = len(total.members)
    try:
        reading = read_sum(words, metadata, codec=codec, devices=devices, numbers=numbers)
    except IntegrityError as error:
        raise ProtocolError("bad-sum", str(error), field=error.field, value=error.value) from error
    figures = reading.metadata
    return OpenedSum(
        total=reading.total,
        bits=codec.bits,
        devices=devices,
        contributors=figures.contributors,
        spread=coding.spread(reading.total),
        mean_norm=figures.norm * codec.clip / max(figures.contributors, 1),
        loss_sum=figures.loss_sum,
        labels=figures.labels,
        samples=figures.samples,
        steps=figures.steps,
    )


def share(devices: int, staleness: int) -> float:
    """What an opened sum is multiplied with: 1 / all devices in blocs, discounted by 1/sqrt(1 + staleness)."""
    return 1.0 / (devices * math.sqrt(1 + staleness))


def apply(adapter: bytes, opened: OpenedSum, factor: float) -> bytes:
    """The new adapter, little-endian float32. The same bytes when nobody had anything to give (weight zero)."""
    if not opened.contributors:
        return adapter
    vector = np.frombuffer(adapter, _LITTLE) + opened.total * np.float32(factor)
    return vector.astype(_LITTLE).tobytes()
