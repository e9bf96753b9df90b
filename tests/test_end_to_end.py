"""The whole fleet for real: processes, broker, mTLS, HTTPS, worker, masks; then the same with kill -9 in the middle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from torch_twin import mean_loss, torch_twin

from edge_agent.bundle import open_bundle
from edge_agent.dataset import evaluation_batches, load_dataset, load_encoder
from fedge.io import assets
from fedge.lora import AdapterLayout
from fedge.messages import Template
from fedge.release import MANIFEST, Manifest
from firmware_sim.processes.evaluation import evaluate_people, pooled
from firmware_sim.processes.fleet import HUB, LocalFleet
from firmware_sim.processes.process_faults import FAULTS, ProcessFaults, Strike, draw_strikes
from firmware_sim.processes.result import decode_result
from firmware_sim.processes.shaper import LINES, Line
from hub.blobs import Blobs
from hub.campaigns import Wish
from hub.effects import CampaignRow, LedgerEntry

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("processes")]

SECONDS = 240.0
needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="mosquitto is not installed",
)


def write_data(folder: Path, devices: int) -> dict[str, Path]:
    """A few dozen short messages for each device, all in one manner of speaking."""
    found = {}
    for number in range(devices):
        path = folder / f"person-{number}.jsonl"
        lines = [
            {"prompt": f"how are you {line}", "completion": f"i am fine {(line * 7 + number) % 10}"}
            for line in range(48)
        ]
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines))
        found[f"device-{number}"] = path
    return found


class Run:
    """One campaign of a real fleet, watched by its ledger."""

    def __init__(
        self,
        folder: Path,
        bundle: Path,
        data: dict[str, Path],
        *,
        broker: str = "auto",
        line: Line | None = None,
    ) -> None:
        self.folder, self.bundle = folder, bundle
        self.fleet = LocalFleet(folder / "fleet", data, broker=broker, line=line)
        self.ledger: list[LedgerEntry] = []

    def start(self, wish: Wish) -> None:
        self.fleet.start_hub()
        self.fleet.enroll(lambda _: None)
        self.fleet.start_campaign(self.bundle, wish)
        self.fleet.start_agents()

    def until(self, done: Callable[[], object], faults: ProcessFaults | None = None) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, f"nothing new: {self.kinds()} {self.tails()}"
            new = self.fleet.look()
            self.ledger += new
            if faults is not None:
                faults.look(new)
            time.sleep(0.05)

    def count(self, kind: str) -> int:
        return sum(entry.kind == kind for entry in self.ledger)

    def kinds(self) -> list[str]:
        return [f"{entry.kind} {entry.bloc} {entry.device}" for entry in self.ledger[-8:]]

    def tails(self) -> list[str]:
        return [child.tail(2) for child in self.fleet.supervisor.children.values()]

    @property
    def campaign(self) -> CampaignRow:
        row = self.fleet.campaign("c")
        assert row is not None
        return row

    def loss(self, adapter: bytes) -> float:
        path = self.folder / "adapter.f32"
        path.write_bytes(adapter)
        data = self.fleet.data
        return pooled(evaluate_people(self.bundle, data, path, self.campaign.training, processes=2).values())

    def check(self, *, rounds: int, blocs: int, bloc: int) -> None:
        """Every bloc was opened `rounds` times, by one report of every member each, and the loss went down."""
        assert self.campaign.closed
        assert self.count("opened") == rounds * blocs == self.campaign.adapter_version
        opened = {(entry.bloc, entry.round) for entry in self.ledger if entry.kind == "opened"}
        for name, number in opened:
            reports = [
                entry.device
                for entry in self.ledger
                if entry.kind == "report" and (entry.bloc, entry.round) == (name, number)
            ]
            assert len(reports) == len(set(reports)) == bloc
        adapter = Blobs(self.fleet.hub_home / "blobs").read(self.campaign.adapter)
        assert np.isfinite(np.frombuffer(adapter, "<f4")).all()
        assert self.loss(adapter) < self.loss(bytes(len(adapter))) - 0.05


@contextmanager
def running(
    folder: Path,
    bundle: Path,
    *,
    devices: int = 0,
    data: dict[str, Path] | None = None,
    broker: str = "auto",
    line: Line | None = None,
) -> Iterator[Run]:
    """Of `devices` that chat, or of those whose `data` is given."""
    run = Run(folder, bundle, data or write_data(folder, devices), broker=broker, line=line)
    try:
        yield run
    finally:
        run.fleet.stop()


def wish(devices: int, *, rounds: int = 2, bloc: int = 5) -> Wish:
    return Wish("c", rounds=rounds, steps=4, bloc=bloc, devices=devices, rate=0.02, window_tokens=48)


@pytest.mark.parametrize("broker", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_two_blocs_fine_tune_one_adapter(tmp_path: Path, tiny_bundle: Path, broker: str) -> None:
    devices = 10 if broker == "mosquitto" else 5
    with running(tmp_path, tiny_bundle, devices=devices, broker=broker) as run:
        run.start(wish(devices))
        run.until(lambda: run.count("closed"))
        run.check(rounds=2, blocs=devices // 5, bloc=5)
        assert run.count("sat-out") == 0
        manifest = msgspec.json.decode((tiny_bundle / MANIFEST).read_bytes(), type=Manifest)
        numbers = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r).numbers
        assert run.campaign.numbers == numbers
        figures = run.fleet.figures().values()
        assert all(figure.rounds_opened == 2 for figure in figures)


def test_an_agent_holds_neither_torch_nor_numpy(tmp_path: Path, tiny_bundle: Path) -> None:
    with running(tmp_path, tiny_bundle, devices=5) as run:
        run.start(wish(5, rounds=1))
        run.until(lambda: run.count("opened"))
        process = run.fleet.supervisor.children["device-0"].process
        assert process is not None
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        workers = psutil.Process(process.pid).children()
        worker_maps = "".join(Path(f"/proc/{child.pid}/maps").read_text() for child in workers)
    assert "numpy" not in maps
    assert "onnxruntime" not in maps
    assert "onnxruntime" in worker_maps
    for forbidden in ("libtorch", "torch/lib", "transformers", "onnx_cpp2py"):
        assert forbidden not in maps + worker_maps


# ---------------------------------------------------------------- kill -9
@needs_mosquitto
def test_an_agent_killed_in_every_part_of_a_round(tmp_path: Path, tiny_bundle: Path) -> None:
    """Once it was told of the round, once its report is in, and once the sum was opened: every round ends opened."""
    with running(tmp_path, tiny_bundle, devices=5) as run:
        run.start(wish(5, rounds=4))
        victim = run.fleet.supervisor.children["device-1"]
        for kills, moment in enumerate(("open", "report", "opened"), start=1):
            seen = run.count(moment)
            run.until(lambda moment=moment, seen=seen: run.count(moment) > seen)
            run.fleet.supervisor.kill("device-1")
            run.until(lambda kills=kills: victim.running and victim.restarts == kills)
        run.until(lambda: run.count("closed"))
        run.check(rounds=4, blocs=1, bloc=5)


@needs_mosquitto
def test_the_hub_killed_with_half_the_reports_in(tmp_path: Path, tiny_bundle: Path) -> None:
    with running(tmp_path, tiny_bundle, devices=5) as run:
        run.start(wish(5))
        run.until(lambda: run.count("report") >= 2)
        run.fleet.supervisor.kill(HUB)
        run.until(lambda: run.count("opened") >= 1)
        run.fleet.supervisor.kill(HUB)
        run.until(lambda: run.count("closed"))
        run.check(rounds=2, blocs=1, bloc=5)


@needs_mosquitto
def test_the_broker_killed_in_a_round(tmp_path: Path, tiny_bundle: Path) -> None:
    with running(tmp_path, tiny_bundle, devices=5) as run:
        run.start(wish(5))
        run.until(lambda: run.count("report") >= 1)
        assert FAULTS["kill-broker"].begin(run.fleet, "")
        run.until(lambda: run.count("closed"))
        run.check(rounds=2, blocs=1, bloc=5)


# ---------------------------------------------------------------- many faults at once
@needs_mosquitto
def test_a_fleet_on_mobile_lines_survives_what_was_drawn(tmp_path: Path, tiny_bundle: Path) -> None:
    """Every round ends opened, by one report of every member, however often something was cut, killed or full."""
    wanted = {"kill-agent": 2, "kill-worker": 1, "link-cut": 3, "restart-broker": 1, "kill-hub": 1}
    with running(tmp_path, tiny_bundle, devices=5, line=LINES["lte"]) as run:
        drawn = draw_strikes(wanted, list(run.fleet.data), reports=16, seed=11, delay_seconds=0.5)
        full = Strike(after=7, delay=0.0, fault="full-disk", device="device-3", seconds=3.0)
        faults = ProcessFaults(run.fleet, [*drawn, full])
        run.start(wish(5, rounds=4))
        run.until(lambda: run.count("closed"), faults=faults)
        assert faults.left == 0
        assert faults.counts == {**wanted, "full-disk": 1}
        run.check(rounds=4, blocs=1, bloc=5)
        assert run.fleet.shaper is not None
        cut = [run.fleet.shaper.counts(device).cuts for device in run.fleet.data]
        assert sum(cut) == wanted["link-cut"]


# ---------------------------------------------------------------- the real model
@pytest.mark.real
def test_smollm2_learns_from_real_people(tmp_path: Path) -> None:
    """Five people, two rounds of two steps on the real 135 M model: held-out loss falls for those never seen, too."""
    out = tmp_path / "run"
    words = f"sim demo --devices 5 --bloc 5 --unseen 2 --rounds 2 --steps 2 --out {out} --json".split()
    done = subprocess.run([sys.executable, "-m", "fedge", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    result = decode_result(done.stdout)
    loss = result.loss
    assert loss.took_part < loss.zero_shot - 0.3
    assert loss.never_seen < loss.zero_shot_never_seen - 0.3
    assert result.opened_blocs == 2
    assert result.agent.peak_rss_mb is not None
    assert result.bytes.up_per_round is not None
    assert (out / "report.html").stat().st_size > 5_000
    unseen = [person.id for person in result.people if not person.took_part]
    assert _loss_in_peft(out, unseen) == pytest.approx(loss.never_seen, abs=0.01)


def _loss_in_peft(out: Path, people: list[str]) -> float:
    """Held-out loss per token with stock peft and transformers on the decoded weights."""
    from peft import PeftModel

    bundle = open_bundle(out / "bundle")
    model = PeftModel.from_pretrained(
        torch_twin(bundle, assets.pull("models", "smollm2-135m")), str(out / "adapter")
    )
    encode, nll, labels = load_encoder(bundle.tokenizer), 0.0, 0
    for person in people:
        data = out / "people" / person / "heldout.jsonl"
        rows = load_dataset(data, Template(), encode, eos_id=bundle.manifest.eos_id, window=64).rows
        for _, batch in evaluation_batches(rows, size=12, pad_id=bundle.manifest.pad_id):
            count = int((batch.labels >= 0).sum())
            with torch.no_grad():
                nll, labels = nll + mean_loss(model, batch).item() * count, labels + count
    return nll / labels
