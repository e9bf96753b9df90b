"""What an operator asks for, checked as a whole before anything is kept: a campaign from a bundle and a few numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge import limits
from fedge.errors import ConfigError, NoInputError
from fedge.lora import AdapterLayout
from fedge.messages import BlobRef, Training
from fedge.release import MANIFEST, SIGNATURE, Manifest, open_manifest
from hub.blobs import Blobs
from hub.effects import CampaignRow
from hub.registry import ID_PATTERN

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
    rate: float = 0.016
    batch_rows: int = 4
    window_tokens: int = 64
    window_seconds: int = 3_600
    seed: int = 0


def make_campaign(wish: Wish, bundle: Path, blobs: Blobs, url: str) -> CampaignRow:
    """The campaign's row; the bundle's files and the first adapter (all zeros) are then in `blobs`.

    Raises ConfigError naming every wrong field, NoInputError, IntegrityError.
    """
    manifest, data, signature = read_bundle(bundle)
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r)
    check(wish, layout.numbers)
    for name, entry in manifest.files.items():
        blobs.adopt(bundle / name, entry.sha256)
    a_seed = hashlib.sha256(_SEED_DOMAIN + f"{wish.name} {wish.seed}".encode()).digest()[:16]
    return CampaignRow(
        id=wish.name,
        manifest=blobs.put(data),
        manifest_signature=signature,
        publisher=bytes.fromhex(manifest.publisher),
        url=url,
        lora=manifest.lora,
        training=Training(
            rate=wish.rate,
            batch_rows=wish.batch_rows,
            window_tokens=wish.window_tokens,
            a_seed=a_seed,
            data_seed=wish.seed,
        ),
        numbers=layout.numbers,
        rounds=wish.rounds,
        steps=wish.steps,
        bloc_devices=wish.bloc,
        form_at_devices=wish.devices,
        window_seconds=wish.window_seconds,
        seed=wish.seed,
        adapter=_first_adapter(blobs, layout.numbers),
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


def check(wish: Wish, numbers: int) -> None:
    """Raises one ConfigError that names everything that is wrong, not just the first."""
    bytes_needed = numbers * _FIRST_ROUND_BYTES + 4 * limits.META_WORDS_MAX
    problems = [
        text
        for wrong, text in (
            (
                ID_PATTERN.fullmatch(wish.name) is None,
                f"name={wish.name!r}: lower-case letters, digits, hyphens",
            ),
            (len(wish.name) > limits.ID_CHARS_MAX, f"name: at most {limits.ID_CHARS_MAX} characters"),
            (not 1 <= wish.rounds <= limits.ROUNDS_MAX, f"rounds={wish.rounds}: 1 to {limits.ROUNDS_MAX}"),
            (not 1 <= wish.steps <= limits.STEPS_MAX, f"steps={wish.steps}: 1 to {limits.STEPS_MAX}"),
            (
                not limits.BLOC_DEVICES_MIN <= wish.bloc <= limits.BLOC_DEVICES_MAX,
                f"bloc={wish.bloc}: {limits.BLOC_DEVICES_MIN} to {limits.BLOC_DEVICES_MAX}, because the sum of "
                "fewer says too much about one person",
            ),
            (wish.devices < wish.bloc, f"devices={wish.devices}: at least one bloc of {wish.bloc}"),
            (not 0 < wish.rate <= 1, f"rate={wish.rate}: above 0, at most 1"),
            (not 1 <= wish.batch_rows <= 256, f"batch_rows={wish.batch_rows}: 1 to 256"),
            (not 8 <= wish.window_tokens <= 8_192, f"window_tokens={wish.window_tokens}: 8 to 8192"),
            (
                not 10 <= wish.window_seconds <= limits.WINDOW_SECONDS_MAX,
                f"window={wish.window_seconds}: 10 to {limits.WINDOW_SECONDS_MAX} seconds",
            ),
            (not 0 <= wish.seed < 2**62, f"seed={wish.seed}: 0 to 2^62"),
            (
                bytes_needed > limits.TRANSFER_BYTES_MAX,
                f"bundle: a report of {numbers:,} numbers needs {bytes_needed:,} bytes, above "
                f"{limits.TRANSFER_BYTES_MAX:,}: use a lower rank or fewer targets",
            ),
        )
        if wrong
    ]
    if problems:
        raise ConfigError("this campaign cannot run: " + "; ".join(problems), hint="Nothing was started")


def _first_adapter(blobs: Blobs, numbers: int) -> BlobRef:
    return blobs.put(bytes(4 * numbers))  # B = 0: the base model as it is
