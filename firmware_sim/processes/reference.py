"""What the federation is measured against: the same training without hub, masks or devices.

`pooled` has equal data and equal compute: as many sequential steps as a device makes, each on the mean of the
gradients of all devices' batches of that step, and one AdamW whose state is kept. `federated` is the fleet's own
rounds, unmasked, with float deltas or through the shipped codec: their difference is what the codec costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import open_bundle
from edge_agent.trainer import AdamW
from fedge.errors import ConfigError, IntegrityError
from fedge.rules import Part, rule_of
from fedge.secagg.ring import add_words, zero_words
from fedge.update import codec as coding
from fedge.update.metadata import METADATA_WORDS, Metadata, pack
from fedge.update.report import add_carry, read_sum, report_layout
from fedge.update.rotation import padded_length
from fedge.update.spec import SEED_BYTES, UpdateCodec
from firmware_sim.processes.local_training import LocalWork, Plan, open_devices
from hub.aggregation import share

Vector = NDArray[np.float32]
Told = Callable[[int, int], None]  # steps (of `pooled`) or rounds done, and in all


@dataclass(frozen=True, slots=True)
class SumFigures:
    """One decoded sum: |decoded - true|^2 / |true|^2, and what the theory of stochastic rounding predicts."""

    round: int
    bits: int
    error: float
    predicted: float


@dataclass(frozen=True, slots=True)
class Reference:
    """The final adapter file `vector`, and the training loss of each step (`pooled`) or round, per token.

    `sums`: what the codec did; `wrapped`: how many sums did not fit their words, so that the bloc sat the round out;
    `bytes_up`: what a device sent in all rounds together, of payload.
    """

    vector: Vector
    training_loss: tuple[float, ...]
    sums: tuple[SumFigures, ...] = ()
    wrapped: int = 0
    bytes_up: int = 0

    @property
    def adapter(self) -> bytes:
        """The vector as an adapter file has it: little-endian float32."""
        return self.vector.astype("<f4").tobytes()


def pooled(plan: Plan, *, processes: int = 1, progress: Told | None = None) -> Reference:
    """Train on everybody's data at once. Raises what bundle and data raise, ConfigError when it diverges."""
    training, total = plan.training, plan.rounds * plan.steps
    vector = np.zeros(open_bundle(plan.bundle).layout.numbers, np.float32)
    optimizer = AdamW(vector.size, rate=training.rate, weight_decay=training.weight_decay)
    losses: list[float] = []
    with open_devices(plan, processes) as devices:
        for step in range(total):
            number, offset = divmod(step, plan.steps)
            parts = devices.gradients(number + 1, offset, vector)
            optimizer.step(vector, _mean(part.vector for part in parts))
            losses.append(_loss(parts))
            if progress is not None:
                progress(step + 1, total)
    return Reference(vector, tuple(losses))


def federated(
    plan: Plan,
    bloc_devices: int,
    *,
    codec: bool,
    seed: int = 0,
    processes: int = 1,
    progress: Told | None = None,
) -> Reference:
    """The fleet's rounds under the plan's rule: all from the same adapter with fresh AdamW, and the uniform mean.

    With `codec`, each bloc's deltas are clipped, rotated and rounded to the words that the hub would name, 16 bits
    first and 8 then; `seed` draws rotation and rounding. Raises as `pooled`, ConfigError for a bloc that is not whole.
    """
    names = tuple(plan.people)
    if not names or len(names) % bloc_devices:
        raise ConfigError("devices must fill whole blocs", field="devices", value=len(names))
    training = plan.training
    rule = rule_of(training.rule, open_bundle(plan.bundle).layout, training.a_seed)
    state, channels = rule.initial(), dict[str, _Channel]()
    losses: list[float] = []
    bytes_up = 0
    with open_devices(plan, processes) as devices:
        for number in range(1, plan.rounds + 1):
            part = rule.part(number, probing=rule.probing(state))
            channel = channels.setdefault(part.name, _Channel(plan, part, bloc_devices, seed))
            work = dict(zip(names, devices.deltas(number, state), strict=True))
            if codec:
                bytes_up += report_layout(part.numbers, channel.bits).size
                total = channel.total(number, work)
            else:
                bytes_up += 4 * part.numbers
                total = np.sum([sent.vector for sent in work.values()], axis=0, dtype=np.float32)
            state = rule.apply(part, state, total, share(len(names), 0))
            losses.append(_loss(work.values()))
            if progress is not None:
                progress(number, plan.rounds)
    figures = sorted((one for c in channels.values() for one in c.figures), key=lambda one: one.round)
    wrapped = sum(channel.wrapped for channel in channels.values())
    return Reference(state, tuple(losses), tuple(figures), wrapped, bytes_up)


