"""A whole hub, assembled: database, certificates, broker, HTTPS, link, machine. What starts last stops first.

One hub per folder (a lock says so). It is ready when a canary has shown that the broker lets through what it must.
SIGTERM and SIGINT end it cleanly: the fleet hears that it is down, the broker saves what it remembers.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from fedge import topics
from fedge.authority import Authority
from fedge.errors import FedgeError, UnavailableError
from fedge.identity import Verifier
from fedge.io.durable import make_folder, storage_error, sweep, write_bytes
from fedge.io.link import Link, Will
from fedge.io.tls import client_tls
from fedge.joining import JoinReply, JoinRequest
from fedge.messages import HubState, encode
from hub.authority import (
    CANARY,
    HUB,
    OwnIdentity,
    authority_folder,
    load_authority,
    own_identity,
    write_revocations,
)
from hub.blobs import Blobs
from hub.broker import Broker, BrokerSetup, choose_broker, free_port
from hub.canary import Canary
from hub.config import HubConfig
from hub.driver import SUBSCRIPTIONS, Clock, Driver
from hub.effects import CampaignRow, Row, Tell
from hub.hub import Hub
from hub.registry import Registry, Revoked
from hub.standing import standing
from hub.store import FILE, Store
from hub.views import StandingFile
from hub.web import WebServer, make_app

LOCK: Final = "hub.lock"
READY: Final = "ready.json"
_REVOCATIONS: Final = "revoked.crl"
_LIST_SECONDS: Final = 86_400.0  # the revocation list is written anew daily; it is valid for thirty days
_QUEUED_MAX: Final = 4_096
_CONNECT_SECONDS: Final = 30.0
_LOCK_ATTEMPTS: Final = 5


class ReadyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a hub that is up says about itself, in one line of JSON."""

    fleet: str
    pid: int
    epoch: int
    url: str
    https_port: int
    broker: str
    broker_host: str
    mqtt_port: int


