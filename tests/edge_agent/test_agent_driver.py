"""The agent's driver for real: a process, a broker with mutual TLS, downloads, and a world that fails."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from desk import MOSQUITTO, Broker, Client, Desk, eventually, serving

from edge_agent import driver as driving
from edge_agent import effects, surroundings
from edge_agent import work as working
from edge_agent.board_state import Board
from edge_agent.bundle import open_bundle
from edge_agent.conditions import Reading
from edge_agent.driver import Driver
from edge_agent.generator import Generator
from edge_agent.home import Home
from edge_agent.journal import Journal
from edge_agent.pace import Pace
from edge_agent.settings import Settings
from edge_agent.slots import slot
from edge_agent.stats import Figures
from edge_agent.status import lines, look
from edge_agent.work import Work
from edge_agent.worker_process import Reply
from fedge import __version__, topics
from fedge.identity import Signer, Verifier
from fedge.io import durable
from fedge.messages import Announcement, BlobRef, Presence, Ready, Training, decode
from fedge.release import MANIFEST, Manifest, open_manifest

pytestmark = [
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
    pytest.mark.processes,
    pytest.mark.xdist_group("processes"),
]
ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "onnxruntime", "tokenizers", "torch")


@dataclass
class Scene:
    """A desk with a broker, the hub's end of it, and one device."""

    desk: Desk
    broker: Broker
    hub: Client
    signer: Signer
    home: Home
    data: Path

    def command(self, *words: str) -> list[str]:
        base = [sys.executable, "-m", "edge_agent", "run", "--home", str(self.home.folder)]
        return [*base, "--data", str(self.data), *words]

    def presence(self) -> Presence:
        """The next thing that the broker says about the device."""
        while True:
            kind, topic, payload = self.hub.next()
            if kind == "message" and topic == topics.state("dev"):
                return decode(payload, Presence)

    def ready(self) -> Ready:
        """The next READY."""
        verifier = Verifier("lab", self.desk.authority.root_public)
        while True:
            kind, topic, payload = self.hub.next()
            if kind == "message" and topic == topics.control("dev"):
                return verifier.open(payload, Ready, role="device", now=time.time()).message

    def announce(self, bundle: Path, url: str, sequence: int = 1) -> None:
        manifest = (bundle / MANIFEST).read_bytes()
        signature = (bundle / "manifest.sig").read_bytes()
        opened: Manifest = open_manifest(manifest, signature)
        said = Announcement(
            campaign="c1",
            hub="hub",
            sequence=sequence,
            closed=False,
            url=url,
            manifest=BlobRef(hashlib.sha256(manifest).digest(), len(manifest)),
            manifest_signature=signature,
            publisher=bytes.fromhex(opened.publisher),
            lora=opened.lora,
            training=Training(),
            adapter=BlobRef(bytes(32), 4),
            adapter_version=0,
        )
        self.hub.link.publish(topics.announcement("c1"), self.signer.seal(said), retain=True)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    desk = Desk(tmp_path)
    broker = desk.broker()
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    hub = Client(broker.port, "hub", topics.ALL_STATES, topics.ALL_UP, host="localhost", tls=desk.tls("hub"))
    with hub:
        assert hub.next()[0] == "up"
        yield Scene(desk, broker, hub, desk.signer("hub", "hub"), desk.device("dev", broker.port), data)
    broker.stop()


