"""A campaign's newest adapter as a standard PEFT folder, or in the file that devices write when they train alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import IntegrityError, UnsupportedError
from fedge.io.adapter_file import adapter_of, write_adapter
from fedge.lora import AdapterLayout
from fedge.release import Manifest
from hub.blobs import Blobs
from hub.effects import CampaignRow
from hub.peft import write_peft

FFA: Final = "ffa"  # only B moves


def export_adapter(campaign: CampaignRow, blobs: Blobs, out: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` to `out`.

    Raises IntegrityError when the adapter does not fit the bundle, StorageError, NoInputError.
    """
    manifest, layout, vector = _read(campaign, blobs)
    write_peft(out, layout, campaign.lora, campaign.training.a_seed, vector, manifest.model)


def export_file(campaign: CampaignRow, blobs: Blobs, out: Path) -> None:
    """Writes the adapter file `out` (`fedge.io.adapter_file`), which `fedge adapter` and `train-once --from` read.

    Raises the same, and UnsupportedError for a rule under which the numbers are not those of B alone.
    """
    if campaign.training.rule != FFA:
        raise UnsupportedError(
            "an adapter file is written of campaigns whose A is frozen",
            field="rule",
            value=campaign.training.rule,
            hint="Export it as a PEFT folder",
        )
    manifest, _, vector = _read(campaign, blobs)
    seed = campaign.training.a_seed
    steps = campaign.adapter_version * campaign.steps
    write_adapter(out, adapter_of(manifest, vector, a_seed=seed, lora=campaign.lora, steps=steps))


def _read(campaign: CampaignRow, blobs: Blobs) -> tuple[Manifest, AdapterLayout, NDArray[np.float32]]:
    manifest = msgspec.json.decode(blobs.read(campaign.manifest), type=Manifest)
    layout = manifest.layout.like(campaign.lora)
    vector = np.frombuffer(blobs.read(campaign.adapter), "<f4")
    if vector.size != layout.numbers:
        raise IntegrityError("adapter does not fit the bundle", field="numbers", value=vector.size)
    return manifest, layout, vector
