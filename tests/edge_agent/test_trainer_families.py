"""The device's trainer on bundles of other families: untied heads, soft-caps, learned positions, layers of kinds."""

from collections.abc import Callable
from pathlib import Path

import families
import numpy as np
import pytest
from torch_twin import torch_twin

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch
from edge_agent.trainer import Trainer
from quantize.reference import Batch as Reference
from quantize.reference import torch_gradients

SEED = bytes(range(16))


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_a_device_trains_every_family_as_torch_does(name: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(name)
    bundle = open_bundle(folder / "bundle")
    trainer = Trainer(bundle, a_seed=SEED)
    twin = torch_twin(bundle, folder / "model")
    draw = np.random.default_rng(5)
    vector = (draw.standard_normal(trainer.layout.numbers) * 0.05).astype(np.float32)
    b = trainer.layout.split(vector)
    rows = [draw.integers(2, 300, width).tolist() for width in (40, 33)]
    batch = Reference.of(rows, bundle.manifest.pad_id)
    loss, expected = torch_gradients(twin, bundle.manifest.lora, {**trainer.layout.frozen(SEED), **b}, batch)

    result = trainer.loss_and_gradients(Batch(batch.ids, batch.mask, batch.labels), b)

    assert result.loss_sum / result.labels == pytest.approx(loss, rel=1e-5)
    for tensor, gradient in result.gradients.items():
        error = np.linalg.norm(gradient - expected[tensor]) / np.linalg.norm(expected[tensor])
        assert error < 1e-4, tensor
    stepped = {tensor: value - 0.5 * result.gradients[tensor] for tensor, value in b.items()}
    after, labels = trainer.row_losses(Batch(batch.ids, batch.mask, batch.labels), stepped)
    assert after.sum() / labels.sum() < loss
