"""Sound of any rate to the rate that a model hears, by a windowed sinc in as many phases as the two rates need.

With rates as L : M in lowest terms, output n lies at input time n M / L, and its fraction of a sample is one of L
phases, each with its own filter. The sinc cuts below the lower of the two Nyquist frequencies; what lies above that
one comes out 90 dB weaker, by a Kaiser window (Kaiser and Schafer 1980). Before and after the sound is silence.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Crossings of the sinc to either side: the passband ends at 86 % of the lower Nyquist frequency.
_ZEROS: Final = 32
_CUT: Final = 0.94  # of that frequency, so that the stopband begins at it
_KAISER_BETA: Final = 8.96  # 90 dB
# Of all phases, 16 MB; 44.1 kHz takes 28,640, a rate without a divisor 3 millions.
WEIGHTS_MAX: Final = 4_000_000
_PHASES: Final = 256  # made at a time
_BLOCK: Final = 4_096  # outputs at a time: with 44.1 kHz, 6 MB of gathered samples


def resample(sound: Floats, rate: int, wanted: int) -> Floats:
    """The sound (n,) of `rate` Hz at `wanted` Hz, ceil(n wanted / rate) samples."""
    if rate == wanted or not len(sound):
        return sound
    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    filters = _filters(up, down)
    reach = filters.shape[1] // 2
    padded = np.concatenate([np.zeros(reach, np.float32), sound, np.zeros(reach + 1, np.float32)])
    around = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1])
    found = np.empty(-(-len(sound) * up // down), np.float32)
    for start in range(0, len(found), _BLOCK):
        at = np.arange(start, min(start + _BLOCK, len(found)), dtype=np.int64) * down
        first, phase = at // up, at % up
        found[start : start + len(at)] = np.einsum("nt,nt->n", around[first], filters[phase])
    return found


def reach_of(rate: int, wanted: int) -> int:
    """How many samples to either side of a moment its value depends on."""
    return 0 if rate == wanted else ceil(_ZEROS * max(1.0, rate / wanted) / _CUT) + 1


def weights_of(rate: int, wanted: int) -> int:
    """How many weights the filters of all phases have."""
    return wanted // gcd(rate, wanted) * (2 * reach_of(rate, wanted) + 1)


@lru_cache(maxsize=2)
def _filters(up: int, down: int) -> Floats:
    """[phases, taps]: by phase p / up, the weights of the samples around; each sums to one."""
    cut = _CUT * min(1.0, up / down)  # of the input's Nyquist frequency
    reach = reach_of(down, up)
    found = np.empty((up, 2 * reach + 1), np.float32)
    for start in range(0, up, _PHASES):
        phases = np.arange(start, min(start + _PHASES, up))
        times = np.arange(-reach, reach + 1)[None, :] - phases[:, None] / up
        inside = np.clip(times * cut / _ZEROS, -1.0, 1.0)
        window = np.i0(_KAISER_BETA * np.sqrt(1.0 - inside**2)) * (np.abs(times * cut) <= _ZEROS)
        weights = np.sinc(times * cut) * window
        found[phases] = weights / weights.sum(axis=1, keepdims=True)
    found.setflags(write=False)
    return found
