"""`python -m hub up` for real: both brokers, kills, clean ends, revocation, and one line for every failure."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.enrol import enroll
from edge_agent.home import Home
from fedge import topics
from fedge.io.link import Link
from fedge.io.tls import client_tls
from fedge.messages import HubState, Presence, decode, encode
from hub import commands
from hub.broker import free_port
from hub.mosquitto import find_mosquitto

pytestmark = pytest.mark.processes
Eventually = Callable[[Callable[[], object]], None]
BROKERS = [
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is missing")
    ),
    "embedded",
]


class Hub:
    """A hub process in a folder of its own."""

    def __init__(self, folder: Path, broker: str) -> None:
        folder.mkdir(exist_ok=True)
        self.home, self.broker = folder / "hub", broker
        self.ready_file, self.log = folder / "ready.json", folder / "hub.log"
        commands.create(self.home, "lab")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *more: str) -> list[str]:
        flags = ["--home", str(self.home), "--bind", "127.0.0.1", "--port", "0", "--mqtt-port", "0"]
        return [sys.executable, "-m", "hub", "up", *flags, "--broker", self.broker, *more]

    def start(self) -> dict[str, object]:
        self.ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("--ready-file", str(self.ready_file)), stdout=log, stderr=log
            )
        until = time.monotonic() + 60
        while not self.ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        info: dict[str, object] = json.loads(self.ready_file.read_text())
        return info

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGTERM)


class Device:
    """A device that joined: hears the hub's state, says that it is there."""

    def __init__(self, hub: Hub, home: Home, name: str) -> None:
        token = commands.new_tokens(hub.home, 1, 5.0)[0]
        who = enroll(token, home, name=name)
        self.states: list[HubState] = []
        self.downs: list[str] = []
        self.link = Link(
            who.broker_host,
            who.broker_port,
            name,
            client_tls(home.authority, home.certificate, home.key),
            [topics.HUB_STATE],
            on_up=lambda: None,
            on_down=self.downs.append,
            on_message=lambda _topic, payload, _token: self.states.append(decode(payload, HubState)),
        )
        self.link.start()
        self.link.publish(topics.state(name), encode(Presence(device=name, up=True, boot=1)), retain=True)

    def sees(self, *, up: bool, epoch: int) -> bool:
        return bool(self.states) and self.states[-1] == HubState(hub="hub", up=up, epoch=epoch)


@pytest.fixture(params=BROKERS)
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    made = Hub(tmp_path, request.param)
    yield made
    made.close()


def test_a_hub_lives_is_killed_and_lives_again(hub: Hub, tmp_path: Path, eventually: Eventually) -> None:
    first = hub.start()
    device = Device(hub, Home(tmp_path / "d-1"), "d-1")
    try:
        eventually(lambda: device.sees(up=True, epoch=1))
        hub.end(signal.SIGKILL)
        second = hub.start()
        assert (second["https_port"], second["mqtt_port"]) == (first["https_port"], first["mqtt_port"])
        eventually(lambda: device.sees(up=True, epoch=2))
        assert hub.end(signal.SIGTERM) == 0
        if hub.broker == "mosquitto":  # the embedded broker ends with the hub, before it could tell everybody
            eventually(lambda: device.sees(up=False, epoch=2))
    finally:
        device.link.stop()
    assert not (hub.home / "ready.json").exists()


