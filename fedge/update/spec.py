"""The public parameters of one round's codec. No numpy here: the idle agent reads them too."""

from __future__ import annotations

from typing import Final

import msgspec

from fedge.errors import ConfigError
from fedge.limits import RING_BITS

SEED_BYTES: Final = 16
_CLIP_MIN, _CLIP_MAX = 1e-9, 1e6  # squares stay far from both ends of float32
_WORD_MAX: Final = 2**30  # |clip / step|: rounded numbers are exact in int32


class UpdateCodec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Public, the same for a whole bloc, part of OPEN. ConfigError if no update could be encoded with it.

    `bits` of a word; `step` between two words and `clip` (the L2 bound of one device's update), both in the unit of
    the adapter's numbers; `seed` of the rotation, 16 public bytes.
    """

    bits: int
    step: float
    clip: float
    seed: bytes

    def __post_init__(self) -> None:
        require_width(self.bits)
        require("clip", self.clip, _CLIP_MIN, _CLIP_MAX)
        require("step", self.step, self.clip / _WORD_MAX, _CLIP_MAX)
        if len(self.seed) != SEED_BYTES:
            raise ConfigError("rotation seed must have 16 bytes", field="seed", value=self.seed.hex())


def require_clip(value: float) -> None:
    """ConfigError unless an update could be held to this L2 bound."""
    require("clip", value, _CLIP_MIN, _CLIP_MAX)


def require_width(bits: int) -> None:
    """ConfigError for a word width that the wire does not have."""
    if bits not in RING_BITS:
        allowed = ", ".join(map(str, RING_BITS))
        raise ConfigError(
            "word width is not allowed", field="bits", value=bits, hint=f"Choose from {allowed}."
        )


def require(field: str, value: float, least: float, most: float) -> None:
    """ConfigError unless `value` is a number from `least` to `most`; NaN is refused, too."""
    if not least <= value <= most:
        raise ConfigError(
            f"{field} must be a number from {least:.3g} to {most:.3g}", field=field, value=value
        )
