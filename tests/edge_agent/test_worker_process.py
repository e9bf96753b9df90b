"""The worker as the agent sees it: jobs and replies, kills, leisure; and sealing for real."""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from desk import eventually

from edge_agent import effects, jobs, work
from edge_agent.downloads import Downloads
from edge_agent.home import Home
from edge_agent.pace import Pace
from edge_agent.settings import Settings
from edge_agent.slots import slot
from edge_agent.stats import Stats
from edge_agent.work import Work
from edge_agent.worker_process import Reply, WorkerProcess
from fedge.lora import AdapterLayout, LoraConfig
from fedge.messages import Announcement, BlobRef, Training
from fedge.release import open_manifest
from fedge.secagg.masks import Member
from fedge.update.report import build_report
from fedge.update.spec import UpdateCodec

NUMBERS = 3_000
ROUND = hashlib.sha256(b"round").digest()
SECRETS = [bytes([i + 1]) * 32 for i in range(5)]
ROSTER = tuple(
    (X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), i != 3)
    for i, secret in enumerate(SECRETS)
)
CODEC = UpdateCodec(bits=16, step=1e-5, clip=0.05, seed=bytes(16))


class Bench:
    def __init__(self, linger_seconds: float = 60.0) -> None:
        self.replies: queue.Queue[tuple[int, Reply]] = queue.Queue()
        self.worker = WorkerProcess(lambda number, reply: self.replies.put((number, reply)), linger_seconds)

    def next(self) -> tuple[int, Reply]:
        return self.replies.get(timeout=60)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.worker.stop()


def seal_job(folder: Path, carry: bool = False) -> jobs.Seal:
    rng = np.random.default_rng(7)
    (folder / "delta").write_bytes(rng.normal(0, 1e-3, NUMBERS).astype("<f4").tobytes())
    if carry:
        (folder / "carry").write_bytes(rng.normal(0, 1e-3, NUMBERS).astype("<f4").tobytes())
    return jobs.Seal(
        transcript=ROUND,
        delta=str(folder / "delta"),
        carry=str(folder / "carry") if carry else "",
        sent=str(folder / "sent"),
        report=str(folder / "report"),
        codec=CODEC,
        position=2,
        roster=ROSTER,
        prekey=SECRETS[2],
        entropy=bytes(range(32)),
        loss_sum=12.5,
        labels=100,
        samples=30,
        steps=5,
    )


def waiting_job(folder: Path) -> jobs.Train:
    """A job that waits for the one slot."""
    return jobs.Train(
        bundle="none",
        adapter="none",
        data="none",
        training=Training(),
        slots=str(folder),
        slot_count=1,
        delta=str(folder / "delta"),
        steps=1,
    )


@pytest.mark.parametrize("carry", [False, True])
def test_sealing_writes_exactly_the_report_that_the_codec_builds(
    bench: Bench, tmp_path: Path, carry: bool
) -> None:
    job = seal_job(tmp_path, carry)
    number = bench.worker.submit(job)
    expected = build_report(
        np.frombuffer((tmp_path / "delta").read_bytes(), "<f4"),
        carry=np.frombuffer((tmp_path / "carry").read_bytes(), "<f4") if carry else None,
        loss_sum=12.5,
        labels=100,
        samples=30,
        steps=5,
        codec=CODEC,
        h=ROUND,
        position=2,
        roster=[Member(prekey=prekey, aes=aes) for prekey, aes in ROSTER],
        prekey_secret=SECRETS[2],
        entropy=bytes(range(32)),
    )
    assert bench.next() == (number, jobs.Sealed(digest=expected.digest, size=len(expected.body)))
    assert (tmp_path / "report").read_bytes() == expected.body
    assert (tmp_path / "sent").read_bytes() == expected.sent.tobytes()
    assert (tmp_path / "report").stat().st_mode & 0o777 == 0o600


def test_a_carry_of_another_adapter_is_left_out(bench: Bench, tmp_path: Path) -> None:
    bench.worker.submit(seal_job(tmp_path))
    _, alone = bench.next()
    job = seal_job(tmp_path, carry=True)
    (tmp_path / "carry").write_bytes(bytes(4 * (NUMBERS + 1)))
    bench.worker.submit(job)
    assert bench.next()[1] == alone


def test_the_secret_prekey_is_neither_in_arguments_nor_environment_nor_repr(
    bench: Bench, tmp_path: Path
) -> None:
    job = seal_job(tmp_path)
    bench.worker.submit(job)
    seen = Path(f"/proc/{bench.worker.pid}/cmdline").read_bytes()
    seen += Path(f"/proc/{bench.worker.pid}/environ").read_bytes() + repr(job).encode()
    for form in (SECRETS[2], SECRETS[2].hex().encode(), repr(SECRETS[2])[2:-1].encode()):
        assert form not in seen
    bench.next()


