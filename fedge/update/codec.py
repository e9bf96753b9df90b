"""Clip, rotate, step, round at random, wrap: and why the words are wide enough.

After rotation the coordinates of a bloc's *sum* are close to Gaussian with a spread of |sum| / sqrt(length). Only
the sum has to fit the ring, so the step puts SPREADS of those spreads (times SLACK, for the next round's sum is not
the last one's) at the edge of the words: half a bit, not one, per doubling of the devices (Bonawitz et al. 2019,
arXiv 1912.00131). Rounding is stochastic: under a step this coarse, nearest rounding sends whole updates to zero.

Two promises are kept apart. A codec made from public facts (`first_codec`) fits even if all devices send the same
update at the clip bound, and any codec can be held to that with `require_range`. A codec tuned to the last sum
(`next_codec`) fits by statistics; what then wraps all the same is *seen* in the strata check-sums and not applied.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from fedge.errors import ConfigError
from fedge.limits import RING_BITS, STRATA
from fedge.secagg.keystream import Keystream, StreamCipher
from fedge.secagg.ring import Words, zero_words
from fedge.update import rotation
from fedge.update.rotation import Vector
from fedge.update.spec import UpdateCodec, require_clip, require_width

SPREADS: Final = 5.0  # a Gaussian passes 5 spreads once in 1.7 million; words that do wrap are detected
SLACK: Final = 1.15  # how much larger the next sum may be than the last
CLIP_SLACK: Final = 1.25  # over the mean norm; touched no device on real people's messages
_PROBE_BITS: Final = 8
FIRST_BITS: Final = 16  # while no sum is known
_PIECE: Final = 65_536  # numbers rounded at a time: cache-sized, and a multiple of STRATA


class Encoded(msgspec.Struct, frozen=True):
    """`words` mod 2^b, of padded length, and the `strata` check-sums (STRATA numbers mod 2^32) of what they were."""

    words: Words
    strata: npt.NDArray[np.uint32]


def first_codec(
    steps: int, lr: float, numbers: int, devices: int, seed: bytes, bits: int = FIRST_BITS
) -> UpdateCodec:
    """The codec of a campaign's first round, when no sum is known. Fits whatever the devices send.

    Adam moves a number by at most about `lr` a step (Kingma & Ba 2015, section 2.1), hence the clip bound.
    """
    clip = steps * lr * math.sqrt(numbers)
    require_clip(clip)
    return _tuned(aligned_spread(clip, numbers, devices), clip, devices, seed, bits)


def probe_codec(lr: float, numbers: int, devices: int, seed: bytes) -> UpdateCodec:
    """The codec of a round in which every device sends a probe of one length (`fedge.rules`, rule `core`).

    The length is the clip bound of one step, so 8 bits do: 2 % of the energy of a sum of 8 devices is noise where they
    have nothing in common, less where they agree.
    """
    return first_codec(1, lr, numbers, devices, seed, _PROBE_BITS)


def next_codec(
    last_sum_spread: float, mean_norm: float, devices: int, seed: bytes, bits: int = 8
) -> UpdateCodec:
    """The codec after a round: the step from the last sum's `spread`, the clip from the devices' mean L2 norm.

    ConfigError for a sum of zero: it says nothing about the next one, so keep the codec that gave it.
    """
    return _tuned(last_sum_spread, CLIP_SLACK * mean_norm, devices, seed, bits)


def spread(vector: Vector) -> float:
    """Root mean square of the rotated `vector`'s coordinates, without rotating it."""
    return length(vector) / math.sqrt(rotation.padded_length(vector.size))


def aligned_spread(clip: float, numbers: int, devices: int) -> float:
    """The largest spread that a sum can have: all devices at the clip bound, in one direction."""
    return devices * clip / math.sqrt(rotation.padded_length(numbers))


