"""Memory foreseen: the prediction against a real worker, and what is refused because of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_agent import effects, jobs, work
from edge_agent.downloads import Downloads
from edge_agent.foresight import RUNTIME_BYTES, worker_bytes
from edge_agent.home import Home
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.work import Work
from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import MANIFEST, SIGNATURE, FileEntry, Manifest, TensorPlace, bundle_digest, open_manifest

ROUND = bytes(range(32))


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return open_manifest((tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes())


def test_a_real_worker_stays_below_the_prediction_and_not_far(
    manifest: Manifest, tiny_bundle: Path, tmp_path: Path
) -> None:
    training = Training(batch_rows=8, window_tokens=64)
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r)
    (tmp_path / "adapter").write_bytes(bytes(4 * layout.numbers))
    (tmp_path / "data").write_text('{"prompt": "how are you", "completion": "i am fine"}\n' * 9)
    job = jobs.Train(
        bundle=str(tiny_bundle),
        adapter=str(tmp_path / "adapter"),
        data=str(tmp_path / "data"),
        training=training,
        delta=str(tmp_path / "delta"),
        steps=1,
    )
    command = [sys.executable, "-m", "edge_agent.worker"]
    done = subprocess.run(command, input=msgspec.json.encode(job) + b"\n", capture_output=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])["memory"]["peak"]
    assert 0.6 * worker_bytes(manifest, training) < peak < worker_bytes(manifest, training)


def smollm2(manifest: Manifest) -> Manifest:
    """The sizes of SmolLM2-135M in int4d, in the tiny manifest's place."""
    shapes = {"down": (576, 768), "gate": (1_536, 288), "up": (1_536, 288), "q": (576, 288), "o": (576, 288)}
    tensors = {f"L0/{name}.w.q": TensorPlace(0, shape, "uint8") for name, shape in shapes.items()}
    files = {**manifest.files, "tokenizer.json": FileEntry(1_563_270, "0" * 64)}
    return msgspec.structs.replace(
        manifest,
        layers=30,
        hidden=576,
        heads=9,
        head_rows=4_096,
        lora_shapes={"q": (576, 576), "v": (192, 576)},
        tensors=tensors,
        files=files,
    )


@pytest.mark.parametrize(
    ("rows", "tokens", "measured"), [(4, 64, 145e6), (8, 64, 185e6), (4, 128, 188e6), (8, 256, 500e6)]
)
def test_the_prediction_follows_measured_workers(
    manifest: Manifest, rows: int, tokens: int, measured: float
) -> None:
    found = worker_bytes(smollm2(manifest), Training(batch_rows=rows, window_tokens=tokens))
    assert measured < found < 1.3 * measured


def test_a_large_tokenizer_is_counted(manifest: Manifest) -> None:
    files = {**manifest.files, "tokenizer.json": FileEntry(17_000_000, "0" * 64)}
    assert worker_bytes(msgspec.structs.replace(manifest, files=files), Training()) > RUNTIME_BYTES + 400e6


def test_sessions_that_are_there_before_the_tokenizer_are_counted_with_it(manifest: Manifest) -> None:
    found, training = smollm2(manifest), Training()
    more = worker_bytes(found, training, gauged=True) - worker_bytes(found, training)
    assert 30e6 < more < 60e6


# ---------------------------------------------------------------- what is refused
class Bench:
    def __init__(self, folder: Path, bundle: Path, manifest: Manifest, memory_mb_max: int) -> None:
        downloads = Downloads(folder, None, lambda _: None, private=True)
        self.sha256 = bytes.fromhex(bundle_digest(manifest))
        self.publisher = bytes.fromhex(manifest.publisher)
        downloads.bundle(self.sha256).symlink_to(bundle)
        settings = Settings(home=Home(folder), data=folder / "data")
        self.work = Work(settings, downloads, Stats(folder / "stats.json"), 1, lambda *_: None, memory_mb_max)

    def train(self) -> effects.Event | None:
        effect = effects.Train(
            ROUND, self.sha256, self.publisher, bytes(32), Training(), steps=1, data_seed=0
        )
        try:
            return self.work.train(effect)
        finally:
            self.work.stop()


def test_the_owners_bound_is_looked_at_before_a_worker_is_started(
    manifest: Manifest, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    event = Bench(tmp_path / "small", tiny_bundle, manifest, 60).train()
    assert isinstance(event, effects.WorkFailed)
    assert event.name == "memory"
    assert "the owner allows 60 MB" in event.reason
    assert Bench(tmp_path / "large", tiny_bundle, manifest, 4_000).train() is None


def test_so_is_what_the_board_has_left(
    manifest: Manifest, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, tiny_bundle, manifest, 0)
    monkeypatch.setattr(work, "free_memory_mb", lambda: 50)
    event = bench.train()
    assert isinstance(event, effects.WorkFailed)
    assert (event.name, "this board has 52 MB left" in event.reason) == ("memory", True)
    monkeypatch.setattr(work, "free_memory_mb", lambda: 8_000)
    assert bench.train() is None


def test_foresight_needs_no_numpy() -> None:
    code = "import sys, edge_agent.foresight; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
