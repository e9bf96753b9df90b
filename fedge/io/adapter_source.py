"""The adapter of a bundle from where somebody has it: a file of ours, or a PEFT folder."""

from __future__ import annotations

from pathlib import Path

from fedge.io.adapter_file import Adapter, adapter_of, read_adapter
from fedge.io.peft_folder import changes_of, read_peft
from fedge.release import Manifest


def adapter_for(path: Path, manifest: Manifest, weights: Path) -> Adapter:
    """The adapter at `path`, ours or a PEFT folder, as one of the bundle `manifest`, every tensor in its slot.

    What a PEFT folder holds in full becomes a change of what the checked weight file at `weights` begins with.
    """
    if not path.is_dir():
        return read_adapter(path, manifest)
    found = read_peft(path, manifest.layout, classes=manifest.classes)
    tensors = changes_of(found, weights, manifest)
    a = {name: tensors[name] for name in found.layout.a_shapes}
    vector = found.layout.join({name: tensors[name] for name in found.layout.shapes})
    return adapter_of(manifest, vector, a=a, lora=found.config, rule="")
