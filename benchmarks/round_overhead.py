"""What a round costs beside training: 16 agent processes, a real broker and hub on loopback, reports of full size.

SmolLM2-135M itself, one step on one short line, so that training costs next to nothing; what it still takes is
measured by the workers and taken off. Round 1 (16-bit words, workers that start) is shown on its own.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from report import Row, parser, print_report, progress

from firmware_sim.processes.fleet import LocalFleet
from hub.campaigns import Wish
from hub.effects import LedgerEntry

BLOC = 8


def main() -> None:
    flags = parser(__doc__ or "", runs=6)
    flags.add_argument("--bundle", type=Path, help="a SmolLM2-135M bundle; made anew when left out")
    flags.add_argument("--devices", type=int, default=16, help="agent processes, a multiple of 8 (16)")
    args = flags.parse_args()
    if args.quick:
        args.devices, args.runs = 8, 2
    with tempfile.TemporaryDirectory(prefix="fedge-overhead-") as folder:
        print_report("round_overhead", measure(Path(folder), args), args)


def measure(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Runs a campaign of `runs` + 1 rounds and times it by the hub's ledger.

    Blocs are not in step, so all rounds but the first are timed together.
    """
    fleet = LocalFleet(folder / "fleet", _data(folder, args.devices))
    try:
        info = fleet.start_hub()
        bundle = args.bundle or _bundle(folder)
        fleet.enroll(lambda _: None)
        wish = Wish("c", rounds=args.runs + 1, steps=1, devices=args.devices, batch_rows=1, seed=args.seed)
        fleet.start_campaign(bundle, wish)
        fleet.start_agents()
        progress(f"{args.devices} agents, {info.broker}")
        ledger: list[LedgerEntry] = []
        while not any(entry.kind == "closed" for entry in ledger):
            ledger += fleet.look()
            time.sleep(0.02)
        figures = list(fleet.figures().values())
    finally:
        fleet.stop()
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    case = f"{args.devices} devices, {args.devices // BLOC} blocs"
    opened = {
        number: [e.at for e in ledger if e.kind == "opened" and e.round == number]
        for number in (1, wish.rounds)
    }
    whole = (max(opened[wish.rounds]) - max(opened[1])) / args.runs
    # The fastest device's step: those of the others contain waiting for a core, which is overhead.
    training = len(figures) * min(figure.seconds_per_step for figure in figures) / fleet.slots
    first = max(opened[1]) - min(entry.at for entry in ledger if entry.kind == "open")
    sat_out = sum(entry.kind == "sat-out" for entry in ledger)
    reports = [float(count) for figure in figures for count in figure.round_up_bytes[1:]]
    return [
        Row.of("round_seconds", case, [whole], "s"),
        Row.of("round_without_training_seconds", case, [max(0.0, whole - training)], "s", goal="<= 2"),
        Row.of("first_round_seconds", case, [first], "s"),
        Row.of("sat_out_rounds", case, [float(sat_out)], "count", goal="== 0"),
        Row.of("upload_bytes_per_round", case, reports, "B", goal="<= 188416"),
        Row.of("processor_seconds_whole_run", case, [cpu.ru_utime + cpu.ru_stime], "s"),
    ]


def _data(folder: Path, devices: int) -> dict[str, Path]:
    found = {}
    for number in range(devices):
        path = folder / f"{number}.jsonl"
        lines = [
            {"prompt": "how are you", "completion": f"i am fine {line} and {number * 37 % 101}"}
            for line in range(16)
        ]
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))
        found[f"device-{number}"] = path
    return found


def _bundle(folder: Path) -> Path:
    from fedge.lora import LoraConfig
    from quantize.bundle import quantize

    progress("exporting SmolLM2-135M")
    quantize("smollm2-135m", folder / "bundle", Ed25519PrivateKey.generate(), lora=LoraConfig())
    return folder / "bundle"


if __name__ == "__main__":
    main()
