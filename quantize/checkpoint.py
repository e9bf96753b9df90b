"""A folder of safetensors read as a transformers model: all of it, or an error that names what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedge.errors import DataError


def read_checkpoint(kind: Any, folder: Path, *, optional: tuple[str, ...] = (), surplus: bool = False) -> Any:
    """The model in a folder of safetensors, as the transformers class `kind`, in float32 with attention that exports.

    Every tensor is accounted for, but missing ones that begin with one of `optional`, and `surplus` ones. No code that
    came with the model is run. Raises DataError.
    """
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError("the model folder cannot be loaded", field="model", value=str(error)) from error
    odd = _unaccounted(report, optional, surplus)
    if odd:
        raise DataError("weights and config.json do not belong together", field="tensors", value=odd[:4])
    model.config.use_cache = False
    return model.eval()


def _unaccounted(report: Mapping[str, Any], optional: tuple[str, ...], surplus: bool) -> list[str]:
    missing = [name for name in map(str, report["missing_keys"]) if not name.startswith(optional)]
    more = [] if surplus else list(map(str, report["unexpected_keys"]))
    return sorted([*missing, *more, *map(str, report["mismatched_keys"])])
