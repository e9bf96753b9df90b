"""What a masked sum costs a device and the hub, and how far the decoded sum is from the plain one.

CPU time of one thread (`process_time`), everything in memory: X25519 prekeys, edge keys, masks, codec, metadata. The
updates have heavy tails, layers of very different size and a part common to all (Student t with 4 degrees, correlation
0.3), as LoRA deltas have. Signatures and transport are not in here.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from time import process_time

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy loads its BLAS
    os.environ[_variable] = "1"

import numpy as np  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey  # noqa: E402
from report import Row, parser, print_report, progress  # noqa: E402

from fedge.secagg.bloc import BlocSum  # noqa: E402
from fedge.secagg.masks import Member, mask_in_place, open_edges  # noqa: E402
from fedge.update import codec as coding  # noqa: E402
from fedge.update.report import BuiltReport, build_report, read_sum, report_layout  # noqa: E402
from fedge.update.rotation import Vector  # noqa: E402
from fedge.update.spec import UpdateCodec  # noqa: E402

SEED = hashlib.sha256(b"rotation").digest()[:16]
DEVICES = 8
FLOWER = "flwr 1.42.0 SecAgg+, n=10 d=1M (earlier run of its stage functions, 2-core EPYC)"
FLOWER_NUMBERS = 1_000_000


class Bloc:
    """`devices` devices with prekeys and updates of `numbers` numbers, under one transcript hash."""

    def __init__(self, devices: int, numbers: int, bits: int, *, aes: bool, seed: int) -> None:
        self.devices, self.numbers = devices, numbers
        rng = np.random.default_rng(seed)
        self.h = rng.bytes(32)
        self.secrets = [rng.bytes(32) for _ in range(devices)]
        keys = [X25519PrivateKey.from_private_bytes(secret).public_key() for secret in self.secrets]
        self.roster = [Member(prekey=key.public_bytes_raw(), aes=aes) for key in keys]
        self.deltas = _deltas(devices, numbers, rng)
        self.entropy = [rng.bytes(32) for _ in range(devices)]
        self.truth = np.asarray(self.deltas).sum(axis=0, dtype=np.float64)
        spread = coding.spread(self.truth.astype(np.float32))
        mean_norm = float(np.mean([coding.length(delta) for delta in self.deltas]))
        self.codec: UpdateCodec = coding.next_codec(spread, mean_norm, devices, SEED, bits)

    def report(self, place: int) -> BuiltReport:
        return build_report(
            self.deltas[place],
            carry=None,
            loss_sum=1_000.0,
            labels=300,
            samples=20,
            steps=5,
            codec=self.codec,
            h=self.h,
            position=place,
            roster=self.roster,
            prekey_secret=self.secrets[place],
            entropy=self.entropy[place],
        )

    def mask(self, place: int) -> None:
        """Edge keys and masks of one report, without the codec."""
        layout = report_layout(self.numbers, self.codec.bits)
        words, metadata = layout.views(bytearray(layout.size))
        mask_in_place(words, metadata, open_edges(self.h, place, self.roster, self.secrets[place]))

    def sum_of(self, reports: Sequence[BuiltReport]) -> BlocSum:
        names = [str(place) for place in range(self.devices)]
        total = BlocSum(self.h, names, report_layout(self.numbers, self.codec.bits))
        for name, report in zip(names, reports, strict=True):
            total.add(name, report.body)
        return total


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    rows: list[Row] = []
    for numbers in (20_480,) if args.quick else (184_320, 1_000_000):
        for bits in (8, 16):
            rows += measure(numbers, bits, args)
        slow = Bloc(DEVICES, numbers, 8, aes=False, seed=args.seed)
        rows.append(masks_row(slow, f"n={DEVICES} d={numbers} b=8 chacha20", args.runs))
    print_report("secure_sum", rows, args)


def measure(numbers: int, bits: int, args: argparse.Namespace) -> list[Row]:
    """All rows of one size and width, with AES masks."""
    case = f"n={DEVICES} d={numbers} b={bits}"
    progress(case)
    bloc = Bloc(DEVICES, numbers, bits, aes=True, seed=args.seed)
    reports = [bloc.report(place) for place in range(DEVICES)]
    words, metadata = bloc.sum_of(reports).open()

    def read() -> Vector:
        return read_sum(words, metadata, codec=bloc.codec, devices=DEVICES, numbers=numbers).total

    def row(figure: str, work: Callable[[], object], *, share: int = 1, flower: str | None = None) -> Row:
        baseline = f"{FLOWER}: {flower}" if flower and numbers == FLOWER_NUMBERS else None
        return Row.of(figure, case, cpu_ms(work, args.runs, share), "ms", baseline=baseline)

    error = float(np.linalg.norm(read() - bloc.truth) / np.linalg.norm(bloc.truth))
    predicted = math.sqrt(coding.predicted_error(DEVICES, bits, coding.SPREADS * coding.SLACK))
    size_goal = f"<= {numbers * bits // 8 + 4_096}"
    return [
        masks_row(bloc, case, args.runs),
        row("client_encode_cpu_ms", lambda: coding.encode(bloc.deltas[0], bloc.codec, bloc.entropy[0])),
        row("client_report_cpu_ms", lambda: bloc.report(0), flower="81 ms"),
        row(
            "hub_add_report_cpu_ms", lambda: bloc.sum_of(reports), share=DEVICES, flower="27 ms with opening"
        ),
        row("hub_open_bloc_cpu_ms", read),
        Row.of("report_bytes", case, [len(reports[0].body)], "bytes", goal=size_goal),
        Row.of("relative_error", case, [error], "1"),
        Row.of("predicted_relative_error", case, [predicted], "1"),
    ]


def masks_row(bloc: Bloc, case: str, runs: int) -> Row:
    return Row.of("client_masks_cpu_ms", case, cpu_ms(lambda: bloc.mask(0), runs), "ms")


def cpu_ms(work: Callable[[], object], runs: int, share: int = 1) -> list[float]:
    """CPU milliseconds of `work` divided by `share`, once a run, after one run to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = process_time()
        work()
        times.append((process_time() - start) * 1e3 / share)
    return times


def _deltas(devices: int, numbers: int, rng: np.random.Generator) -> list[Vector]:
    layers = np.repeat(np.exp(rng.standard_normal(64)), -(-numbers // 64))[:numbers]
    common = rng.standard_t(4, numbers)
    return [
        (0.01 * layers * (math.sqrt(0.3) * common + math.sqrt(0.7) * rng.standard_t(4, numbers))).astype(
            np.float32
        )
        for _ in range(devices)
    ]


if __name__ == "__main__":
    main()