def require_range(codec: UpdateCodec, devices: int, sum_spread: float) -> None:
    """ConfigError, naming the smallest width that works, if a sum of `sum_spread` does not fit the codec's words.

    With `aligned_spread` for `sum_spread` this is the worst case. Rounding adds at most devices / 4 to the variance.
    """
    reach = SPREADS * math.hypot(sum_spread / codec.step, math.sqrt(devices) / 2)
    if reach <= 2 ** (codec.bits - 1):
        return
    fitting = [bits for bits in sorted(RING_BITS) if reach <= 2 ** (bits - 1)]
    hint = (
        f"The smallest width that works is {fitting[0]} bits."
        if fitting
        else "Take a larger step or fewer devices."
    )
    raise ConfigError(
        f"words are too narrow for a sum of {devices} devices", field="bits", value=codec.bits, hint=hint
    )


def predicted_error(devices: int, bits: int, z: float) -> float:
    """Expected |decoded - true|^2 / |true|^2 of a sum when the words reach `z` spreads of it: n (2z)^2 / (6 * 4^b).

    Each word's rounding has variance step^2 / 6 on average over where the number lies between two words.
    """
    return float(devices * (2 * z) ** 2 / (6 * 4.0**bits))


def length(vector: Vector) -> float:
    """L2 norm, accumulated in float64. ConfigError if the vector is not finite."""
    norm = math.sqrt(float(np.einsum("i,i->", vector, vector, dtype=np.float64)))
    if not math.isfinite(norm):
        raise ConfigError(
            "update is not finite",
            field="delta",
            value=norm,
            hint="Training diverged: lower the learning rate.",
        )
    return norm


def clip(delta: Vector, bound: float) -> tuple[Vector, float]:
    """`delta` scaled down to L2 norm `bound` if it is longer, and the norm that it had. Never changes `delta`."""
    norm = length(delta)
    return (delta if norm <= bound else delta * np.float32(bound / norm)), norm


def encode(delta: Vector, codec: UpdateCodec, entropy: bytes) -> Encoded:
    """Words of `delta`, which is within the clip bound. `entropy`: 32 secret bytes, fresh for every update.

    A word differs from its number by less than a step, and by nothing on average (up to 2^-16 of a step).
    """
    rotated = rotation.forward(delta, codec.seed)
    stream = Keystream(StreamCipher.CHACHA20, entropy)
    words = zero_words(rotated.size, codec.bits)
    strata = np.zeros(STRATA, np.uint32)
    for start in range(0, rotated.size, _PIECE):
        integers = _round(rotated[start : start + _PIECE], codec.step, stream)
        words[start : start + _PIECE] = integers.astype(words.dtype)  # the low bits: integers mod 2^b
        strata += stratify(integers)
    return Encoded(words, strata)


def decode(words: Words, codec: UpdateCodec, numbers: int) -> Vector:
    """The sum of the devices' clipped deltas, `numbers` long, from the opened sum of their `words`."""
    rotated = centred(words).astype(np.float32)
    rotated *= np.float32(codec.step)
    return rotation.inverse(rotated, codec.seed, numbers)


def centred(words: Words) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
    """The residues of `words` in [-2^(b-1), 2^(b-1)), without a copy."""
    return words.view(np.int8) if words.itemsize == 1 else words.view(np.int16)


def stratify(integers: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.uint32]:
    """STRATA check-sums mod 2^32: number i counts in stratum i mod STRATA.

    A word that wraps is off by 2^b, so its stratum's sum is; two wraps go unseen only if they are opposite and meet.
    """
    rows = integers.astype(np.int32, copy=False).view(np.uint32).reshape(-1, STRATA)
    sums: npt.NDArray[np.uint32] = rows.sum(axis=0, dtype=np.uint32)
    return sums


def _tuned(sum_spread: float, clip_bound: float, devices: int, seed: bytes, bits: int) -> UpdateCodec:
    require_width(bits)
    step = SPREADS * SLACK * sum_spread / 2 ** (bits - 1)
    codec = UpdateCodec(bits=bits, step=step, clip=clip_bound, seed=seed)
    require_range(codec, devices, sum_spread)
    return codec


def _round(rotated: Vector, step: float, stream: Keystream) -> npt.NDArray[np.int32]:
    uniform = np.frombuffer(stream.take(2 * rotated.size), np.uint16)
    scaled = rotated * np.float32(1 / step)
    scaled += uniform * np.float32(2**-16)
    np.floor(scaled, out=scaled)
    return scaled.astype(np.int32)
