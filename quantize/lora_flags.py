"""The adapter's shape as flags of `fedge quantize`: PEFT's meaning of each, and one clear line for what cannot be."""

from __future__ import annotations

import argparse
import re
from typing import Final

from fedge.errors import UsageError
from fedge.lora import ALL_LINEAR, LoraConfig

_PATTERN: Final = re.compile(r"[*+?\[\](){}|^$\\]")  # a name has none of these
_LAYERS_MAX: Final = 10_000


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group `adapter`."""
    group = parser.add_argument_group("adapter (the words mean what they mean in PEFT)")
    group.add_argument("--lora-rank", type=int, default=8, metavar="R", help="rank (default: 8)")
    group.add_argument(
        "--lora-alpha", type=float, default=16.0, metavar="A", help="scale is A/R (default: 16)"
    )
    group.add_argument(
        "--rslora", action="store_true", help="scale is A/sqrt(R): rank-stabilised, for larger ranks"
    )
    group.add_argument(
        "--lora-targets",
        default="q_proj,v_proj",
        metavar="WHICH",
        help="names with commas (default: q_proj,v_proj), a regular expression for the whole path, or all-linear",
    )
    group.add_argument(
        "--lora-layers", default="", metavar="LIST", help="only these layers: 15-29 or 0,2,4 (default: all)"
    )
    group.add_argument(
        "--rank-pattern",
        action="append",
        default=[],
        metavar="NAME=R",
        help="another rank for modules whose path ends so; may be repeated",
    )
    group.add_argument(
        "--alpha-pattern",
        action="append",
        default=[],
        metavar="NAME=A",
        help="another alpha for modules whose path ends so; may be repeated",
    )


def lora_of(arguments: argparse.Namespace) -> LoraConfig:
    """The config that the flags ask for. Raises UsageError naming the flag, or what LoraConfig itself refuses."""
    if arguments.lora_rank < 1:
        raise UsageError("rank must be at least 1", field="lora-rank", value=arguments.lora_rank)
    ranks = {name: int(value) for name, value in _pairs(arguments.rank_pattern, "rank-pattern", r"\d{1,6}")}
    alphas = _pairs(arguments.alpha_pattern, "alpha-pattern", r"\d+(\.\d+)?")
    return LoraConfig(
        r=arguments.lora_rank,
        alpha=arguments.lora_alpha,
        targets=targets_of(arguments.lora_targets),
        rslora=arguments.rslora,
        rank_pattern=ranks,
        alpha_pattern={name: float(value) for name, value in alphas},
        layers=layers_of_list(arguments.lora_layers),
    )


def targets_of(text: str) -> tuple[str, ...] | str:
    """A tuple of names, `all-linear`, or a regular expression, told apart by the signs that only the last one has."""
    text = text.strip()
    if text == ALL_LINEAR or _PATTERN.search(text):
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


def layers_of_list(text: str) -> tuple[int, ...]:
    """`0,2,4-6` -> (0, 2, 4, 5, 6); empty for all."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= _LAYERS_MAX:
            raise UsageError(
                "this is no list of layers", field="lora-layers", value=text, hint="As 15-29, or 0,2,4"
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def _pairs(words: list[str], flag: str, number: str) -> list[tuple[str, str]]:
    pairs = []
    for word in words:
        name, _, value = word.rpartition("=")
        if not name or not re.fullmatch(number, value):
            raise UsageError(f"--{flag} takes NAME=NUMBER", field=flag, value=word)
        pairs.append((name, value))
    return pairs
