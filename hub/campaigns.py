"""What an operator asks for, checked as a whole before anything is kept: a campaign from a bundle and a few numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedge import limits
from fedge.errors import ConfigError, NoInputError
from fedge.io.peft_folder import changes_of, read_peft
from fedge.lora import RULES, AdapterLayout
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, open_manifest
from fedge.rules import least_rows, rule_of, started_from, usual_rate, usual_rows
from hub.blobs import Blobs
from hub.effects import CampaignRow
from hub.registry import ID_PATTERN

Floats = NDArray[np.float32]
_FIRST_ROUND_BYTES: Final = 2  # a campaign begins with 16-bit words, while the codec's step is unknown
_SEED_DOMAIN: Final = b"fedge campaign frozen A v1\x00"


@dataclass(frozen=True, slots=True)
class Wish:
    """A campaign as an operator words it. Seconds and counts; `devices` is how many must be present at the start."""

    name: str
    rounds: int = 8
    steps: int = 5
    bloc: int = limits.BLOC_DEVICES_DEFAULT
    devices: int = 16
    rate: float | None = None  # None: what suits rule and task
    batch_rows: int | None = None  # None: what suits the task
    window_tokens: int = 64
    window_seconds: int = 3_600
    seed: int = 0
    work_seconds: float = 120.0
    training_max: int = 0
    rest_seconds: float = 0.0
    quota: float = 0.0
    form_seconds: float = 1_800.0
    hours_max: float = 0.0
    server_rate: float = 1.0
    normalise_steps: bool = False
    rule: str = "ffa"  # one of fedge.lora.RULES
    start_from: Path | None = None  # a PEFT folder; None: the base model as it is


def make_campaign(
    wish: Wish, bundle: Path, blobs: Blobs, url: str, *, tell: Callable[[str], None] = lambda notice: None
) -> CampaignRow:
    """The campaign's row; the bundle's files and the first adapter are then in `blobs`.

    Raises ConfigError naming every wrong field, NoInputError, IntegrityError, and what a start that does not fit
    raises (`fedge.io.peft_folder.read_peft`, `fedge.rules.started_from`). `tell` hears what one should know of it.
    """
    manifest, data, signature = read_bundle(bundle)
    layout = manifest.layout
    rows = usual_rows(manifest.task) if wish.batch_rows is None else wish.batch_rows
    a_seed = hashlib.sha256(_SEED_DOMAIN + f"{wish.name} {wish.seed}".encode()).digest()[:16]
    check(wish, _largest_report(wish, layout, a_seed), rows_min=least_rows(manifest.task))
    rate = usual_rate(wish.rule, manifest.task) if wish.rate is None else wish.rate
    rule = rule_of(wish.rule, layout, a_seed)
    first = rule.initial()
    if wish.start_from is not None:
        first = _started_from(wish.start_from, wish.rule, manifest, bundle / WEIGHTS, a_seed, tell)
    for name, entry in manifest.files.items():
        blobs.adopt(bundle / name, entry.sha256)
    return CampaignRow(
        id=wish.name,
        manifest=blobs.put(data),
        manifest_signature=signature,
        publisher=bytes.fromhex(manifest.publisher),
        url=url,
        lora=manifest.lora,
        training=Training(
            rate=rate,
            batch_rows=rows,
            window_tokens=wish.window_tokens,
            a_seed=a_seed,
            data_seed=wish.seed,
            rule=wish.rule,
        ),
        numbers=rule.part(1, probing=False).numbers,
        rounds=wish.rounds,
        steps=wish.steps,
        bloc_devices=wish.bloc,
        form_at_devices=wish.devices,
        window_seconds=wish.window_seconds,
        seed=wish.seed,
        adapter=blobs.put(first.astype("<f4").tobytes()),
        layers=manifest.layers,
        lora_shapes={} if wish.rule == "ffa" else manifest.lora_shapes,
        layer_path=manifest.layer_path,
        dense={} if wish.rule == "ffa" else manifest.dense,
        probes=rule.probing(first),
        work_seconds=min(wish.work_seconds, wish.window_seconds),
        training_devices_max=wish.training_max,
        rest_seconds=wish.rest_seconds,
        quota=wish.quota,
        form_seconds=wish.form_seconds,
        server_rate=wish.server_rate,
        normalise_steps=wish.normalise_steps,
        seconds_max=3_600 * wish.hours_max,
    )


def read_bundle(folder: Path) -> tuple[Manifest, bytes, bytes]:
    """Manifest, its bytes and its signature, verified. Raises NoInputError, IntegrityError, UnsupportedError."""
    try:
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    except OSError as error:
        raise NoInputError(
            f"{folder} is no bundle", field="bundle", value=str(folder), hint="Make one: fedge quantize MODEL"
        ) from error
    return open_manifest(data, signature), data, signature


def check(wish: Wish, numbers: int, rows_min: int = 1) -> None:
    """Raises one ConfigError that names everything that is wrong, not just the first.

    A step has `rows_min` examples at the least (`fedge.rules.least_rows`).
    """
    problems = [*_wrong_task(wish, numbers), *_wrong_schedule(wish)]
    if wish.batch_rows is not None:
        problems += _outside("batch_rows", wish.batch_rows, rows_min, 256)
    if problems:
        raise ConfigError("this campaign cannot run: " + "; ".join(problems), hint="Nothing was started")


def _wrong_task(wish: Wish, numbers: int) -> Iterator[str]:
    """What cannot be trained."""
    if ID_PATTERN.fullmatch(wish.name) is None:
        yield f"name={wish.name!r}: lower-case letters, digits, hyphens"
    if len(wish.name) > limits.ID_CHARS_MAX:
        yield f"name: at most {limits.ID_CHARS_MAX} characters"
    yield from _outside("rounds", wish.rounds, 1, limits.ROUNDS_MAX)
    yield from _outside("steps", wish.steps, 1, limits.STEPS_MAX)
    if wish.rate is not None and not 0 < wish.rate <= 1:
        yield f"rate={wish.rate}: above 0, at most 1"
    if wish.rule not in RULES:
        yield f"rule={wish.rule!r}: one of {', '.join(RULES)}"
    yield from _outside("window_tokens", wish.window_tokens, 8, 8_192)
    yield from _outside("seed", wish.seed, 0, 2**62 - 1)
    bytes_needed = numbers * _FIRST_ROUND_BYTES + 4 * limits.META_WORDS_MAX
    if bytes_needed > limits.TRANSFER_BYTES_MAX:
        yield (
            f"bundle: a report of {numbers:,} numbers needs {bytes_needed:,} bytes, above "
            f"{limits.TRANSFER_BYTES_MAX:,}: use a lower rank or fewer targets"
        )


def _wrong_schedule(wish: Wish) -> Iterator[str]:
    """What no fleet can follow."""
    if not limits.BLOC_DEVICES_MIN <= wish.bloc <= limits.BLOC_DEVICES_MAX:
        yield (
            f"bloc={wish.bloc}: {limits.BLOC_DEVICES_MIN} to {limits.BLOC_DEVICES_MAX}, because the sum of "
            "fewer says too much about one person"
        )
    if wish.devices < wish.bloc:
        yield f"devices={wish.devices}: at least one bloc of {wish.bloc}"
    yield from _outside("window", wish.window_seconds, 10, limits.WINDOW_SECONDS_MAX, "seconds")
    yield from _outside("work_seconds", wish.work_seconds, 1, 86_400)
    if wish.training_max and wish.training_max < wish.bloc:
        yield f"training_max={wish.training_max}: at least one bloc of {wish.bloc}, or 0 for no bound"
    yield from _outside("rest_seconds", wish.rest_seconds, 0, limits.WINDOW_SECONDS_MAX)
    if wish.quota and not 1 <= wish.quota <= 1_000:
        yield f"quota={wish.quota:g}: 1 to 1000, or 0 for no bound; below 1 every bloc would be above its share"
    yield from _outside("form_seconds", wish.form_seconds, 10, limits.WINDOW_SECONDS_MAX)
    yield from _outside("hours_max", wish.hours_max, 0, 24 * 3_650, "(0: no end)")
    if not 0 < wish.server_rate <= 100:
        yield f"server_rate={wish.server_rate:g}: above 0, at most 100"


def _outside(name: str, value: float, least: float, most: float, unit: str = "") -> Iterator[str]:
    if not least <= value <= most:  # also what is no number
        yield f"{name}={value}: {least} to {most} {unit}".rstrip()


def _largest_report(wish: Wish, layout: AdapterLayout, a_seed: bytes) -> int:
    """Numbers of the largest report of the campaign; for a rule that is not known, of the plainest one."""
    if wish.rule not in RULES:
        return layout.numbers
    rule = rule_of(wish.rule, layout, a_seed)
    return max(rule.part(number, probing=probing).numbers for number in (1, 2) for probing in (False, True))


def _started_from(
    folder: Path, rule: str, manifest: Manifest, weights: Path, a_seed: bytes, tell: Callable[[str], None]
) -> Floats:
    """The first adapter file of a campaign that goes on from the PEFT folder `folder`."""
    layout = manifest.layout
    found = read_peft(folder, layout, classes=manifest.classes)
    for notice in found.notices:
        tell(f"{folder}: {notice}")
    return started_from(rule, layout, a_seed, found.layout, changes_of(found, weights, manifest))
