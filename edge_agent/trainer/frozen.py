"""A classifier whose head trains alone: the encoder runs once for each row, and never back.

While no layer trains, what the head reads of a row stays the same, and bundles say what that is: `features.onnx`
makes one short vector of the encoder's output, and `head.onnx` goes on from there. The vectors are kept, as many as
fit a bound; those that came first stay, because a data set comes round again as a whole.

The rule: a vector is its row's alone. Each row is encoded by itself, without padding, so that it has the same bits
in whichever batch it comes first, and a round that was cut off goes on with the numbers that it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.planner import KEPT_BYTES_MAX
from edge_agent.trainer.batch import BatchArrays, Inputs, Ints
from edge_agent.trainer.sessions import Floats, Graph, Tensor
from fedge.lora import DENSE

Encode = Callable[[Inputs, Ints], Generator[None, None, Floats]]
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class HeadAnswer:
    """Of M labelled rows: losses in nats (M,), and `gradients` of their sum by `dense/NAME`."""

    nll: Floats
    gradients: dict[str, Floats]


class FrozenEncoder:
    """The head of a bundle behind an encoder that stays as it is."""

    def __init__(self, features: Graph, head: Graph, *, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._features, self._head = features, head
        self._bytes_max, self._bytes = kept_bytes_max, 0
        self._kept: dict[bytes, Floats] = {}
        self._encoder = b""

    def step(
        self,
        batch: BatchArrays,
        adapter: Mapping[str, Floats],
        values: Mapping[str, Floats],
        outside: Mapping[str, Tensor],
        encode: Encode,
    ) -> Generator[None, None, HeadAnswer]:
        """Losses and gradients of the head whose numbers are `values`, of the rows with a label: one at least.

        `encode` gives the last block's output of ids and a mask, with `adapter` in the blocks. Yields after every
        run of a session.
        """
        self._check_encoder(adapter)
        vectors: list[Floats] = []
        at = np.flatnonzero(batch.labels[:, 0] >= 0)
        for row in at:
            vectors.append((yield from self._vector(batch.ids[row], batch.mask[row], outside, encode)))
        feeds: dict[str, Tensor] = {"f": np.concatenate(vectors), "labels": batch.labels[at, 0]}
        out = self._head.run({**outside, **values, **feeds}, last=True)
        yield
        return HeadAnswer(out["nll"], {n.removeprefix("g:"): v for n, v in out.items() if n.startswith("g:")})

    def _vector(
        self, ids: Inputs, mask: Ints, outside: Mapping[str, Tensor], encode: Encode
    ) -> Generator[None, None, Floats]:
        """[1, F] of one row."""
        if ids.ndim == 1:  # recordings are all of one length
            length = int(np.flatnonzero(mask).max(initial=0)) + 1
            ids, mask = ids[:length], mask[:length]
        key = hashlib.blake2b(ids.tobytes() + mask.tobytes(), digest_size=_DIGEST_BYTES).digest()
        if key in self._kept:
            return self._kept[key]
        ids, mask = ids[None], mask[None]
        h = yield from encode(ids, mask)
        found = self._features.run({**outside, "h": h, "input_ids": ids, "attention_mask": mask}, last=True)[
            "f"
        ]
        yield
        if self._bytes + found.nbytes + len(key) <= self._bytes_max:
            self._kept[key] = found
            self._bytes += found.nbytes + len(key)
        return found

    def _check_encoder(self, adapter: Mapping[str, Floats]) -> None:
        """Forget everything when the adapter in the blocks is another one."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name, value in adapter.items():
            if not name.startswith(DENSE):
                digest.update(np.ascontiguousarray(value).data)
        if digest.digest() != self._encoder:
            self._encoder, self._bytes = digest.digest(), 0
            self._kept.clear()
