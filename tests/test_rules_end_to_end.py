"""Rules beside the default in a real fleet: processes, broker, worker, masks, and out as a PEFT folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_end_to_end import running, wish

from edge_agent.bundle import open_bundle
from fedge.io.peft_folder import read_peft
from fedge.rules import rule_of
from hub.blobs import Blobs
from hub.export import export_adapter

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("processes")]


@pytest.mark.parametrize("rule", ["alternating", "core"])
def test_a_fleet_learns_by_another_rule(tmp_path: Path, tiny_bundle: Path, rule: str) -> None:
    with running(tmp_path, tiny_bundle, devices=5, broker="embedded") as run:
        run.start(dataclasses.replace(wish(5, rounds=3), rule=rule))
        run.until(lambda: run.count("closed"))
        run.check(rounds=3, blocs=1, bloc=5)
        row, blobs = run.campaign, Blobs(run.fleet.hub_home / "blobs")
        export_adapter(row, blobs, tmp_path / "peft")
        layout = open_bundle(tiny_bundle).layout
        state = np.frombuffer(blobs.read(row.adapter), "<f4").astype(np.float32)
        tensors = rule_of(rule, layout, row.training.a_seed, numbers=state.size).tensors(state)
        found = read_peft(tmp_path / "peft", layout)
        assert found.notices == ()
        for name, value in found.tensors.items():
            np.testing.assert_array_equal(value, tensors[name])
