"""The public parameters of one round's codec. No numpy here: the idle agent reads them too."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class UpdateCodec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a delta becomes words mod 2^bits. Every value is public and the same for all members of a bloc."""

    bits: Annotated[int, Meta(ge=8, le=16)]  # width of a word; `validate` knows which widths exist
    step: Annotated[float, Meta(gt=0)]  # size of one word unit, in units of the rotated delta
    clip: Annotated[float, Meta(gt=0)]  # L2 bound on one device's delta
    seed: Annotated[bytes, Meta(min_length=16, max_length=16)]  # of the shared signs