def test_a_job_that_cannot_be_done_says_why_and_the_worker_lives_on(bench: Bench, tmp_path: Path) -> None:
    job = seal_job(tmp_path)
    (tmp_path / "delta").unlink()
    bench.worker.submit(job)
    _, reply = bench.next()
    assert isinstance(reply, jobs.Failed)
    assert (reply.error, reply.exit_code) == ("NoInputError", 66)
    pid = bench.worker.pid
    bench.worker.submit(seal_job(tmp_path))
    assert isinstance(bench.next()[1], jobs.Sealed)
    assert bench.worker.pid == pid


def test_a_killed_worker_is_an_answer_that_names_the_signal(bench: Bench, tmp_path: Path) -> None:
    with slot(tmp_path, 1):
        number = bench.worker.submit(waiting_job(tmp_path))
        os.kill(bench.worker.pid, signal.SIGKILL)
        got, reply = bench.next()
    assert got == number
    assert isinstance(reply, jobs.Failed)
    assert "SIGKILL" in reply.what
    assert "memory" in reply.what
    bench.worker.submit(seal_job(tmp_path))
    assert isinstance(bench.next()[1], jobs.Sealed)


def test_a_worker_that_died_between_two_jobs_is_replaced(bench: Bench, tmp_path: Path) -> None:
    bench.worker.submit(seal_job(tmp_path))
    bench.next()
    os.kill(bench.worker.pid, signal.SIGTERM)
    eventually(lambda: not bench.worker.pid)
    bench.worker.submit(seal_job(tmp_path))
    assert isinstance(bench.next()[1], jobs.Sealed)


def test_stopping_ends_a_job_at_once(bench: Bench, tmp_path: Path) -> None:
    with slot(tmp_path, 1):
        bench.worker.submit(waiting_job(tmp_path))
        bench.worker.stop()
        assert bench.worker.pid == 0
        assert isinstance(bench.next()[1], jobs.Failed)


def test_an_idle_worker_is_ended_and_a_busy_one_is_not(tmp_path: Path) -> None:
    bench = Bench(linger_seconds=0.0)
    with slot(tmp_path, 1):
        bench.worker.submit(waiting_job(tmp_path))
        bench.worker.tend()
        assert bench.worker.pid
    bench.next()
    bench.worker.tend()
    assert bench.worker.pid == 0


_AGENT = """
import sys, time, pathlib
from edge_agent import effects, jobs
from edge_agent.downloads import Downloads
from edge_agent.home import Home
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.work import Work
from edge_agent.worker_process import WorkerProcess
from fedge.lora import AdapterLayout
from fedge.messages import Training
from fedge.release import open_manifest
worker = WorkerProcess(print, 60)
worker.submit(jobs.Train(bundle="-", adapter="-", data="-", training=Training(), slots=sys.argv[1], slot_count=1,
                         delta="-", steps=1))
print(worker.pid, flush=True)
time.sleep(60)
"""


def _open_files(process: Path) -> list[str]:
    """What a process has open; a file may be closed while we look."""
    found = []
    for file in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(file.readlink()))
    return found


