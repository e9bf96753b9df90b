"""`fedge sim`: a whole fleet on this machine. Here parsers are built; what a word does is imported when it is run."""

from __future__ import annotations

import argparse
from typing import Final

import firmware_sim.cli.demo
import firmware_sim.cli.studies
import firmware_sim.cli.sweep
import firmware_sim.cli.world

_EPILOG: Final = """\
first steps:
  fedge sim demo                      a real model on 16 processes with real people's messages: ten minutes
  fedge sim scenarios                 simulated worlds that are ready to run
  fedge sim world lab                 eight Pis on a bench, a virtual day in seconds, with a page to look at
  fedge sim scenarios lab > my.toml   a copy to edit; then: fedge sim world my.toml
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `sim` and its words. Imports nothing heavy."""
    sim = subparsers.add_parser(
        "sim",
        help="a whole fleet on this machine",
        description="A fleet before any hardware is bought: real processes (demo), or a simulated world with clock, "
        "heat, batteries, links and bad luck around the shipped agent and hub.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = sim.add_subparsers(dest="sim_command", metavar="WORD", required=True)
    for part in (
        firmware_sim.cli.demo,
        firmware_sim.cli.world,
        firmware_sim.cli.studies,
        firmware_sim.cli.sweep,
    ):
        part.register(words)
