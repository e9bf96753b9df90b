"""What a fleet in one process costs: a virtual day of up to 100,000 devices, a client's turn, many seeds with faults.

Every case runs in a process of its own, so that memory is its own. The day is that of the scheduler's study with
generative presence (phones and boards, two fifths on a battery, sessions and pauses) and a convex task; everything
between the machines is real bytes, signatures and key agreement are hashes (`--crypto hashed`). A client's turn is a
fleet that is always on and trains a tiny task back to back: READY, OPEN, training, encoding, masks, report, result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from report import Row, parser, print_report, progress

from firmware_sim.faults.strikes import Faults
from firmware_sim.rules.cases import case_of, judge
from firmware_sim.scenario import Campaign, Group, LinkKind, Scenario, load_scenario
from firmware_sim.study.conditions import study
from firmware_sim.world.world import World

PFL: Final = "pfl==0.6.0"
PFL_CLIENTS, PFL_ROUNDS, PFL_NUMBERS = 1_000, 20, 1_024
DAYS: Final = ((1_000, 3.0), (10_000, 45.0), (100_000, 900.0))  # devices, goal in CPU seconds
DEVICE_BYTES_GOAL: Final = 4_096
# Of a bloc between two rounds: with check-ins and life, about 30 events an hour.
REST_SECONDS: Final = 7_200.0
TURN_DEVICES, TURN_HOURS = 1_000, 0.5
SWEEP_SEEDS, SWEEP_DEVICES, SWEEP_HOURS = 200, 200, 6.0


def main() -> None:
    flags = parser(__doc__ or "", runs=3)
    flags.add_argument("--largest", type=int, default=100_000, help="leave out larger fleets (100000)")
    flags.add_argument("--no-peers", action="store_true", help="do not install and measure pfl")
    flags.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own
    args = flags.parse_args()
    if args.case:
        request = json.loads(args.case)
        print(json.dumps(CASES[request.pop("case")](**request)))
        return
    if args.quick:
        args.runs, args.largest, args.no_peers = 1, 1_000, True
    rows = [*_days(args), *_turns(args), *_sweep(args)]
    print_report("world", rows, args)


# ---------------------------------------------------------------- rows
def _days(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for devices, goal in DAYS:
        if devices > args.largest:
            continue
        runs = [
            _child("day", args, devices=devices) for _ in range(1 if devices > 10_000 else args.runs)
        ]  # the same seed: spreads are the machine's
        case = f"{devices:,} devices, 24 h"
        if len({run["crc"] for run in runs}) != 1:
            sys.exit(f"the same seed gave different events: {runs}")
        first = runs[0]
        rows += [
            Row.of("day_cpu_seconds", case, [run["cpu_seconds"] for run in runs], "s", goal=f"<= {goal:g}"),
            Row.of("events_per_device_hour", case, [first["events"] / devices / 24], "count"),
            Row.of("opened_rounds_per_device", case, [first["served"]], "count"),
            Row.of(
                "events_per_cpu_second", case, [run["events"] / run["cpu_seconds"] for run in runs], "1/s"
            ),
            Row.of(
                "memory_per_device_bytes",
                case,
                [run["bytes_per_device"] for run in runs],
                "B",
                goal=f"<= {DEVICE_BYTES_GOAL}" if devices >= 100_000 else None,
            ),
        ]
    return rows


def _turns(args: argparse.Namespace) -> list[Row]:
    runs = [_child("turn", args) for _ in range(args.runs)]
    peer = None if args.no_peers else _pfl(args.runs)
    return [
        Row.of(
            "client_turn_cpu_ms",
            "clock, link, drop-out, masks",
            [run["cpu_seconds"] * 1e3 / run["turns"] for run in runs],
            "ms",
            goal="<= 0.3",
            baseline=f"{PFL}, none of these",
            baseline_value=peer,
        )
    ]


def _sweep(args: argparse.Namespace) -> list[Row]:
    count = 4 if args.quick else SWEEP_SEEDS
    run = _child("seeds", args, count=count)
    case = f"{count} seeds x {SWEEP_DEVICES} devices x {SWEEP_HOURS:g} h, all faults, all invariants"
    return [
        Row.of("sweep_cpu_seconds", case, [run["cpu_seconds"]], "s", goal="<= 60"),
        Row.of("sweep_violations", case, [run["violations"]], "count", goal="== 0"),
        Row.of("sweep_faults", case, [run["faults"]], "count"),
        Row.of("sweep_opened_rounds", case, [run["opened"]], "count"),
    ]


def _child(case: str, args: argparse.Namespace, **more: int) -> dict[str, Any]:
    """One case in a fresh process."""
    progress(f"{case} {more or ''}")
    request = json.dumps({"case": case, "seed": args.seed, **more})
    done = subprocess.run(
        [sys.executable, __file__, "--case", request], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- cases, each in a process of its own
def day(seed: int, devices: int) -> dict[str, Any]:
    """The study's phones for 24 hours."""
    plan = study("phone", traces=False)
    campaign = msgspec.structs.replace(plan.campaign, task="bowl", rest_seconds=REST_SECONDS)
    result = World(
        msgspec.structs.replace(plan, campaign=campaign),
        devices=devices,
        days=1.0,
        seed=seed,
        crypto="hashed",
    ).run()
    served = sum(figures.devices * figures.rounds_mean for figures in result.classes.values()) / devices
    return {
        "cpu_seconds": result.cpu_seconds,
        "events": result.events,
        "bytes_per_device": result.bytes_per_device,
        "served": served,
        "crc": result.crc,
    }


