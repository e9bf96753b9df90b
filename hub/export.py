"""A campaign's newest adapter as a standard PEFT folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from fedge.errors import IntegrityError
from fedge.lora import AdapterLayout
from fedge.release import Manifest
from hub.blobs import Blobs
from hub.effects import CampaignRow
from hub.peft import write_peft


def export_adapter(campaign: CampaignRow, blobs: Blobs, out: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` to `out`.

    Raises IntegrityError when the adapter does not fit the bundle, StorageError, NoInputError.
    """
    manifest = msgspec.json.decode(blobs.read(campaign.manifest), type=Manifest)
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, campaign.lora.r)
    vector = np.frombuffer(blobs.read(campaign.adapter), "<f4")
    if vector.size != layout.numbers:
        raise IntegrityError("adapter does not fit the bundle", field="numbers", value=vector.size)
    write_peft(out, layout, campaign.lora, campaign.training.a_seed, vector, manifest.model)