@contextlib.contextmanager
def running(scene: Scene, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(scene.command(*words), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_is_small_loads_nothing_heavy_and_stops_cleanly(scene: Scene) -> None:
    with running(scene) as process:
        up = scene.presence()
        assert (up.device, up.up, up.boot) == ("dev", True, 1)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert [name for name in HEAVY if name in maps] == []
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        assert resident * 1_024 <= 50e6
        second = subprocess.run(scene.command(), cwd=ROOT, capture_output=True, text=True, check=False)
        assert second.returncode == 69
        assert "another agent runs in this home" in second.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    down = scene.presence()
    assert (down.up, down.boot) == (False, 1)
    assert Journal(scene.home.state).load().boot == 1
    figures = msgspec.json.decode(scene.home.stats.read_bytes(), type=Figures)
    assert 0 < figures.idle_rss_mb <= 50
    assert figures.mqtt_up_bytes > 0


def test_no_source_of_the_agent_itself_imports_anything_heavy() -> None:
    program = (
        "import sys; import edge_agent.driver, edge_agent.enrol, edge_agent.cli, edge_agent.status\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_killed_process_leaves_its_will_and_comes_back_as_a_new_boot(scene: Scene) -> None:
    with running(scene):
        assert scene.presence().boot == 1
    gone = scene.presence()
    assert (gone.up, gone.boot) == (False, 1)
    with running(scene):
        back = scene.presence()
        assert (back.up, back.boot) == (True, 2)


def test_a_bundle_is_fetched_once_and_the_device_says_ready(scene: Scene, tiny_bundle: Path) -> None:
    with serving(scene.desk, tiny_bundle) as (url, asked):
        with running(scene):
            scene.announce(tiny_bundle, url)
            ready = scene.ready()
            assert (ready.campaign, ready.device, ready.facts.samples_bucket) == ("c1", "dev", 3)
        manifest = hashlib.sha256((tiny_bundle / MANIFEST).read_bytes()).hexdigest()
        folder = scene.home.blobs / f"{manifest}.bundle"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in tiny_bundle.iterdir()
        }
        Generator(open_bundle(folder))  # an owner may use it as it lies there
        before = len(asked)
        with running(scene):
            assert scene.ready().prekey == ready.prekey  # it may already stand in an OPEN
        assert len(asked) == before


def test_a_missing_data_file_is_one_line_and_its_exit_code(scene: Scene) -> None:
    scene.data.unlink()
    done = subprocess.run(scene.command(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 66
    assert done.stderr.count("\n") == 1
    assert str(scene.data) in done.stderr


# ---------------------------------------------------------------- in this process, to break the world under it
@contextlib.contextmanager
def driven(scene: Scene, slots: Path | None = None) -> Iterator[Driver]:
    driver = Driver(Settings(home=scene.home, data=scene.data, slots=slots, slot_count=1))
    raised: list[BaseException] = []

    def run() -> None:
        try:
            driver.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield driver
    finally:
        driver.on_signal(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()
        assert raised == []


def test_a_full_disk_stops_the_machine_and_room_starts_it_again(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driving, "_RECOVER_SECONDS", (0.2, 0.4))
    monkeypatch.setattr(driving, "_STATS_SECONDS", 0.05)
    free = durable.bytes_free
    told: list[str] = []
    with serving(scene.desk, tiny_bundle) as (url, asked), driven(scene):
        assert scene.presence().up
        before = Journal(scene.home.state).load()
        monkeypatch.setattr(durable, "bytes_free", lambda _: 1_000)
        scene.announce(tiny_bundle, url)
        eventually(lambda: told.append(capsys.readouterr().err) or "1,000 bytes free" in "".join(told))
        assert Journal(scene.home.state).load() == before
        assert asked == []  # nothing after the Save that failed was done
        monkeypatch.setattr(durable, "bytes_free", free)
        assert scene.presence().up  # it is there again by itself
        scene.announce(tiny_bundle, url, sequence=2)
        assert scene.ready().campaign == "c1"
        assert Journal(scene.home.state).load().boot > before.boot


def test_the_owners_policy_and_the_board_decide_what_is_done_and_said(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an empty battery nothing is fetched; charged, it is ready; empty again, it is there, but not now."""
    monkeypatch.setattr(driving, "_STATS_SECONDS", 0.05)
    monkeypatch.setattr(surroundings, "LOOK_SECONDS", 0.05)
    charge = [0.1]
    monkeypatch.setattr(Board, "read", lambda *_, **__: Reading("battery", charge[0], up_seconds=9_000.0))
    with scene.home.alone(), serving(scene.desk, tiny_bundle) as (url, asked), driven(scene):
        assert scene.presence().up
        scene.announce(tiny_bundle, url)
        eventually(lambda: "not now: the battery is below 25%" in "\n".join(lines(look(scene.home))))
        eventually(lambda: bool(Journal(scene.home.state).load().announcement))
        assert asked == []
        charge[0] = 0.9
        ready = scene.ready()
        assert (ready.facts.power, ready.facts.charge_quarter, ready.stay_seconds) == ("battery", 3, 3_600)
        assert ready.facts.version == __version__
        charge[0] = 0.1
        until = time.monotonic() + 20
        while (empty := scene.ready()).stay_seconds and time.monotonic() < until:
            pass
        assert (empty.stay_seconds, empty.prekey, empty.facts.charge_quarter) == (0, ready.prekey, 0)
        assert empty.counter > ready.counter


def gauge_with(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """The real worker gauges; the time that it found is replaced by `seconds`. What it found, in order."""
    found: list[float] = []
    said = Work.said

    def told(work: Work, number: int, reply: Reply) -> effects.Event | Pace | None:
        outcome = said(work, number, reply)
        if isinstance(outcome, Pace) and not outcome.reason:
            found.append(outcome.seconds)
            return Pace(outcome.manifest, seconds)
        return outcome

    monkeypatch.setattr(Work, "said", told)
    return found


def test_the_first_ready_has_the_pace_and_a_restart_keeps_it(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gauge_with(monkeypatch, 12.345)
    with serving(scene.desk, tiny_bundle) as (url, _):
        with driven(scene):
            scene.announce(tiny_bundle, url)
            first = scene.ready()
        assert (first.counter, first.facts.seconds_per_step) == (1, 12.0)
        assert [0 < seconds < 60 for seconds in found] == [True]
        with driven(scene):
            again = scene.ready()
        assert (again.prekey, again.facts.seconds_per_step, len(found)) == (first.prekey, 12.0, 1)


def test_a_pace_that_a_round_has_measured_is_not_gauged_again(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gauge_with(monkeypatch, 12.345)
    Journal(scene.home.state).save(effects.AgentState(seconds_per_step=3.4))
    with serving(scene.desk, tiny_bundle) as (url, _), driven(scene):
        scene.announce(tiny_bundle, url)
        assert scene.ready().facts.seconds_per_step == 3.4
    assert found == []


def test_a_gauge_that_fails_is_a_line_and_the_campaign_goes_on(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(working, "free_memory_mb", lambda: 50)
    with serving(scene.desk, tiny_bundle) as (url, _), driven(scene):
        scene.announce(tiny_bundle, url)
        ready = scene.ready()
    assert (ready.counter, ready.facts.seconds_per_step) == (1, 0.0)
    told = capsys.readouterr().err
    assert told.count("this device's pace is not known before its first round: a round would take about") == 1


def test_nothing_is_gauged_while_the_owner_does_not_allow_it(
    scene: Scene, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged, the gauge begins and waits for its slot; on an empty battery it is given up; charged, done again."""
    monkeypatch.setattr(driving, "_STATS_SECONDS", 0.05)
    monkeypatch.setattr(driving, "_WORKING_SECONDS", 0.05)
    monkeypatch.setattr(surroundings, "LOOK_SECONDS", 0.05)
    found, charge = gauge_with(monkeypatch, 12.345), [0.9]
    monkeypatch.setattr(Board, "read", lambda *_, **__: Reading("battery", charge[0], up_seconds=9_000.0))
    begun: list[Announcement] = []
    gauge = Work.gauge
    monkeypatch.setattr(Work, "gauge", lambda work, said: begun.append(said) or gauge(work, said))
    slots = scene.home.folder / "slots"
    with serving(scene.desk, tiny_bundle) as (url, _), driven(scene, slots) as driver:
        with slot(slots, 1):
            scene.announce(tiny_bundle, url)
            eventually(lambda: driver._work.busy)
            charge[0] = 0.1
            eventually(lambda: not driver._work.busy)
        manifest = hashlib.sha256((tiny_bundle / MANIFEST).read_bytes()).digest()
        driver._inbox.put(effects.Fetched(manifest))  # one that was on its way
        driver._inbox.put(effects.TimerFired("none"))
        eventually(driver._inbox.empty)
        assert Journal(scene.home.state).load().bundle == b""
        assert (len(begun), found) == (1, [])
        charge[0] = 0.9
        ready = scene.ready()
        assert (ready.counter, ready.facts.seconds_per_step) == (1, 12.0)
    assert (len(begun), len(found)) == (2, 1)


def test_before_the_clock_is_set_nothing_is_done_or_used_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driving, "_CLOCK_SECONDS", 0.05)
    scene.home = scene.desk.device("dev", scene.broker.port, now=time.time() + 86_400)
    told: list[str] = []
    with driven(scene):
        eventually(lambda: told.append(capsys.readouterr().err) or "clock not set yet" in "".join(told))
    assert Journal(scene.home.state).load().boot == 0
    assert not scene.home.clock.exists()
    assert scene.hub.seen.empty()


def test_a_state_that_is_damaged_is_never_started_over(scene: Scene) -> None:
    scene.home.state.write_bytes(os.urandom(100))
    done = subprocess.run(scene.command(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 79
    assert "damaged" in done.stderr


def test_the_same_line_is_told_once_a_minute(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver(Settings(home=scene.home, data=scene.data))
    for _ in range(100):
        driver._tell("a hub repeats itself", "stale-round")
    assert capsys.readouterr().err.count("a hub repeats itself [stale-round]") == 1
