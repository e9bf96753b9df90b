"""The leverage audit: how much of one device's update all sums ever opened let anyone resolve.

Let M be the 0/1 matrix of the opened sums over a fleet's vectors and P the projection on its row space. Whatever is
computed from the sums, and however long, is a combination of rows of M, so P_ii, device i's *leverage*, is the share
of its own vector that can be had. One partition into blocs of k gives exactly 1/k for ever. A sum and the same sum
less one member give 1. Two partitions touch at least k members in every combination and still leak: measured, 0.25
and 70 % re-identified with blocs of 8. So the rule is on leverage and on nothing easier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import numpy as np

from fedge.errors import PolicyError
from fedge.limits import BLOC_DEVICES_MIN

_TOLERANCE: Final = 1e-9


def leverages(opened: Iterable[Collection[str]]) -> dict[str, float]:
    """P_ii of every device that is in one of the `opened` member sets; opening a set again changes nothing."""
    rows = list({frozenset(members): None for members in opened if members})
    devices = sorted(set().union(*rows))
    if not devices:
        return {}
    matrix = np.array([[device in row for device in devices] for row in rows], dtype=np.float64)
    _, singular, basis = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.count_nonzero(singular > singular[0] * max(matrix.shape) * np.finfo(np.float64).eps))
    shares = np.square(basis[:rank]).sum(axis=0)
    return dict(zip(devices, shares.tolist(), strict=True))


def require_leverage(
    opened: Iterable[Collection[str]], candidate: Collection[str], floors: Mapping[str, int] | None = None
) -> None:
    """Raise PolicyError if opening `candidate` as well would lift any device above 1 / its k_min.

    `floors` maps a device to its owner's smallest bloc (k_min); a device not in it has BLOC_DEVICES_MIN, and no
    entry goes below that.
    """
    after = leverages([*opened, candidate])
    for device, share in after.items():
        floor = max((floors or {}).get(device, BLOC_DEVICES_MIN), BLOC_DEVICES_MIN)
        if share > 1 / floor + _TOLERANCE:
            raise PolicyError(
                f"opening this sum would resolve {share:.3f} of {device}'s update, and 1/{floor} is allowed",
                field="members",
                value=sorted(candidate),
                hint="Open whole blocs of one partition only.",
            )
