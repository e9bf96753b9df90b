"""One contract for both brokers: the certificate is the identity, the access list holds, queues and wills work."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable

import paho.mqtt.client as mqtt
import pytest
from conftest import Fleet
from paho.mqtt.enums import CallbackAPIVersion

from fedge import topics
from fedge.errors import UnavailableError, UnsupportedError
from fedge.io.link import Link, Will
from fedge.io.tls import client_tls
from hub import access
from hub.authority import TlsPair, create_authority
from hub.broker import Broker, BrokerSetup, ForeignBroker, choose_broker, free_port
from hub.config import HubConfig
from hub.embedded import _Snapshots
from hub.mosquitto import Mosquitto, _version, find_mosquitto

Cleanup = list[Callable[[], None]]
Eventually = Callable[[Callable[[], object]], None]
INSTALLED = find_mosquitto() is not None


class Client:
    """A fleet member at the broker; what it hears is in `heard`."""

    def __init__(
        self, broker: Broker, fleet: Fleet, name: str, pair: TlsPair, *filters: str, **options: Will
    ):
        self.heard: list[tuple[str, bytes]] = []
        self.up, self.downs = threading.Event(), list[str]()
        self.link = Link(
            broker.host,
            broker.port,
            name,
            client_tls(fleet.pem, pair.certificate, pair.key),
            filters,
            options.get("will"),
            on_up=self.up.set,
            on_down=self._down,
            on_message=lambda topic, payload, _token: self.heard.append((topic, payload)),
        )
        self.link.start()

    def _down(self, reason: str) -> None:
        self.up.clear()
        self.downs.append(reason)

    def cut(self) -> None:
        """The line breaks, without a farewell."""
        stream = self.link._client.socket()
        assert stream is not None
        with socket.socket(fileno=os.dup(stream.fileno())) as twin:
            twin.shutdown(socket.SHUT_RDWR)

    def is_up(self) -> bool:
        return self.up.wait(20)


class Scene:
    """A running broker and its clients."""

    def __init__(self, kind: str, fleet: Fleet, cleanup: Cleanup) -> None:
        self.fleet, self.cleanup = fleet, cleanup
        config = HubConfig(home=str(fleet.home), broker=kind)
        self.setup = BrokerSetup(
            fleet.home / "broker", "127.0.0.1", free_port("127.0.0.1"), fleet.own.server, fleet.pem, fleet.crl
        )
        self.setup.folder.mkdir(exist_ok=True)
        self.broker = choose_broker(config, self.setup)
        assert self.broker.kind == kind
        self.broker.start()
        cleanup.append(self.broker.stop)

    def client(self, name: str, *filters: str, **options: Will) -> Client:
        made = Client(self.broker, self.fleet, name, self.fleet.device(name), *filters, **options)
        self.cleanup.append(made.link.stop)
        assert made.is_up(), made.downs
        return made

    def hub(self, *filters: str) -> Client:
        made = Client(self.broker, self.fleet, "hub", self.fleet.own.client, *(filters or ("fl/v1/#",)))
        self.cleanup.append(made.link.stop)
        assert made.is_up(), made.downs
        return made


@pytest.fixture(
    params=[
        pytest.param("mosquitto", marks=pytest.mark.skipif(not INSTALLED, reason="mosquitto is missing")),
        "embedded",
    ]
)
def scene(request: pytest.FixtureRequest, fleet: Fleet, cleanup: Cleanup) -> Scene:
    return Scene(request.param, fleet, cleanup)


def test_own_topics_pass(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    device = scene.client("d-1", topics.commands("d-1"), topics.HUB_STATE)
    device.link.publish(topics.control("d-1"), b"ready")
    eventually(lambda: (topics.control("d-1"), b"ready") in hub.heard)
    hub.link.publish(topics.commands("d-1"), b"open")
    hub.link.publish(topics.HUB_STATE, b"up", retain=True)
    eventually(lambda: {(topics.commands("d-1"), b"open"), (topics.HUB_STATE, b"up")} <= set(device.heard))


def test_no_certificate_is_refused(scene: Scene) -> None:
    context = client_tls(scene.fleet.pem)
    answer = b""
    with contextlib.suppress(OSError):  # TLS 1.3 tells a client only when it reads
        plain = socket.create_connection((scene.broker.host, scene.broker.port), 10)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as stream:
            stream.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04evil")
            answer = stream.recv(4)
    assert answer == b""


def test_another_fleet_is_refused(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    other_home = tmp_path_factory.mktemp("other") / "home"
    other = Fleet(
        other_home,
        create_authority(other_home, "lab", now=time.time(), entropy=os.urandom),
        scene.fleet.own,
    )
    pair = other.device("d-1")
    client = Client(scene.broker, scene.fleet, "d-1", pair)
    scene.cleanup.append(client.link.stop)
    assert not client.up.wait(1.5)
    assert client.downs


def test_a_foreign_client_id_is_only_a_name(scene: Scene, eventually: Eventually) -> None:
    """A device that calls itself by another's id is what its certificate says, and throws nobody off."""
    hub = scene.hub()
    victim = scene.client("d-1", topics.commands("d-1"))
    thief = Client(scene.broker, scene.fleet, "d-1", scene.fleet.device("d-2"))
    scene.cleanup.append(thief.link.stop)
    thief.up.wait(3)
    thief.link.publish(topics.control("d-1"), b"forged")
    thief.link.publish(topics.control("d-2"), b"honest")
    eventually(lambda: (topics.control("d-2"), b"honest") in hub.heard)
    assert (topics.control("d-1"), b"forged") not in hub.heard
    hub.link.publish(topics.commands("d-1"), b"still here?")
    eventually(lambda: victim.heard)
    assert victim.downs == []