def test_a_killed_agent_takes_its_worker_along(tmp_path: Path) -> None:
    with slot(tmp_path, 1):
        agent = subprocess.Popen(
            [sys.executable, "-c", _AGENT, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert agent.stdout is not None
        worker = Path("/proc") / agent.stdout.readline().strip()
        eventually(lambda: any("slot-0" in name for name in _open_files(worker)))
        agent.kill()
        agent.wait()
        eventually(lambda: not worker.exists() or "Z" in (worker / "stat").read_text().split()[2])


# ---------------------------------------------------------------- as the driver uses it
class Desk:
    def __init__(self, folder: Path, memory_mb_max: int = 0) -> None:
        settings = Settings(home=Home(folder), data=folder / "data", slots=folder / "slots", slot_count=1)
        downloads = Downloads(folder / "blobs", None, lambda _: None, private=True)
        self.replies: queue.Queue[tuple[int, Reply]] = queue.Queue()
        self.work = Work(settings, downloads, Stats(folder / "stats.json"), 1, self._put, memory_mb_max)

    def _put(self, number: int, reply: Reply) -> None:
        self.replies.put((number, reply))


def train(transcript: bytes) -> effects.Train:
    return effects.Train(transcript, bytes(32), bytes(32), bytes(32), Training(), steps=1, data_seed=0)


def test_work_that_outgrows_the_owners_bound_ends_and_is_told_by_that_reason_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path, memory_mb_max=300)
    with slot(tmp_path / "slots", 1):
        assert desk.work.keep_to(301) is None, "nothing is under way"
        assert desk.work.train(train(ROUND)) is None
        assert desk.work.busy
        assert desk.work.keep_to(300) is None
        reason = "301 MB are in use, the owner allows 300 MB"
        assert desk.work.keep_to(301) == effects.WorkFailed(ROUND, reason, "memory")
        assert (desk.work.busy, desk.work.pid) == (False, 0)
        assert (
            desk.work.said(*desk.replies.get(timeout=60)) is None
        )  # of the killed worker: nobody asks any more


def test_only_the_rounds_own_work_is_stopped(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with slot(tmp_path / "slots", 1):
        desk.work.train(train(ROUND))
        desk.work.stop_for(bytes(32))
        assert desk.work.busy
        desk.work.stop_for(ROUND)
        assert (desk.work.busy, desk.work.pid) == (False, 0)


def test_a_workers_failure_is_an_event_with_its_words(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.work.train(train(ROUND))
    event = desk.work.said(*desk.replies.get(timeout=60))
    assert isinstance(event, effects.WorkFailed)
    assert event.transcript == ROUND
    assert "bundle is not here" in event.reason
    desk.work.stop()


def announced(manifest: bytes, publisher: bytes = bytes(32)) -> Announcement:
    return Announcement(
        campaign="c1",
        hub="hub",
        sequence=1,
        closed=False,
        url="https://hub",
        manifest=BlobRef(manifest, 100),
        manifest_signature=bytes(64),
        publisher=publisher,
        lora=LoraConfig(),
        training=Training(),
        adapter=BlobRef(bytes(32), 4),
        adapter_version=0,
    )


def test_a_gauge_waits_for_its_slot_is_begun_once_and_gives_way(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with slot(tmp_path / "slots", 1):
        assert desk.work.gauge(announced(ROUND)) is None
        worker = desk.work.pid
        eventually(lambda: any("slot-0" in name for name in _open_files(Path(f"/proc/{worker}"))))
        assert desk.work.gauge(announced(ROUND)) is None
        assert desk.work.pid == worker
        desk.work.stop_for(ROUND)
        desk.work.hold_gauge(False)
        assert desk.work.busy
        assert desk.replies.empty()
        assert desk.work.gauge(announced(bytes(32))) is None, "another campaign"
        assert desk.work.pid not in (0, worker)
        desk.work.hold_gauge(True)
        assert (desk.work.busy, desk.work.pid) == (False, 0)
        desk.work.train(train(ROUND))
        desk.work.hold_gauge(True)
        assert desk.work.busy, "it does not gauge"
        desk.work.stop()


def test_a_gauge_that_fails_outgrows_its_bound_or_never_ends_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, memory_mb_max=300)
    desk.work.gauge(announced(ROUND))
    failed = desk.work.said(*desk.replies.get(timeout=60))
    assert isinstance(failed, Pace)
    assert (failed.manifest, failed.seconds, "bundle is not here" in failed.reason) == (ROUND, 0.0, True)
    with slot(tmp_path / "slots", 1):
        desk.work.gauge(announced(ROUND))
        reason = "301 MB are in use, the owner allows 300 MB"
        assert desk.work.keep_to(301) == Pace(ROUND, reason=reason)
        assert (desk.work.busy, desk.work.pid) == (False, 0)
        desk.work.gauge(announced(ROUND))
        assert desk.work.keep_to(300) is None
        monkeypatch.setattr(work, "GAUGE_SECONDS_MAX", -1.0)
        assert desk.work.keep_to(300) == Pace(ROUND, reason="no step was done within -1 s")
        assert (desk.work.busy, desk.work.pid) == (False, 0)


def test_a_reply_to_an_earlier_job_is_not_taken_for_one_to_this(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with slot(tmp_path / "slots", 1):
        desk.work.train(train(bytes(32)))
        desk.work.stop()
        old = desk.replies.get(timeout=60)
        desk.work.train(train(ROUND))
        assert desk.work.said(*old) is None
        assert desk.work.busy
        desk.work.stop()


def test_a_warm_worker_sees_a_data_file_that_was_written_anew(
    bench: Bench, tmp_path: Path, tiny_bundle: Path
) -> None:
    data, line = tmp_path / "data.jsonl", '{"prompt": "how are you", "completion": "i am fine"}\n'
    manifest = open_manifest(
        (tiny_bundle / "manifest.json").read_bytes(), (tiny_bundle / "manifest.sig").read_bytes()
    )
    layout = AdapterLayout.of(manifest.layers, manifest.lora_shapes, manifest.lora.r)
    (tmp_path / "adapter").write_bytes(bytes(4 * layout.numbers))
    job = jobs.Evaluate(
        bundle=str(tiny_bundle), adapter=str(tmp_path / "adapter"), data=str(data), training=Training()
    )
    for count in (3, 3, 5):
        data.write_text(line * count)
        bench.worker.submit(job)
        while isinstance(reply := bench.next()[1], jobs.Progress):
            continue
        assert isinstance(reply, jobs.Evaluated)
        assert len(reply.nll) == count
