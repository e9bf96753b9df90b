"""An adapter's A and B as the inference graph reads them: any rank, B in the scale that the graph has built in.

The rule: no part of an adapter is dropped. A tensor that the graph has no place for is refused by name; a module that
the adapter leaves alone gets rank 1 of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedge.errors import DataError
from fedge.lora import AdapterLayout

Floats = NDArray[np.float32]


def adapter_feeds(
    bundle: AdapterLayout, tensors: Mapping[str, Floats] | None = None, of: AdapterLayout | None = None
) -> dict[str, Floats]:
    """Every A and B of the graphs of a bundle with this layout.

    `tensors` are an adapter's own by name, laid out as `of` says (default: as the bundle's); none is no adapter.
    Raises DataError naming a tensor that is missing, misshapen or has no place in the graph.
    """
    given, layout = dict(tensors or {}), of or bundle
    feeds: dict[str, Floats] = {}
    slots = {slot.name: slot for slot in layout.slots} if given else {}
    for layer in range(bundle.layers):
        for path, module in bundle.graph.items():
            name = f"L{layer}/{path}"
            slot = slots.pop(name, None)
            if slot is None:
                feeds[f"{name}.A"] = np.zeros((1, module.n_in), np.float32)
                feeds[f"{name}.B"] = np.zeros((module.out, 1), np.float32)
                continue
            a = _taken(given, f"{name}.A", (slot.r, module.n_in))
            b = _taken(given, f"{name}.B", (module.out, slot.r))
            feeds[f"{name}.A"] = a
            feeds[f"{name}.B"] = (
                b if slot.scale == module.scale else b * np.float32(slot.scale / module.scale)
            )
    if slots or given:
        odd = next(iter(slots), None) or next(iter(given))
        raise DataError("adapter has a tensor that this bundle has no place for", field=odd)
    return feeds


def _taken(given: dict[str, Floats], name: str, shape: tuple[int, int]) -> Floats:
    tensor = given.pop(name, None)
    found = None if tensor is None else tensor.shape
    if tensor is None or found != shape:
        raise DataError("adapter tensor does not fit the bundle", field=name, value=found)
    return np.ascontiguousarray(tensor, np.float32)