def turn(seed: int) -> dict[str, Any]:
    """A thousand devices that are always on and train the smallest task without rest, on a link with loss."""
    campaign = Campaign(
        task="bowl",
        steps=1,
        form_at_share=0.9,
        training_share=0,
        rest_seconds=0,
        quota=0,
        bundle_mb=0,
        server_rate=1.0,
    )
    fleet = Scenario(
        name="turn",
        groups=(Group(name="gateways", boards={"gateway": 1.0}, link=LinkKind(kind="wifi", loss=0.001)),),
        campaign=campaign,
        faults={"power-cut": 0.5},
    )
    result = World(
        fleet,
        devices=TURN_DEVICES,
        days=TURN_HOURS / 24,
        seed=seed,
        crypto="hashed",
        faults=Faults(fleet.faults, seed, TURN_DEVICES, TURN_HOURS / 24),
    ).run()
    return {"cpu_seconds": result.cpu_seconds, "turns": result.rounds.updates_finished}


def seeds(seed: int, count: int) -> dict[str, Any]:
    """Worlds in which everything goes wrong, under every rule."""
    storm = load_scenario("storm")
    start = time.process_time()
    verdicts = [
        judge(case_of(storm, seed + number, SWEEP_DEVICES, SWEEP_HOURS / 24)) for number in range(count)
    ]
    return {
        "cpu_seconds": time.process_time() - start,
        "violations": sum(bool(verdict.invariant) for verdict in verdicts),
        "faults": sum(verdict.faults for verdict in verdicts),
        "opened": sum(verdict.opened for verdict in verdicts),
    }


CASES: Final[dict[str, Callable[..., dict[str, Any]]]] = {"day": day, "turn": turn, "seeds": seeds}


# ---------------------------------------------------------------- the peer
def _pfl(runs: int) -> float | None:
    """Milliseconds of CPU that a trivial client costs pfl-research, installed into an environment of its own."""
    script = Path(__file__).parent / "peers" / "pfl_trivial.py"
    with tempfile.TemporaryDirectory(prefix="fedge-pfl-") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        installed = subprocess.run(
            [python, "-m", "pip", "install", "-q", PFL], capture_output=True, check=False
        )
        if installed.returncode:
            progress(f"{PFL} could not be installed: no baseline")
            return None
        command = [python, str(script), *map(str, (PFL_CLIENTS, PFL_ROUNDS, PFL_NUMBERS))]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["ms_per_client"]
            for _ in range(runs)
        ]
    return float(sorted(found)[len(found) // 2])


if __name__ == "__main__":
    main()
