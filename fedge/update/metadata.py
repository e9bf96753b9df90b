"""What rides beside an update, masked like it: counts, loss, norm, and the check-sums of the words.

Every field of every device is an integer with a bound so low that BLOC_DEVICES_MAX of them cannot pass 2^32, so sums
decode exactly and no device outweighs its bloc by more than the public bound, whatever it claims. The loss needs more
than that: it travels as two limbs of 24 bits, whose sums are put together after opening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.errors import ConfigError, IntegrityError
from fedge.limits import BLOC_DEVICES_MAX, STEPS_MAX, STRATA
from fedge.secagg.ring import MetadataWords

COUNT_MAX: Final = (2**32 - 1) // BLOC_DEVICES_MAX  # samples or labels of one device in one round: 67 million
NORM_MAX: Final = 2.0  # a longer update counts as this long, so no liar moves the next clip bound far
LOSS_SUM_MAX: Final = 2.0**32  # nats
_NORM_UNIT: Final = 2.0**-20
_LOSS_UNIT: Final = 2.0**-16
_LIMB_BITS: Final = 24
_LIMB_MAX: Final = 2**_LIMB_BITS - 1
_FIELDS: Final = ("contributors", "steps", "samples", "labels", "norm", "loss_sum", "loss_sum")
_BOUNDS: Final = (1, STEPS_MAX, COUNT_MAX, COUNT_MAX, round(NORM_MAX / _NORM_UNIT), _LIMB_MAX, _LIMB_MAX)
METADATA_WORDS: Final = len(_BOUNDS) + STRATA


@dataclass(frozen=True, slots=True)
class Metadata:
    """One device's figures, or the sum of a bloc's.

    `contributors`: 1 if the update is not zero; `steps` made; `samples` seen; `labels`: tokens that the loss counts;
    `loss_sum` over them, in nats; `norm`: L2 before clipping, in units of the clip bound, at most NORM_MAX;
    `strata`: of `codec.stratify`.
    """

    contributors: int
    steps: int
    samples: int
    labels: int
    loss_sum: float
    norm: float
    strata: npt.NDArray[np.uint32]


def pack(metadata: Metadata) -> MetadataWords:
    """The METADATA_WORDS words of one device's figures. ConfigError for a figure past its bound."""
    if not 0 <= metadata.loss_sum < LOSS_SUM_MAX:  # also refuses NaN
        raise ConfigError("loss is out of range", field="loss_sum", value=metadata.loss_sum)
    loss = min(round(metadata.loss_sum / _LOSS_UNIT), 2 ** (2 * _LIMB_BITS) - 1)
    fields = (
        metadata.contributors,
        metadata.steps,
        metadata.samples,
        metadata.labels,
        round(min(metadata.norm, NORM_MAX) / _NORM_UNIT),
        loss & _LIMB_MAX,
        loss >> _LIMB_BITS,
    )
    for name, value, bound in zip(_FIELDS, fields, _BOUNDS, strict=True):
        if not 0 <= value <= bound:
            raise ConfigError("figure is out of range", field=name, value=value, hint=f"At most {bound}.")
    return np.concatenate([np.array(fields, np.uint32), metadata.strata])


def unpack(words: MetadataWords, devices: int) -> Metadata:
    """The sums of `devices` devices' figures. IntegrityError for a sum that honest devices cannot make."""
    if words.size != METADATA_WORDS:
        raise IntegrityError("metadata has the wrong length", field="words", value=words.size)
    fields = words[: len(_BOUNDS)].tolist()
    for name, value, bound in zip(_FIELDS, fields, _BOUNDS, strict=True):
        if value > devices * bound:
            raise IntegrityError(
                "a sum is past its bound: a mask is left or a device lied", field=name, value=value
            )
    contributors, steps, samples, labels, norm, low, high = fields
    return Metadata(
        contributors=contributors,
        steps=steps,
        samples=samples,
        labels=labels,
        loss_sum=(low + (high << _LIMB_BITS)) * _LOSS_UNIT,
        norm=norm * _NORM_UNIT,
        strata=words[len(_BOUNDS) :],
    )
