"""`fedge sim demo`: the whole job with real processes, a real model and real people's messages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

_EPILOG: Final = """\
examples:
  fedge sim demo                                the whole job: about ten minutes on two cores
  fedge sim demo --devices 8 --rounds 2         a taste of it
  fedge sim demo --resume                       go on after Ctrl-C, a kill or a power cut
  fedge sim demo --out DIR --json               results to DIR, the result as JSON on standard output
  fedge sim demo --line lte --faults kill-agent=2,link-cut=4,kill-hub

What comes out, in the folder --out: report.html (look at it), result.json, and adapter/, which PEFT loads:
  PeftModel.from_pretrained(base_model, "fedge-demo/adapter")
"""


def register(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `demo`. Imports nothing heavy."""
    demo = words.add_parser(
        "demo",
        help="real people, a real 4-bit model, real masked sums, on this machine",
        description="Fine-tunes a real 4-bit language model on real people's messages: every person is a process "
        "with its own keys and data, and the hub opens only sums over whole blocs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, default, about in (
        ("--devices", 16, "people who take part"),
        ("--unseen", 8, "more people, whose messages are only measured"),
        ("--rounds", 8, "how often each bloc is opened"),
        ("--steps", 5, "local steps of a device in a round"),
        ("--bloc", 8, "devices in a bloc; at least 5"),
        ("--seed", 0, "of everything that is drawn, keys apart"),
    ):
        demo.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} ({default})")
    demo.add_argument(
        "--model",
        default="smollm2-135m",
        metavar="MODEL",
        help="registered name, .gguf, folder or hub id (smollm2-135m)",
    )
    demo.add_argument("--broker", default="auto", metavar="WHICH", help="auto (default), mosquitto, embedded")
    demo.add_argument(
        "--out", type=Path, default=Path("fedge-demo"), metavar="DIR", help="the run's folder (fedge-demo)"
    )
    demo.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    demo.add_argument(
        "--with-reference",
        action="store_true",
        help="also train on everybody's data pooled (six minutes more)",
    )
    _add_troubles(demo)
    again = demo.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the unfinished run in the folder")
    again.add_argument("--fresh", action="store_true", help="throw away the run in the folder and start anew")
    demo.set_defaults(run=_demo)


def _add_troubles(demo: argparse.ArgumentParser) -> None:
    troubles = demo.add_argument_group("what goes wrong (nothing, unless asked for)")
    troubles.add_argument(
        "--faults",
        default="",
        metavar="NAME=N,…",
        help="drawn faults, as kill-agent=2,link-cut=1; a wrong name lists all",
    )
    troubles.add_argument(
        "--line",
        default="",
        metavar="KIND",
        help="every device's way to the broker: ethernet, wifi, lte, 3g, rural, satellite",
    )
    troubles.add_argument("--memory-mb", type=int, default=0, metavar="MB", help="of each agent, by cgroup")
    troubles.add_argument("--cpus", type=float, default=0.0, metavar="N", help="of each agent, by cgroup")


def _demo(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedge.errors import UsageError
    from firmware_sim.processes import demo
    from firmware_sim.processes.process_faults import parse_faults
    from firmware_sim.processes.report import print_table
    from firmware_sim.processes.result import encode_result

    names = (
        "devices",
        "unseen",
        "rounds",
        "steps",
        "bloc",
        "seed",
        "model",
        "broker",
        "line",
        "memory_mb",
        "cpus",
    )
    chosen = {name: getattr(arguments, name) for name in names}
    chosen |= {"reference": arguments.with_reference, "faults": parse_faults(arguments.faults)}
    try:
        settings = msgspec.convert(chosen, demo.Settings)
    except msgspec.ValidationError as error:
        raise UsageError(f"this demo cannot be run: {error}") from error
    result = demo.run(arguments.out, settings, resume=arguments.resume, fresh=arguments.fresh)
    if arguments.json:
        print(encode_result(result).decode(), end="")
    else:
        print_table(result, arguments.out)
    return 0
