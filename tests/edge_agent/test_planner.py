"""Memory foreseen: the prediction against a real worker, and what is refused because of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import bundle_cli, effects, jobs, work
from edge_agent.depth import ALL, HEAD_ONLY
from edge_agent.downloads import Downloads
from edge_agent.home import Home
from edge_agent.planner import AGENT_BYTES, RUNTIME_BYTES, Plan, fits, need, plan, worker_bytes
from edge_agent.resources import Memory
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.work import Work
from fedge.boards import board
from fedge.cli import main
from fedge.errors import UnavailableError
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
    shapes |= {"k": (192, 288), "v": (192, 288)}
    tensors = {f"L0/{name}.w.q": TensorPlace(0, shape, "uint8") for name, shape in shapes.items()}
    tensors["EMB.q"], tensors["EMB.s"] = (
        TensorPlace(0, (49_152, 576), "uint8"),
        TensorPlace(0, (49_152, 18), "float16"),
    )
    files = {**manifest.files, "tokenizer.json": FileEntry(1_563_270, "0" * 64)}
    return msgspec.structs.replace(
        manifest,
        layers=30,
        hidden=576,
        vocabulary=49_152,
        heads=9,
        kv_heads=3,
        positions_max=8_192,
        head_rows=4_096,
        lora_shapes={"self_attn.q_proj": (576, 576), "self_attn.v_proj": (192, 576)},
        tensors=tensors,
        files=files,
    )


MB = 10**6
MEASURED = [
    (4, 64, 1.0, Plan(), 92.3, 148.1),
    (1, 64, 1.0, Plan(), 58.1, 112.9),
    (1, 512, 1.0, Plan(), 131.3, 186.0),
    (8, 128, 1.0, Plan(), 208.8, 264.0),
    (1, 512, 1.0, Plan(checkpoints="file", head_rows=1_024), 79.6, 131.2),
    (2, 256, 1.0, Plan(checkpoints="half"), 100.4, 155.2),
    (4, 64, 1.0, Plan(keep=30), 233.0, 287.7),
    (4, 128, 1.0, Plan(keep=10), 234.0, 288.9),
    (8, 256, 0.5, Plan(rows=2, head_rows=1_024), 122.7, 174.3),
    (1, 1_024, 0.3, Plan(head_rows=1_024), 227.8, 279.2),
    (8, 64, 0.3, Plan(rows=4), 82.7, 137.6),
    (8, 64, 1.0, Plan(rows=4), 93.1, 148.3),
]


@pytest.mark.parametrize(("rows", "tokens", "share", "chosen", "anonymous", "peak"), MEASURED)
def test_the_prediction_follows_measured_processes(
    manifest: Manifest, rows: int, tokens: int, share: float, chosen: Plan, anonymous: float, peak: float
) -> None:
    """Within a tenth, on twelve shapes and six ways to carry a step out; measured on x86-64, one thread."""
    training = Training(batch_rows=rows, window_tokens=tokens)
    found = need(smollm2(manifest), training, chosen, label_share=share, data=False)
    assert found.anonymous == pytest.approx(anonymous * MB, rel=0.1)
    assert found.peak == pytest.approx(peak * MB, rel=0.1)


def test_pages_of_a_large_embedding_are_part_of_a_peak(manifest: Manifest) -> None:
    """A row that is read has the kernel map its neighbours, too."""
    small, training = smollm2(manifest), Training(batch_rows=1, window_tokens=512)
    tensors = {**small.tensors, "EMB.q": TensorPlace(0, (1_000_000, 576), "uint8")}
    large = msgspec.structs.replace(small, tensors=tensors)
    before, after = (need(found, training, data=False) for found in (small, large))
    assert after.anonymous == before.anonymous
    assert after.peak > before.peak + 8 * MB


def llama_3b(manifest: Manifest) -> Manifest:
    """The sizes of Llama-3.2-3B in int4d."""
    shapes = {"down": (3_072, 4_096), "gate": (8_192, 1_536), "up": (8_192, 1_536), "q": (3_072, 1_536)}
    shapes |= {"o": (3_072, 1_536), "k": (1_024, 1_536), "v": (1_024, 1_536)}
    return msgspec.structs.replace(
        smollm2(manifest),
        layers=4,
        hidden=3_072,
        vocabulary=128_256,
        heads=24,
        kv_heads=8,
        lora_shapes={"self_attn.q_proj": (3_072, 3_072), "self_attn.v_proj": (1_024, 3_072)},
        tensors={f"L0/{name}.w.q": TensorPlace(0, shape, "uint8") for name, shape in shapes.items()},
    )


@pytest.mark.parametrize(("tokens", "anonymous"), [(256, 254.0), (1_024, 477.3), (2_048, 885.1)])
def test_the_prediction_follows_blocks_twenty_times_as_large(
    manifest: Manifest, tokens: int, anonymous: float
) -> None:
    """Wide matrices, eight pieces of attention, checkpoints in a file: within a tenth; cut to a few layers."""
    chosen, training = Plan(checkpoints="file", head_rows=1_024), Training(batch_rows=1, window_tokens=tokens)
    found = need(llama_3b(manifest), training, chosen, label_share=0.3, data=False).anonymous
    assert found == pytest.approx(anonymous * MB, rel=0.1)


def minilm(manifest: Manifest) -> Manifest:
    """The sizes of all-MiniLM-L6-v2 in int8g, with a head for 150 classes."""
    square, wide = (384, 384), {"intermediate": (1_536, 384), "output": (384, 1_536)}
    shapes = {"query": square, "key": square, "value": square, "dense": square, **wide}
    tensors = {f"L0/{name}.w.q": TensorPlace(0, shape, "uint8") for name, shape in shapes.items()}
    names = ("classify", "features", "head", "block_bwd_keep")
    return msgspec.structs.replace(
        manifest,
        task="classify",
        weights_format="int8g",
        layers=6,
        hidden=384,
        vocabulary=30_522,
        heads=12,
        kv_heads=12,
        positions_max=512,
        head_rows=0,
        lora_shapes={"query": square, "value": square},
        tensors={**tensors, "EMB.q": TensorPlace(0, (30_522, 384), "uint8")},
        dense={"classifier.weight": (150, 384), "classifier.bias": (150,)},
        files={f"{name}.onnx": FileEntry(9_000, "0" * 64) for name in names},
    )


@pytest.mark.parametrize(
    ("rows", "tokens", "depth", "anonymous", "peak"),
    [(32, 16, HEAD_ONLY, 41.4, 92.8), (8, 256, HEAD_ONLY, 49.5, 101.7), (32, 16, ALL, 74.6, 125.8)],
)
def test_the_prediction_follows_a_head_that_trains_alone(
    manifest: Manifest, rows: int, tokens: int, depth: int, anonymous: float, peak: float
) -> None:
    """Within a tenth of fresh processes with MiniLM, whose rows so far take no room to speak of."""
    training = Training(batch_rows=rows, window_tokens=tokens)
    found = need(minilm(manifest), training, data=False, depth=depth, kept_bytes=0)
    assert found.anonymous == pytest.approx(anonymous * MB, rel=0.1)
    assert found.peak == pytest.approx(peak * MB, rel=0.1)


# ---------------------------------------------------------------- choosing
def test_a_head_alone_needs_no_way_back_and_no_way_to_spare_memory(manifest: Manifest) -> None:
    found, training = minilm(manifest), Training(batch_rows=32, window_tokens=128)
    room = worker_bytes(found, training, depth=HEAD_ONLY)
    assert room < 0.6 * worker_bytes(found, training)
    assert plan(found, training, room, depth=HEAD_ONLY) == Plan()
    assert plan(found, training, 10**10, depth=HEAD_ONLY) == Plan()
    assert plan(found, training, 10**10).keep == 6
    assert plan(found, training, room) == Plan(rows=1)
    more = msgspec.structs.replace(training, batch_rows=64)
    assert worker_bytes(found, more, depth=HEAD_ONLY) == room, "a row at a time"


def test_a_head_that_meets_every_token_takes_the_batch_there_and_never_back(manifest: Manifest) -> None:
    found, training = minilm(manifest), Training(batch_rows=32, window_tokens=128)
    found = msgspec.structs.replace(found, files={"block_bwd_keep.onnx": FileEntry(9_000, "0" * 64)})
    room = worker_bytes(found, training, depth=HEAD_ONLY)
    assert plan(found, training, room, depth=HEAD_ONLY) == Plan()
    assert room < worker_bytes(found, training)
    assert plan(found, training, room - 4 * MB, depth=HEAD_ONLY) == Plan(rows=16)
    with pytest.raises(UnavailableError, match="at the least"):
        plan(found, training, 60 * MB, depth=HEAD_ONLY)


def test_layers_that_do_not_train_keep_nothing_for_a_way_back(manifest: Manifest) -> None:
    found, training = smollm2(manifest), Training(batch_rows=1, window_tokens=512)
    upper = need(found, training, depth=15).anonymous
    assert need(found, training).anonymous - upper == 15 * 512 * 576 * 4


SIZES = (2_000, 600, 300, 195, 160)


def test_less_memory_is_a_leaner_plan(manifest: Manifest) -> None:
    """Ways that cost time, bits or flash come after those that do not, and every plan fits what it was given."""
    found, training = smollm2(manifest), Training(batch_rows=4, window_tokens=128)
    plans = [plan(found, training, size * MB) for size in SIZES]
    assert [chosen.keep > 0 for chosen in plans] == [True, True, False, False, False]
    assert plans[-1].rows == 2
    assert plans[0].keep == 30
    assert plans[2] == Plan()
    needs = [need(found, training, chosen).peak for chosen in plans]
    assert needs == sorted(needs, reverse=True)
    for size, chosen in zip(SIZES, plans, strict=True):
        assert fits(found, training, chosen, size * MB)


def test_a_single_long_row_has_its_checkpoints_halved_then_filed(manifest: Manifest) -> None:
    found, training = smollm2(manifest), Training(batch_rows=1, window_tokens=512)
    where = [plan(found, training, size * MB).checkpoints for size in (230, 180, 150)]
    assert where == ["plain", "half", "file"]


def test_what_fits_nowhere_is_refused_and_what_would_fit_is_said(manifest: Manifest) -> None:
    found, training = smollm2(manifest), Training(batch_rows=1, window_tokens=4_096)
    with pytest.raises(
        UnavailableError, match=r"about \d+ MB at the least, 200 MB can be had.*window of 512 tokens"
    ):
        plan(found, training, 200 * MB)
    with pytest.raises(UnavailableError, match="No window is short enough"):
        plan(found, training, 60 * MB)


def test_a_bundle_without_the_graphs_for_it_keeps_nothing(manifest: Manifest) -> None:
    files = {name: entry for name, entry in manifest.files.items() if "keep" not in name}
    found = msgspec.structs.replace(smollm2(manifest), files=files)
    assert plan(found, Training(), 10**10) == Plan()


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

    def train(self, depth: int = 0) -> effects.Event | None:
        effect = effects.Train(
            ROUND, self.sha256, self.publisher, bytes(32), Training(), steps=1, data_seed=0, depth=depth
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
    assert "No window is short enough" in event.reason
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


def test_a_round_is_planned_by_the_layers_that_train_in_it(
    manifest: Manifest, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def planned(*_: object, depth: int, **__: object) -> Plan:
        asked.append(depth)
        return Plan()

    monkeypatch.setattr(work, "plan", planned)
    Bench(tmp_path, tiny_bundle, manifest, 4_000).train(1)
    assert asked == [1]


# ---------------------------------------------------------------- what is told of a board without one
def test_a_board_is_told_of_for_a_head_alone(manifest: Manifest, tiny_bundle: Path) -> None:
    found, training = minilm(manifest), Training(batch_rows=32, window_tokens=64)
    rows = [bundle_cli._row(found, training, board("pi4"), 1, 200, depth) for depth in (ALL, HEAD_ONLY)]
    assert rows[1]["needed_mb"] == round(worker_bytes(found, training, depth=HEAD_ONLY) / MB)
    assert rows[1]["how"] == "the plain way"
    assert rows[0]["how"] != "the plain way"
    assert main(["bundle", "plan", str(tiny_bundle), "--head-only"]) == 64


def test_what_is_told_of_a_board_is_what_an_agent_there_would_decide(
    manifest: Manifest,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = Memory(resident_kb=AGENT_BYTES // 1_024)
    monkeypatch.setattr(work, "memory_of", lambda pid: own if pid == os.getpid() else Memory())
    monkeypatch.setattr(work, "free_memory_mb", lambda: 8_000)
    plans = set()
    for megabytes in (60, *range(125, 160, 5), 170, 220, 400, 2_000):
        (tmp_path / str(megabytes)).mkdir()
        bench = Bench(tmp_path / str(megabytes), tiny_bundle, manifest, megabytes)
        decided, reason = bench.work._plan(bench.sha256, bench.publisher, Training())
        words = ["bundle", "plan", str(tiny_bundle), "--board", "pi4", "--memory", str(megabytes), "--json"]
        assert main(words) == 0
        (row,) = json.loads(capsys.readouterr().out)["boards"]
        assert row["fits"] == (reason == "")
        if row["fits"]:
            assert msgspec.convert(row["plan"], Plan) == decided
            assert row["needed_mb"] == round(worker_bytes(manifest, Training(), decided) / MB)
            plans.add(decided)
        else:
            what, _, hint = row["how"].partition(". ")
            assert reason == f"{what}: the owner allows {megabytes} MB. {hint}"
    assert len(plans) > 1, "the sweep meets more than one plan"


def test_the_figure_that_is_told_is_what_must_be_free(manifest: Manifest) -> None:
    found, training = smollm2(manifest), Training()

    def row(megabytes: int) -> dict[str, Any]:
        return bundle_cli._row(found, training, board("pi4"), 1, megabytes)

    plain = round(worker_bytes(found, training) / MB)
    agent = -(-AGENT_BYTES // MB)
    assert (row(plain + agent + 1)["plan"], row(plain + agent + 1)["needed_mb"]) == (
        msgspec.to_builtins(Plan()),
        plain,
    )
    assert row(plain + agent - 1)["plan"] != msgspec.to_builtins(Plan())
    assert row(plain + agent + 1)["free_mb"] == plain + 1


def test_the_planner_needs_no_numpy() -> None:
    code = "import sys, edge_agent.planner; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
