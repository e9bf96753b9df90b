"""What a round costs beside training: 16 agent processes, a real broker and hub on loopback, reports of full size.

The model has SmolLM2-135M's adapter (30 layers, 184,320 trained numbers) and little else, so that a step costs next to
nothing; what its training still takes is measured by the workers and taken off. Round 1 (16-bit words, workers that
start) is left out of the figure and shown on its own.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from report import ROOT, Row, parser, print_report, progress

sys.path.insert(0, str(ROOT / "tests"))
import tiny

from firmware_sim.fleet import LocalFleet
from hub.campaigns import Wish
from hub.effects import LedgerEntry

SIZES = {
    **tiny.SIZES,
    "hidden_size": 576,
    "intermediate_size": 32,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
BLOC = 8


def main() -> None:
    flags = parser(__doc__ or "", runs=6)
    flags.add_argument("--devices", type=int, default=16, help="agent processes, a multiple of 8 (16)")
    args = flags.parse_args()
    if args.quick:
        args.devices, args.runs = 8, 2
    with tempfile.TemporaryDirectory(prefix="fedge-overhead-") as folder:
        print_report("round_overhead", measure(Path(folder), args), args)


def measure(folder: Path, args: argparse.Namespace) -> list[Row]:
    """Runs a campaign of `runs` + 1 rounds and times them by the hub's ledger."""
    fleet = LocalFleet(folder / "fleet", _data(folder, args.devices))
    try:
        info = fleet.start_hub()
        bundle = _bundle(folder)
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
    whole = _round_seconds(ledger)
    training = sum(figure.seconds_per_step for figure in figures) / fleet.slots
    rounds = [whole[number] for number in sorted(whole)[1:]]
    reports = [float(count) for figure in figures for count in figure.round_up_bytes[1:]]
    return [
        Row.of("round_seconds", case, rounds, "s"),
        Row.of(
            "round_without_training_seconds",
            case,
            [max(0.0, seconds - training) for seconds in rounds],
            "s",
            goal="<= 2",
        ),
        Row.of("first_round_seconds", case, [whole[1]], "s"),
        Row.of("upload_bytes_per_round", case, reports, "B", goal="<= 188416"),
        Row.of("processor_seconds_whole_run", case, [cpu.ru_utime + cpu.ru_stime], "s"),
    ]


def _round_seconds(ledger: list[LedgerEntry]) -> dict[int, float]:
    """Round number -> seconds from its first OPEN to its last opened sum, over all blocs."""
    opened = [entry for entry in ledger if entry.kind == "opened"]
    return {
        number: max(entry.at for entry in opened if entry.round == number)
        - min(entry.at for entry in ledger if entry.kind == "open" and entry.round == number)
        for number in {entry.round for entry in opened}
    }


def _data(folder: Path, devices: int) -> dict[str, Path]:
    found = {}
    for number in range(devices):
        path = folder / f"{number}.jsonl"
        lines = [{"prompt": "how are you", "completion": f"i am fine {line}"} for line in range(16)]
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))
        found[f"device-{number}"] = path
    return found


def _bundle(folder: Path) -> Path:
    from transformers import LlamaConfig

    from quantize.bundle import quantize

    progress("exporting a model with a full-size adapter")
    tiny.write_model(folder / "model", LlamaConfig(**SIZES))
    out = folder / "bundle"
    quantize(
        str(folder / "model"), out, tiny.PUBLISHER, lora=tiny.LORA, name="hollow", weights_format="int4d"
    )
    return out


if __name__ == "__main__":
    main()
