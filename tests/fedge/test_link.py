"""The link against a real broker: order, bounds, restarts, the will, TLS that refuses."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import queue
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedge import limits
from fedge.authority import certificate_pem, key_pem, new_authority, p256_key
from fedge.errors import IntegrityError, NoInputError, ProtocolError, UnavailableError
from fedge.io.link import Link, Token, Will
from fedge.io.tls import client_tls

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A private mosquitto that can be killed and started again on the same port."""

    def __init__(self, folder: Path, lines: str = "") -> None:
        self.port = free_port()
        self.config = folder / "mosquitto.conf"
        text = f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_packet_size 200000\n"
        if os.geteuid() == 0:
            text += "user root\n"
        self.config.write_text(text + lines)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert MOSQUITTO
        self.process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("mosquitto did not start")

    def stop(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.stop()


class Client:
    """A link whose callbacks land in one queue, in order."""

    def __init__(
        self,
        port: int,
        name: str,
        *topics: str,
        host: str = "127.0.0.1",
        tls: object = None,
        will: Will | None = None,
        manual_ack: bool = False,
        queued_max: int = 256,
    ) -> None:
        self.seen: queue.Queue[tuple[str, object, object]] = queue.Queue()
        self.tokens: list[Token] = []
        self.link = Link(
            host,
            port,
            name,
            tls,  # type: ignore[arg-type]
            topics,
            will,
            on_up=lambda: self.seen.put(("up", None, None)),
            on_down=lambda reason: self.seen.put(("down", reason, None)),
            on_message=self._message,
            manual_ack=manual_ack,
            queued_max=queued_max,
        )

    def _message(self, topic: str, payload: bytes, token: Token) -> None:
        self.tokens.append(token)
        self.seen.put(("message", topic, payload))

    def next(self, seconds: float = 15) -> tuple[str, object, object]:
        return self.seen.get(timeout=seconds)

    def __enter__(self) -> Client:
        self.link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()


def test_a_message_published_before_the_connection_arrives_once(broker: Broker) -> None:
    with Client(broker.port, "hub", "up/#") as hub:
        assert hub.next() == ("up", None, None)
        device = Client(broker.port, "dev")
        device.link.publish("up/dev", b"early")
        with device:
            assert hub.next() == ("message", "up/dev", b"early")
            assert device.link.bytes_up == hub.link.bytes_down == 5
    with pytest.raises(queue.Empty):
        hub.next(0.2)


def test_up_comes_before_retained_messages(broker: Broker) -> None:
    with Client(broker.port, "hub") as hub:
        assert hub.next()[0] == "up"
        hub.link.publish("ann/a", b"news", retain=True)
    with Client(broker.port, "dev", "ann/+") as device:
        assert device.next() == ("up", None, None)
        assert device.next() == ("message", "ann/a", b"news")


def test_broker_restart_tells_down_then_up_and_loses_nothing_queued(broker: Broker) -> None:
    with Client(broker.port, "hub", "up/#") as hub, Client(broker.port, "dev") as device:
        assert hub.next()[0] == device.next()[0] == "up"
        broker.stop()
        kind, reason, _ = device.next()
        assert kind == "down"
        assert f"127.0.0.1:{broker.port}" in str(reason)
        assert hub.next()[0] == "down"
        device.link.publish("up/dev", b"written while the broker was away")
        broker.start()
        assert hub.next() == ("up", None, None)  # and the subscription was made again by this one:
        # The device may come back first: then the new broker had no subscriber and dropped the message, as MQTT may.
        assert device.next() == ("up", None, None)
        device.link.publish("up/dev", b"last")
        arrived = [hub.next()]
        while arrived[-1][2] != b"last":
            arrived.append(hub.next())
        assert all(entry[0] == "message" for entry in arrived)


def test_oversize_is_refused_before_the_queue_and_the_link_goes_on(broker: Broker) -> None:
    with Client(broker.port, "hub", "up/#") as hub, Client(broker.port, "dev") as device:
        assert hub.next()[0] == device.next()[0] == "up"
        with pytest.raises(ProtocolError) as caught:
            device.link.publish("up/dev", bytes(limits.FRAME_BYTES_HARD_MAX + 1))
        assert caught.value.name == "oversize"
        whole = bytes(limits.FRAME_BYTES_HARD_MAX)
        device.link.publish("up/dev", whole)
        assert hub.next() == ("message", "up/dev", whole)


def test_the_queue_is_bounded_and_the_error_names_the_topic() -> None:
    lonely = Client(free_port(), "dev", queued_max=3)
    for number in range(3):
        lonely.link.publish("up/dev", bytes([number]))
    with pytest.raises(UnavailableError, match="up/dev"):
        lonely.link.publish("up/dev", b"one too many")
    assert lonely.link.bytes_up == 3


def test_no_broker_is_told_once_in_plain_words() -> None:
    with Client(free_port(), "dev") as lonely:
        kind, reason, _ = lonely.next()
        assert kind == "down"
        assert "refused" in str(reason).lower()
        with pytest.raises(queue.Empty):
            lonely.next(1.0)  # several attempts later


def test_a_clean_stop_sends_no_will_and_flushes(broker: Broker) -> None:
    with Client(broker.port, "hub", "state/#", "up/#") as hub:
        assert hub.next()[0] == "up"
        with Client(broker.port, "dev", will=Will("state/dev", b"gone")) as device:
            assert device.next()[0] == "up"
            for number in range(40):
                device.link.publish("up/dev", bytes([number]))
        assert [hub.next()[2] for _ in range(40)] == [bytes([number]) for number in range(40)]
        with pytest.raises(queue.Empty):
            hub.next(0.3)


def test_a_killed_client_leaves_its_will(broker: Broker) -> None:
    program = (
        "import os, threading\n"
        "from fedge.io.link import Link, Will\n"
        "up = threading.Event()\n"
        f"link = Link('127.0.0.1', {broker.port}, 'dev', None, (), Will('state/dev', b'gone'),\n"
        "    on_up=up.set, on_down=print, on_message=print)\n"
        "link.start(); up.wait(10); os._exit(9)\n"
    )
    with Client(broker.port, "hub", "state/#") as hub:
        assert hub.next()[0] == "up"
        assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 9
        assert hub.next() == ("message", "state/dev", b"gone")


def test_what_was_not_acknowledged_comes_again_and_old_tokens_are_ignored(broker: Broker) -> None:
    with Client(broker.port, "dev") as device:
        assert device.next()[0] == "up"
        with Client(broker.port, "hub", "up/#", manual_ack=True) as hub:
            assert hub.next()[0] == "up"
            device.link.publish("up/dev", b"one")
            device.link.publish("up/dev", b"two")
            assert [hub.next()[2], hub.next()[2]] == [b"one", b"two"]
            hub.link.acknowledge(hub.tokens[0])
            old = hub.tokens[1]
        with Client(broker.port, "hub", "up/#", manual_ack=True) as again:
            assert again.next() == ("up", None, None)
            assert again.next() == ("message", "up/dev", b"two")
            again.link.acknowledge(Token(old.connection + 7, old.message))
        with Client(broker.port, "hub", "up/#", manual_ack=True) as third:
            assert third.next() == ("up", None, None)
            assert third.next() == ("message", "up/dev", b"two")
            third.link.acknowledge(third.tokens[0])
        with Client(broker.port, "hub", "up/#", manual_ack=True) as last:
            assert last.next() == ("up", None, None)
            with pytest.raises(queue.Empty):
                last.next(0.3)


# ---------------------------------------------------------------- TLS
def write_tls(folder: Path, fleet: str = "lab", *, name: str = "localhost") -> None:
    """A fleet authority, a server certificate for `name` and a device's certificate, as files."""
    folder.mkdir(exist_ok=True)
    now = dt.datetime.now(dt.UTC).timestamp()
    authority = new_authority(fleet, os.urandom(96), now=now)
    (folder / "authority.pem").write_bytes(certificate_pem(authority.tls_certificate))
    for who, names in (("server", (name,)), ("dev", ())):
        key: ec.EllipticCurvePrivateKey = p256_key(os.urandom(48))
        (folder / f"{who}.pem").write_bytes(
            authority.certify_tls(who, key.public_key(), serial=2, now=now, names=names)
        )
        (folder / f"{who}.key").write_bytes(key_pem(key))


def tls_lines(folder: Path) -> str:
    return (
        f"cafile {folder}/authority.pem\ncertfile {folder}/server.pem\nkeyfile {folder}/server.key\n"
        "require_certificate true\nuse_identity_as_username true\nuse_username_as_clientid true\n"
    )


def device_tls(folder: Path) -> object:
    return client_tls(folder / "authority.pem", folder / "dev.pem", folder / "dev.key")


def test_mutual_tls_with_certificates_of_the_fleet(tmp_path: Path) -> None:
    write_tls(tmp_path)
    broker = Broker(tmp_path, tls_lines(tmp_path))
    try:
        with Client(broker.port, "dev", "x", host="localhost", tls=device_tls(tmp_path)) as device:
            assert device.next() == ("up", None, None)
            for number in range(30):
                device.link.publish("x", bytes([number]) * 60_000)
            assert [device.next()[2] for _ in range(30)] == [bytes([n]) * 60_000 for n in range(30)]
    finally:
        broker.stop()


def test_a_broker_of_another_fleet_or_another_name_is_refused(tmp_path: Path) -> None:
    write_tls(tmp_path / "ours")
    write_tls(tmp_path / "theirs")
    broker = Broker(tmp_path, tls_lines(tmp_path / "theirs"))
    try:
        for host, folder in (("localhost", "ours"), ("127.0.0.1", "theirs")):
            with Client(broker.port, "dev", host=host, tls=device_tls(tmp_path / folder)) as device:
                kind, reason, _ = device.next()
                assert kind == "down"
                assert "certificate is not trusted" in str(reason)
    finally:
        broker.stop()


def test_tls_files_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    write_tls(tmp_path)
    with pytest.raises(NoInputError):
        client_tls(tmp_path / "authority.pem", tmp_path / "dev.pem", tmp_path / "nothing.key")
    with pytest.raises(IntegrityError, match="do not fit"):
        client_tls(tmp_path / "authority.pem", tmp_path / "dev.pem", tmp_path / "server.key")
    (tmp_path / "authority.pem").write_text("hello")
    with pytest.raises(IntegrityError):
        client_tls(tmp_path / "authority.pem")
