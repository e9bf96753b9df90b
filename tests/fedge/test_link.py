"""The link against a real broker: order, bounds, restarts, the will, TLS that refuses."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import MOSQUITTO, Broker, Client, Desk, free_port

from fedge import limits
from fedge.errors import IntegrityError, NoInputError, ProtocolError, UnavailableError
from fedge.io.link import Token, Will
from fedge.io.tls import client_tls

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.stop()


def test_a_message_published_before_the_connection_arrives_once(broker: Broker) -> None:
    with Client(broker.port, "hub", "up/#") as hub:
        assert hub.next() == ("up", "", b"")
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
        assert device.next() == ("up", "", b"")
        assert device.next() == ("message", "ann/a", b"news")


def test_broker_restart_tells_down_then_up_and_loses_nothing_queued(broker: Broker) -> None:
    with Client(broker.port, "hub", "up/#") as hub, Client(broker.port, "dev") as device:
        assert hub.next()[0] == device.next()[0] == "up"
        broker.stop()
        kind, reason, _ = device.next()
        assert kind == "down"
        assert f"127.0.0.1:{broker.port}" in reason
        assert hub.next()[0] == "down"
        device.link.publish("up/dev", b"written while the broker was away")
        broker.start()
        assert hub.next() == ("up", "", b"")  # and the subscription was made again by this one:
        # The device may come back first: then the new broker had no subscriber and dropped the message, as MQTT may.
        assert device.next() == ("up", "", b"")
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
        assert "refused" in reason.lower()
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
            assert again.next() == ("up", "", b"")
            assert again.next() == ("message", "up/dev", b"two")
            again.link.acknowledge(Token(old.connection + 7, old.message))
        with Client(broker.port, "hub", "up/#", manual_ack=True) as third:
            assert third.next() == ("up", "", b"")
            assert third.next() == ("message", "up/dev", b"two")
            third.link.acknowledge(third.tokens[0])
        with Client(broker.port, "hub", "up/#", manual_ack=True) as last:
            assert last.next() == ("up", "", b"")
            with pytest.raises(queue.Empty):
                last.next(0.3)


# ---------------------------------------------------------------- TLS
def test_mutual_tls_with_certificates_of_the_fleet(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    broker = desk.broker()
    try:
        with Client(broker.port, "dev", "x", host="localhost", tls=desk.tls("dev")) as device:
            assert device.next()[0] == "up"
            for number in range(30):
                device.link.publish("x", bytes([number]) * 60_000)
            assert [device.next()[2] for _ in range(30)] == [bytes([n]) * 60_000 for n in range(30)]
    finally:
        broker.stop()


def test_a_broker_of_another_fleet_or_another_name_is_refused(tmp_path: Path) -> None:
    ours, theirs = Desk(tmp_path / "ours"), Desk(tmp_path / "theirs")
    broker = theirs.broker()
    try:
        for host, desk in (("localhost", ours), ("127.0.0.1", theirs)):
            with Client(broker.port, "dev", host=host, tls=desk.tls("dev")) as device:
                kind, reason, _ = device.next()
                assert kind == "down"
                assert "certificate is not trusted" in reason
    finally:
        broker.stop()


def test_tls_files_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    certificate, _ = desk.certify("dev")
    _, other_key = desk.certify("other")
    with pytest.raises(NoInputError):
        client_tls(desk.pem, certificate, tmp_path / "nothing.key")
    with pytest.raises(IntegrityError, match="do not fit"):
        client_tls(desk.pem, certificate, other_key)
    desk.pem.write_text("hello")
    with pytest.raises(IntegrityError):
        client_tls(desk.pem)