class HubProcess:
    """Everything a running hub consists of. `run` returns after `stop`, or raises what ended it."""

    def __init__(self, config: HubConfig, store: Store, authority: Authority) -> None:
        self.config, self.store, self.authority = config, store, authority
        home, now = config.folder, time.time()
        self.own: OwnIdentity = own_identity(
            home, authority, config.public_names, now=now, entropy=os.urandom
        )
        self.blobs = Blobs(home / "blobs")
        self.registry = Registry(store, os.urandom)
        self.clock = Clock()
        self.epoch = store.next_epoch()
        self.authority_pem = (authority_folder(home) / "authority.pem").read_bytes()
        self.url = _url(config)
        self._failure: FedgeError | None = None
        self._up, self._link_problem = threading.Event(), ""
        self._revoked = Revoked(frozenset(), frozenset())
        self._fleet_revoked: set[int] = set()  # the machine's verifier looks here
        self._list_written = 0.0
        self.broker: Broker = choose_broker(
            config, self._broker_setup(make_folder(home / "broker", secret=True))
        )
        self.web = WebServer(
            make_app(self.blobs, self.authority_pem, self._join),
            config.bind,
            config.https_port,
            self.own.server,
        )
        self.canary = Canary(
            self.broker.host, self.broker.port, self.authority_pem.decode(), self.own.canary, os.urandom(16)
        )
        machine = Hub(
            HUB,
            self.own.signer,
            Verifier(authority.fleet, authority.root_public, self._fleet_revoked),
            self._rows(),
            self.blobs.read,
            os.urandom,
        )
        self.standing = StandingFile(home, lambda: standing(machine, self.clock()))
        self.driver = Driver(
            machine,
            store,
            self.blobs,
            hub=HUB,
            epoch=self.epoch,
            tell=_tell,
            on_canary=self.canary.saw,
            on_idle=self._now_and_then,
            clock=self.clock,
        )
        self.link = self._make_link()

    def run(self, on_ready: Callable[[ReadyInfo], None]) -> None:
        """Serves until `stop`. Raises UnavailableError or StorageError."""
        with ExitStack() as stack:
            self._watch_revocations()
            stack.callback(self.broker.stop)
            self.broker.start()
            stack.callback(self.web.stop)
            self.web.start()
            stack.callback(self.link.stop)
            self.link.start()
            checking = threading.Thread(target=self._check, args=(on_ready,), name=CANARY, daemon=True)
            checking.start()
            self.driver.run(self.link)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends `run`; safe in a signal handler."""
        self.driver.stop()

    # ------------------------------------------------------------ parts
    def _broker_setup(self, folder: Path) -> BrokerSetup:
        pem = authority_folder(self.config.folder) / "authority.pem"
        return BrokerSetup(
            folder, self.config.bind, self.config.mqtt_port, self.own.server, pem, folder / _REVOCATIONS
        )

    def _make_link(self) -> Link:
        down = encode(HubState(hub=HUB, up=False, epoch=self.epoch))
        pair = self.own.client
        return Link(
            self.broker.host,
            self.broker.port,
            HUB,
            client_tls(pair.certificate, pair.certificate, pair.key, pem=self.authority_pem.decode()),
            SUBSCRIPTIONS,
            Will(topics.HUB_STATE, down),
            on_up=self._link_is_up,
            on_down=self._link_is_down,
            on_message=self.driver.enqueue_message,
            manual_ack=True,
            queued_max=_QUEUED_MAX,
        )

    def _rows(self) -> list[Row]:
        """The saved rows; a campaign follows the hub to a new address, under a newer announcement."""
        rows = self.store.load()
        newest = max((row.sequence for row in rows if isinstance(row, CampaignRow)), default=0)
        moved: list[Row] = []
        for index, row in enumerate(rows):
            if isinstance(row, CampaignRow) and row.url != self.url:
                newest += 1
                rows[index] = msgspec.structs.replace(row, url=self.url, sequence=newest)
                moved.append(rows[index])
        if moved:
            self.store.transaction(moved)
        return rows

    def _join(self, request: JoinRequest) -> JoinReply:
        broker = self.config.foreign_broker or (self.config.address, self.config.mqtt_port)
        reply = self.registry.join(request, self.authority, broker, now=time.time())
        _tell(Tell(f"{reply.device} joined the fleet"))
        return reply

    def _link_is_down(self, reason: str) -> None:
        self._link_problem = reason
        _tell(Tell(reason, "link-down"))

    def _link_is_up(self) -> None:
        self._up.set()
        self.driver.enqueue_up()

    def _check(self, on_ready: Callable[[ReadyInfo], None]) -> None:
        try:
            if not self._up.wait(_CONNECT_SECONDS):
                raise UnavailableError(
                    f"the hub cannot connect to its broker: {self._link_problem or 'no answer'}",
                    field="broker",
                )
            self.canary.check(self.link.publish)
            on_ready(self._ready_info())
        except FedgeError as error:
            self._failure = error
            self.driver.stop()

    def _ready_info(self) -> ReadyInfo:
        host, port = self.config.foreign_broker or (self.config.address, self.config.mqtt_port)
        return ReadyInfo(
            fleet=self.authority.fleet,
            pid=os.getpid(),
            epoch=self.epoch,
            url=self.url,
            https_port=self.web.port,
            broker=self.broker.kind,
            broker_host=host,
            mqtt_port=port,
        )

    def _now_and_then(self) -> None:
        self._watch_revocations()
        self.standing.answer(self.clock())

    def _watch_revocations(self) -> None:
        """Applies what `fedge hub revoke` left in the database, and keeps the list from going out of date."""
        found, now = self.registry.revoked(), time.time()
        changed = found != self._revoked
        if not changed and now - self._list_written < _LIST_SECONDS:
            return
        path = self.config.folder / "broker" / _REVOCATIONS
        write_revocations(path, self.authority, sorted(found.tls), now=now)
        self._fleet_revoked.update(found.fleet)
        self._revoked, self._list_written = found, now
        if changed:
            self.broker.expel(found.tls)
        else:
            self.broker.refresh()


def run_hub(config: HubConfig, on_ready: Callable[[ReadyInfo], None]) -> None:
    """A hub in this process until SIGTERM or SIGINT. Call it from the main thread."""
    with ExitStack() as stack:
        authority = load_authority(config.folder)
        stack.enter_context(_only_hub_in(config.folder))
        for folder in (config.folder, config.folder / "blobs"):
            sweep(folder)
        store = Store.open(config.folder / FILE)
        stack.callback(store.close)
        process = HubProcess(_with_ports(config, store), store, authority)
        store.set_fact("url", process.url)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: process.stop())
        ready_file = config.folder / READY
        ready_file.unlink(missing_ok=True)  # of a hub that was killed
        stack.callback(ready_file.unlink, missing_ok=True)

        def ready(info: ReadyInfo) -> None:
            write_bytes(ready_file, msgspec.json.encode(info) + b"\n")
            on_ready(info)

        process.run(ready)


def is_running(home: Path) -> bool:
    """Whether a hub process holds this folder."""
    try:
        with (home / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _only_hub_in(home: Path) -> Iterator[None]:
    path = home / LOCK
    try:
        lock = path.open("ab")
    except OSError as error:
        raise storage_error(error, path) from error
    with lock:
        if not _locked(lock.fileno()):
            raise UnavailableError(
                "a hub already runs in this folder",
                field="home",
                value=str(home),
                hint="`fedge hub status` shows it; stop it first, or choose another --home",
            )
        yield


def _locked(descriptor: int) -> bool:
    for _ in range(_LOCK_ATTEMPTS):  # `fedge hub status` holds the lock for a moment, too
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def _with_ports(config: HubConfig, store: Store) -> HubConfig:
    """The configuration with real port numbers: a port of 0 is chosen once and remembered."""
    chosen = {}
    for field in ("https_port", "mqtt_port"):
        port = getattr(config, field) or int(store.fact(field) or 0) or free_port(config.bind)
        store.set_fact(field, str(port))
        chosen[field] = port
    return msgspec.structs.replace(config, **chosen)


def _url(config: HubConfig) -> str:
    host = f"[{config.address}]" if ":" in config.address else config.address
    return f"https://{host}:{config.https_port}"


def _tell(line: Tell) -> None:
    refusal = f" [{line.refusal}]" if line.refusal else ""
    print(f"hub: {line.text}{refusal}", file=sys.stderr, flush=True)
