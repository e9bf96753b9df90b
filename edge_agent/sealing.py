"""The worker's last job of a round: the delta on disk becomes one masked report on disk.

The agent recorded `consumed` before it asked, and never asks twice for one transcript. What the report carries goes to
the disk first and the report last: a report that exists is whole, and its carry exists.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.jobs import Seal, Sealed
from fedge.errors import DataError, NoInputError
from fedge.io import durable
from fedge.secagg.masks import Member
from fedge.update.report import build_report


def seal(job: Seal) -> Sealed:
    """Writes `job.sent` and `job.report` durably. Raises NoInputError, DataError, StorageError, ConfigError."""
    delta = _vector(Path(job.delta))
    carry = _vector(Path(job.carry)) if job.carry else None
    if carry is not None and carry.size != delta.size:
        carry = None  # of an earlier campaign: another adapter
    built = build_report(
        delta,
        carry=carry,
        loss_sum=job.loss_sum,
        labels=job.labels,
        samples=job.samples,
        steps=job.steps,
        codec=job.codec,
        h=job.transcript,
        position=job.position,
        roster=[Member(prekey=prekey, aes=aes) for prekey, aes in job.roster],
        prekey_secret=job.prekey,
        entropy=job.entropy,
    )
    durable.write_bytes(Path(job.sent), built.sent.astype("<f4").tobytes(), secret=True)
    durable.write_bytes(Path(job.report), built.body, secret=True)
    return Sealed(digest=built.digest, size=len(built.body))


def _vector(path: Path) -> NDArray[np.float32]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NoInputError("a round's file is gone", field="path", value=path.name) from error
    if len(data) % 4:
        raise DataError("a round's file is not whole", field="path", value=path.name)
    return np.frombuffer(data, "<f4").astype(np.float32)