def test_a_running_hub_tells_how_its_devices_stand(
    hub: Hub, tmp_path: Path, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.start()
    device = Device(hub, Home(tmp_path / "d-1"), "d-1")
    try:
        eventually(lambda: device.sees(up=True, epoch=1))
        commands.devices(hub.home, "", most=5, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert found["campaigns"] == found["blocs"] == []
        told = {(one["id"], one["why"]) for one in found["devices"]}
        assert told <= {("d-1", "no campaign")}, "its presence may still be on its way"
        commands.blocs(hub.home, "", most=5, as_json=False)
        assert not (hub.home / "standing.asked").exists()
    finally:
        device.link.stop()


def test_a_revoked_device_is_cut_off(hub: Hub, tmp_path: Path, eventually: Eventually) -> None:
    hub.start()
    bad, good = (Device(hub, Home(tmp_path / name), name) for name in ("d-bad", "d-good"))
    try:
        eventually(lambda: bad.sees(up=True, epoch=1) and good.sees(up=True, epoch=1))
        commands.revoke(hub.home, "d-bad")
        eventually(lambda: bad.downs)
        eventually(lambda: good.link.is_up)
        good.states.clear()
        bad.states.clear()
        hub.end(signal.SIGTERM)
        hub.start()  # a restart has not forgotten
        eventually(lambda: good.sees(up=True, epoch=2))
        assert bad.states == []
    finally:
        bad.link.stop()
        good.link.stop()


def test_the_broker_is_killed_under_a_running_hub(tmp_path: Path, eventually: Eventually) -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is missing")
    hub = Hub(tmp_path, "mosquitto")
    hub.start()
    device = Device(hub, Home(tmp_path / "d-1"), "d-1")
    try:
        eventually(lambda: device.sees(up=True, epoch=1))
        os.kill(int((hub.home / "broker/mosquitto.pid").read_text()), signal.SIGKILL)
        eventually(lambda: device.downs and device.link.is_up)
        device.states.clear()
        eventually(lambda: device.sees(up=True, epoch=1))
    finally:
        device.link.stop()
        hub.close()


def test_ctrl_c_ends_it_cleanly_and_nothing_stays(tmp_path: Path) -> None:
    hub = Hub(tmp_path, "auto")
    info = hub.start()
    assert hub.end(signal.SIGINT) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(str(info["mqtt_port"])))) != 0


def test_a_second_hub_in_the_same_folder(tmp_path: Path) -> None:
    hub = Hub(tmp_path, "embedded")
    hub.start()
    try:
        second = subprocess.run(hub.command(), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 69
        assert "already runs" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    finally:
        hub.close()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    hub = Hub(tmp_path, "auto")
    for flag in ("--port", "--mqtt-port"):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = str(other.getsockname()[1])
            done = subprocess.run(
                hub.command(flag, port), capture_output=True, text=True, timeout=60, check=False
            )
        assert done.returncode == 69
        assert port in done.stderr
        assert flag in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_broker_elsewhere_that_is_away(tmp_path: Path) -> None:
    hub = Hub(tmp_path, f"mqtts://127.0.0.1:{free_port('127.0.0.1')}")
    done = subprocess.run(hub.command(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 69
    assert "no broker at" in done.stderr


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is missing")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("user hub\ntopic readwrite fl/v1/#\npattern read fl/v1/d/%u/dn/#\n", "never receives what a device"),
        ("pattern write fl/v1/d/%u/up/#\nuser hub\ntopic readwrite fl/v1/#\n", "a device never receives"),
        ("pattern readwrite fl/v1/#\n", "in another device's name"),
    ],
)
def test_a_wrong_access_list_is_noticed(tmp_path: Path, wrong: str, said: str) -> None:
    """A broker that answers 'success' and throws messages away, or one that lets too much pass."""
    hub = Hub(tmp_path, "mosquitto")
    port = hub.start()["mqtt_port"]
    hub.close()
    folder = hub.home / "broker"
    (folder / "access.list").write_text(wrong)
    program = find_mosquitto()
    assert program is not None
    broker = subprocess.Popen([program, "-c", folder / "mosquitto.conf"], stderr=subprocess.DEVNULL)
    hub.broker = f"mqtts://localhost:{port}"
    try:
        until = time.monotonic() + 20
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", int(str(port)))) != 0:
                assert time.monotonic() < until
        done = subprocess.run(hub.command(), capture_output=True, text=True, timeout=90, check=False)
    finally:
        broker.terminate()
        broker.wait()
    assert done.returncode == 69
    assert said in done.stderr
    assert "access list" in done.stderr
