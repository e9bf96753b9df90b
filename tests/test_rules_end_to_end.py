"""Rules and tasks beside the default in a real fleet: processes, broker, worker, masks, and out as a PEFT folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_end_to_end import running, wish

from edge_agent.bundle import open_bundle
from fedge.io.peft_folder import read_peft
from fedge.rules import rule_of, usual_rows
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


def test_a_fleet_learns_vectors_from_pairs(tmp_path: Path, sentence_folder: Callable[[str], Path]) -> None:
    """As many rows a step as suit pairs; every report is of pairs, and their loss goes down."""
    bundle, data = sentence_folder("mean") / "bundle", {}
    for device in range(5):
        path = tmp_path / f"person-{device}.jsonl"
        pairs = [
            {"query": f"how are you {n}, my friend {device}", "answer": f"{n} is fine with {device}"}
            for n in range(24)
        ]
        path.write_text("\n".join(map(json.dumps, pairs)))
        data[f"device-{device}"] = path
    with running(tmp_path, bundle, data=data, broker="embedded") as run:
        run.start(dataclasses.replace(wish(5, rounds=2), rate=0.01))
        run.until(lambda: run.count("closed"))
        run.check(rounds=2, blocs=1, bloc=5)
        row = run.campaign
        assert row.training.batch_rows == usual_rows("embed")
        export_adapter(row, Blobs(run.fleet.hub_home / "blobs"), tmp_path / "peft")
        assert read_peft(tmp_path / "peft", open_bundle(bundle).layout).notices == ()
