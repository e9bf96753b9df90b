"""A campaign's newest adapter as a standard PEFT folder, or in the file that devices write when they train alone.

Whatever the campaign's rule: what is written are A and B of the same function.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError, IntegrityError
from fedge.io.adapter_file import adapter_of_state, write_adapter
from fedge.io.peft_folder import export_peft
from fedge.release import WEIGHTS, Manifest
from fedge.rules import Rule, rule_of
from hub.blobs import Blobs
from hub.effects import CampaignRow


def export_adapter(campaign: CampaignRow, blobs: Blobs, out: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` to `out`.

    Raises IntegrityError when the adapter does not fit the bundle, StorageError, NoInputError.
    """
    manifest, rule, state = _read(campaign, blobs)
    weights = blobs.folder / manifest.files[WEIGHTS].sha256
    export_peft(out, rule.tensors(state), campaign.lora, manifest, weights, layout=rule.layout)


def export_file(campaign: CampaignRow, blobs: Blobs, out: Path) -> None:
    """Writes the adapter file `out` (`fedge.io.adapter_file`), which `fedge adapter` and `train-once --from` read.

    Raises the same.
    """
    manifest, rule, state = _read(campaign, blobs)
    steps = campaign.adapter_version * campaign.steps
    write_adapter(out, adapter_of_state(manifest, rule, campaign.training.rule, state, steps=steps))


def _read(campaign: CampaignRow, blobs: Blobs) -> tuple[Manifest, Rule, NDArray[np.float32]]:
    manifest = msgspec.json.decode(blobs.read(campaign.manifest), type=Manifest)
    state = np.frombuffer(blobs.read(campaign.adapter), "<f4").astype(np.float32)
    training = campaign.training
    try:
        rule = rule_of(training.rule, manifest.layout, training.a_seed, numbers=state.size)
    except DataError as error:
        raise IntegrityError("adapter does not fit the bundle", field="numbers", value=state.size) from error
    return manifest, rule, state
