"""Rules and tasks beside the default in a real fleet: processes, broker, worker, masks, and out as a PEFT folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from test_end_to_end import Run, running, wish

from edge_agent.believed import campaign_in
from edge_agent.bundle import open_bundle
from edge_agent.fleet_adapter import take
from edge_agent.journal import Journal
from fedge.io.adapter_file import read_adapter
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
        _owner_has_it_too(run, tmp_path / "fleet.fedge", tensors)


def _owner_has_it_too(run: Run, out: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A device's owner gets from the hub what the operator exports, beside the agent that runs."""
    home = run.fleet.home("device-0")

    def told() -> bool:
        return campaign_in(Journal(home.state).load().announcement).closed

    run.until(told)
    taken = take(home, out, run.fleet.folder / "blobs")
    found = read_adapter(out, open_bundle(Path(taken.bundle)).manifest).tensors
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)


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