def test_other_devices_topics_can_be_neither_written_nor_read(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    victim = scene.client("d-1", topics.commands("d-1"), topics.HUB_STATE, topics.announcement("c"))
    spy = scene.client("d-2", topics.commands("d-2"))
    everything = raw_subscription(
        scene, "d-3", ["#", "fl/v1/d/d-1/dn/#", "fl/v1/d/+/up/#", "fl/v1/d/d-1/state"]
    )
    for topic in (topics.control("d-1"), topics.state("d-1"), topics.commands("d-1"), topics.HUB_STATE):
        spy.link.publish(topic, b"forged", retain=True)
    spy.link.publish(topics.announcement("c"), b"forged")
    victim.link.publish(topics.control("d-1"), b"private")
    victim.link.publish(topics.state("d-1"), b"up", retain=True)
    hub.link.publish(topics.commands("d-1"), b"for d-1 only")
    spy.link.publish(topics.control("d-2"), b"the last word")
    eventually(lambda: (topics.control("d-2"), b"the last word") in hub.heard and victim.heard)
    assert b"forged" not in {payload for _, payload in hub.heard + victim.heard}
    assert spy.heard == []
    assert everything == []


def raw_subscription(scene: Scene, name: str, filters: list[str]) -> list[str]:
    """Topics heard by a client that asks for what it must not have, and does not mind a refusal."""
    pair = scene.fleet.device(name)
    heard: list[str] = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.tls_set_context(client_tls(scene.fleet.pem, pair.certificate, pair.key))
    client.on_message = lambda _c, _u, message: heard.append(message.topic)
    asked = threading.Event()
    client.on_subscribe = lambda *_: asked.set()
    client.connect(scene.broker.host, scene.broker.port)
    client.loop_start()
    scene.cleanup.append(lambda: (client.disconnect(), client.loop_stop())[0] and None)
    client.subscribe([(one, 1) for one in filters])
    assert asked.wait(10)
    return heard


def test_a_returning_client_gets_no_foreign_retained_message(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub("fl/v1/d/+/state", "fl/v1/d/+/up/#")
    scene.client("d-1").link.publish(topics.state("d-1"), b"up", retain=True)
    eventually(lambda: hub.heard)
    first = scene.client("d-2", topics.commands("d-2"))
    first.link.stop()
    second = scene.client("d-2", topics.commands("d-2"))
    hub.link.publish(topics.commands("d-2"), b"end")
    eventually(lambda: (topics.commands("d-2"), b"end") in second.heard)
    assert [topic for topic, _ in second.heard if topic != topics.commands("d-2")] == []


def test_offline_messages_wait(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    away = scene.client("d-1", topics.commands("d-1"))
    away.link.stop()
    for number in range(5):
        hub.link.publish(topics.commands("d-1"), b"%d" % number)
    back = scene.client("d-1", topics.commands("d-1"))
    wanted = {b"%d" % number for number in range(5)}  # at least once each: quality of service 1
    eventually(lambda: {payload for _, payload in back.heard} == wanted)


def test_the_will_is_published(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub(topics.ALL_STATES)
    will = Will(topics.state("d-1"), b"gone")
    vanishing = scene.client("d-1", will=will)
    vanishing.cut()
    eventually(lambda: (topics.state("d-1"), b"gone") in hub.heard)


def test_a_silent_client_is_given_up(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub(topics.ALL_STATES)
    pair = scene.fleet.device("d-1")
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="d-1")
    client.tls_set_context(client_tls(scene.fleet.pem, pair.certificate, pair.key))
    client.will_set(topics.state("d-1"), b"gone", qos=1)
    client.connect(scene.broker.host, scene.broker.port, keepalive=1)
    eventually(lambda: client.loop(0.1) or client.is_connected())
    scene.cleanup.append(lambda: client._sock_close())
    eventually(lambda: (topics.state("d-1"), b"gone") in hub.heard)


def test_a_will_in_anothers_name_is_not_published(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    liar = Client(
        scene.broker, scene.fleet, "d-2", scene.fleet.device("d-2"), will=Will(topics.HUB_STATE, b"forged")
    )
    scene.cleanup.append(liar.link.stop)
    if liar.up.wait(1.5):
        liar.cut()
    honest = scene.client("d-3")
    honest.link.publish(topics.control("d-3"), b"end")
    eventually(lambda: (topics.control("d-3"), b"end") in hub.heard)
    assert b"forged" not in {payload for _, payload in hub.heard}


def test_the_same_client_twice_is_one_client(scene: Scene, eventually: Eventually) -> None:
    """A device comes back before the broker has noticed that it was gone."""
    hub = scene.hub()
    scene.client("d-1", topics.commands("d-1")).link._stopping.set()  # it will not come back by itself
    again = scene.client("d-1", topics.commands("d-1"))
    hub.link.publish(topics.commands("d-1"), b"which one?")
    eventually(lambda: again.heard == [(topics.commands("d-1"), b"which one?")])


def test_an_expelled_device_is_cut_off_and_stays_out(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    bad, good = scene.client("d-1"), scene.client("d-2", topics.commands("d-2"))
    scene.broker.expel(scene.fleet.revoke("d-1"))
    eventually(lambda: bad.downs)
    assert not bad.up.wait(2)
    eventually(lambda: good.up.is_set() and hub.up.is_set())
    hub.link.publish(topics.commands("d-2"), b"still welcome")
    eventually(lambda: good.heard)


def test_a_fresh_revocation_list_disturbs_nobody(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    device = scene.client("d-1")
    scene.fleet.device("d-2")
    scene.fleet.revoke("d-2")
    scene.broker.refresh()
    device.link.publish(topics.control("d-1"), b"still here")
    eventually(lambda: (topics.control("d-1"), b"still here") in hub.heard)
    assert hub.downs == device.downs == []


def test_an_oversize_packet_ends_its_connection_only(scene: Scene, eventually: Eventually) -> None:
    hub = scene.hub()
    big = scene.client("d-1")
    big.link._client.publish(topics.control("d-1"), bytes(300_000), qos=0)
    eventually(lambda: big.downs)
    scene.client("d-2").link.publish(topics.control("d-2"), b"fine")
    eventually(lambda: (topics.control("d-2"), b"fine") in hub.heard)
    assert topics.control("d-1") not in {topic for topic, _ in hub.heard}


def test_a_taken_port_is_named(scene: Scene) -> None:
    setup = dataclasses.replace(scene.setup, folder=scene.fleet.home / "second")
    second = choose_broker(HubConfig(home="/", broker=scene.broker.kind), setup)
    with pytest.raises(UnavailableError) as told:
        second.start()
    assert told.value.field == "mqtt_port"
    assert told.value.value == scene.broker.port
    assert "--mqtt-port" in str(told.value)


@pytest.mark.skipif(not INSTALLED, reason="mosquitto is missing")
def test_a_killed_mosquitto_comes_back(fleet: Fleet, cleanup: Cleanup, eventually: Eventually) -> None:
    scene = Scene("mosquitto", fleet, cleanup)
    hub, device = scene.hub(), scene.client("d-1", topics.commands("d-1"))
    broker = scene.broker
    assert isinstance(broker, Mosquitto)
    assert broker._child is not None
    broker._child.kill()
    eventually(lambda: hub.downs and device.downs)
    eventually(lambda: hub.up.is_set() and device.up.is_set())
    hub.link.publish(topics.commands("d-1"), b"again")
    eventually(lambda: (topics.commands("d-1"), b"again") in device.heard)


@pytest.mark.skipif(not INSTALLED, reason="mosquitto is missing")
def test_an_orphan_of_a_killed_hub_is_ended(fleet: Fleet, cleanup: Cleanup) -> None:
    scene = Scene("mosquitto", fleet, cleanup)
    broker = scene.broker
    assert isinstance(broker, Mosquitto)
    broker.stop()
    program = find_mosquitto()
    assert program is not None
    orphan = subprocess.Popen(
        [program, "-c", scene.setup.folder / "mosquitto.conf"], stderr=subprocess.DEVNULL
    )
    (scene.setup.folder / "mosquitto.pid").write_text(str(orphan.pid))
    threading.Thread(target=orphan.wait, daemon=True).start()  # as init would reap it
    second = Mosquitto(program, scene.setup)
    cleanup.append(second.stop)
    second.start()
    assert orphan.poll() is not None


def test_a_mosquitto_that_fails_says_why(fleet: Fleet) -> None:
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is missing")
    setup = BrokerSetup(
        fleet.home / "broker",
        "127.0.0.1",
        free_port("127.0.0.1"),
        fleet.own.server,
        fleet.home / "no-such",
        fleet.crl,
    )
    with pytest.raises(UnavailableError, match="no-such"):
        Mosquitto(program, setup).start()


def test_a_mosquitto_of_the_future_is_refused(fleet: Fleet) -> None:
    program = fleet.home / "mosquitto"
    program.write_text("#!/bin/sh\necho mosquitto version 3.0.1\nexit 3\n")
    program.chmod(0o755)
    assert _version(program) == (3, 0)
    setup = BrokerSetup(
        fleet.home / "broker", "127.0.0.1", free_port("127.0.0.1"), fleet.own.server, fleet.pem, fleet.crl
    )
    with pytest.raises(UnsupportedError, match="newer"):
        Mosquitto(program, setup).start()


def test_a_foreign_broker_that_is_not_there(fleet: Fleet) -> None:
    broker = ForeignBroker("127.0.0.1", free_port("127.0.0.1"))
    with pytest.raises(UnavailableError, match="no broker at"):
        broker.start()


@pytest.mark.parametrize(
    ("topic", "writes", "reads"),
    [
        ("fl/v1/d/d-1/up/m", True, False),
        ("fl/v1/d/d-1/state", True, False),
        ("fl/v1/d/d-1/dn/cmd", False, True),
        ("fl/v1/d/d-1/dn/#", False, True),
        ("fl/v1/ann/+", False, True),
        ("fl/v1/hub/state", False, True),
        ("fl/v1/d/d-10/up/m", False, False),
        ("fl/v1/d/+/dn/#", False, False),
        ("#", False, False),
        ("fl/v1/#", False, False),
        ("$SYS/#", False, False),
    ],
)
def test_the_rule(topic: str, writes: bool, reads: bool) -> None:
    assert access.may_write("d-1", topic) is writes
    assert access.may_read("d-1", topic) is reads


def test_subscriptions_may_change_while_they_are_walked() -> None:
    """amqtt awaits inside its loops over them; a plain dictionary would raise there and lose the message."""
    subscriptions = _Snapshots({"a": [], "b": []})
    for topic, _ in subscriptions.items():
        subscriptions[topic + topic] = []
    for topic in subscriptions:
        subscriptions[topic + "!"] = []
    assert len(subscriptions) == 8