class _Channel:
    """Reports and sums as in `fedge.update.report` and `hub.aggregation`, all but the masks, which cancel."""

    def __init__(self, plan: Plan, part: Part, bloc_devices: int, seed: int) -> None:
        self._plan, self._part, self._bloc_devices, self._seed = plan, part, bloc_devices, seed
        self._numbers = part.numbers
        self._spread = self._mean_norm = 0.0  # of the last opened sum
        self._carry: dict[str, Vector] = {}
        self.figures: list[SumFigures] = []
        self.wrapped = 0

    def total(self, number: int, work: Mapping[str, LocalWork]) -> Vector:
        """The sum over all blocs' opened sums of this round. All blocs begin with what the last round said."""
        names, k = list(work), self._bloc_devices
        blocs = [names[start : start + k] for start in range(0, len(names), k)]
        codecs = [self._codec(number, place) for place in range(len(blocs))]
        total = np.zeros(self._numbers, np.float32)
        for bloc, codec in zip(blocs, codecs, strict=True):
            total += self._open(number, codec, {name: work[name] for name in bloc})
        return total

    @property
    def bits(self) -> int:
        """Of the words of the next round."""
        return self._codec(0, 0).bits

    def _codec(self, number: int, place: int) -> UpdateCodec:
        seed = self._draw(f"rotation/{number}/{place}")[:SEED_BYTES]
        if self._part.name == "probe":
            rate = self._plan.training.rate
            return coding.probe_codec(rate, self._numbers, self._bloc_devices, seed)
        if self._spread > 0:
            return coding.next_codec(self._spread, self._mean_norm, self._bloc_devices, seed)
        return coding.first_codec(
            self._plan.steps, self._plan.training.rate, self._numbers, self._bloc_devices, seed
        )

    def _open(self, number: int, codec: UpdateCodec, bloc: Mapping[str, LocalWork]) -> Vector:
        words = zero_words(padded_length(self._numbers), codec.bits)
        metadata = np.zeros(METADATA_WORDS, np.uint32)
        sent: dict[str, Vector] = {}
        for device, part in bloc.items():
            delta = add_carry(part.vector, self._carry.pop(device, None))
            sent[device], norm = coding.clip(delta, codec.clip)
            encoded = coding.encode(sent[device], codec, self._draw(f"rounding/{number}/{device}"))
            add_words(words, encoded.words)
            add_words(metadata, pack(self._metadata(part, norm / codec.clip, encoded)))
        try:
            reading = read_sum(words, metadata, codec=codec, devices=len(bloc), numbers=self._numbers)
        except IntegrityError:
            self.wrapped += 1
            self._carry.update(sent)
            return np.zeros(self._numbers, np.float32)
        self._spread = coding.spread(reading.total)
        self._mean_norm = reading.metadata.norm * codec.clip / len(bloc)
        true: Vector = np.sum(list(sent.values()), axis=0, dtype=np.float32)
        self.figures.append(_figures(number, codec, len(bloc), reading.total, true))
        return reading.total

    def _metadata(self, part: LocalWork, norm: float, encoded: coding.Encoded) -> Metadata:
        return Metadata(
            contributors=int(norm > 0),
            steps=self._plan.steps,
            samples=part.rows,
            labels=part.labels,
            loss_sum=part.loss_sum,
            norm=norm,
            strata=encoded.strata,
        )

    def _draw(self, what: str) -> bytes:
        """32 bytes that repeat: nothing here is masked, so nothing here is secret."""
        return hashlib.sha256(f"{self._seed}/{what}".encode()).digest()


def _figures(number: int, codec: UpdateCodec, devices: int, decoded: Vector, true: Vector) -> SumFigures:
    reach = codec.step * 2 ** (codec.bits - 1) / coding.spread(true)  # spreads of the sum that the words hold
    error = float(np.sum((decoded - true) ** 2, dtype=np.float64) / np.sum(true**2, dtype=np.float64))
    return SumFigures(number, codec.bits, error, coding.predicted_error(devices, codec.bits, reach))


def _mean(vectors: Iterable[Vector]) -> Vector:
    mean: Vector = np.mean(list(vectors), axis=0, dtype=np.float32)
    return mean


def _loss(parts: Iterable[LocalWork]) -> float:
    work = list(parts)
    return sum(part.loss_sum for part in work) / sum(part.labels for part in work)
