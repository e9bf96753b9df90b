"""A fleet on a desk for tests: an authority, a broker with mutual TLS, certificates for whoever is needed."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.enrol import settle
from edge_agent.home import Home, Identity
from fedge.authority import Authority, certificate_pem, key_pem, new_authority, p256_key
from fedge.identity import Signer
from fedge.io.link import Link, Token, Will
from fedge.io.tls import client_tls

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A private mosquitto that can be killed and started again on the same port."""

    def __init__(self, folder: Path, lines: str = "allow_anonymous true\n") -> None:
        self.port = free_port()
        self.config = folder / "mosquitto.conf"
        text = f"listener {self.port} 127.0.0.1\nmax_packet_size 200000\n"
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


class Client:
    """A link whose callbacks land in one queue, in order."""

    def __init__(
        self,
        port: int,
        name: str,
        *topics: str,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        will: Will | None = None,
        manual_ack: bool = False,
        queued_max: int = 256,
    ) -> None:
        self.seen: queue.Queue[tuple[str, str, bytes]] = queue.Queue()
        self.tokens: list[Token] = []
        self.link = Link(
            host,
            port,
            name,
            tls,
            topics,
            will,
            on_up=lambda: self.seen.put(("up", "", b"")),
            on_down=lambda reason: self.seen.put(("down", reason, b"")),
            on_message=self._message,
            manual_ack=manual_ack,
            queued_max=queued_max,
        )

    def _message(self, topic: str, payload: bytes, token: Token) -> None:
        self.tokens.append(token)
        self.seen.put(("message", topic, payload))

    def next(self, seconds: float = 20) -> tuple[str, str, bytes]:
        return self.seen.get(timeout=seconds)

    def __enter__(self) -> Client:
        self.link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()


@dataclass
class Desk:
    """Files of one fleet in a folder."""

    folder: Path
    fleet: str = "lab"
    authority: Authority = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.authority = new_authority(self.fleet, os.urandom(96), now=time.time())
        self.pem.write_bytes(certificate_pem(self.authority.tls_certificate))

    @property
    def pem(self) -> Path:
        return self.folder / "authority.pem"

    def certify(self, name: str, *names: str) -> tuple[Path, Path]:
        """Certificate and key files; a server's when host `names` are given."""
        key = p256_key(os.urandom(48))
        pair = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        pair[0].write_bytes(
            self.authority.certify_tls(name, key.public_key(), serial=2, now=time.time(), names=names)
        )
        pair[1].write_bytes(key_pem(key))
        return pair

    def tls(self, name: str) -> ssl.SSLContext:
        """What the client called `name` connects with."""
        return client_tls(self.pem, *self.certify(name))

    def server_tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.certify("server", "localhost"))
        return context

    def broker(self) -> Broker:
        """Mutual TLS; the certificate's name is the client's."""
        certificate, key = self.certify("server", "localhost")
        return Broker(
            self.folder,
            f"allow_anonymous false\ncafile {self.pem}\ncertfile {certificate}\nkeyfile {key}\n"
            "require_certificate true\nuse_identity_as_username true\nuse_username_as_clientid true\n",
        )

    def signer(self, name: str, role: str, *, now: float | None = None) -> Signer:
        key = Ed25519PrivateKey.from_private_bytes(os.urandom(32))
        certificate = self.authority.certify(
            name,
            role,  # type: ignore[arg-type]
            key.public_key().public_bytes_raw(),
            serial=3,
            now=now or time.time(),
        )
        return Signer(key, certificate)

    def device(self, name: str, broker_port: int, *, url: str = "", now: float | None = None) -> Home:
        """The home of a device that has joined."""
        home = Home(self.folder / f"home-{name}")
        signer = self.signer(name, "device", now=now)
        certificate, key = self.certify(name)
        identity = Identity(
            fleet=self.fleet,
            device=name,
            root=self.authority.root_public,
            certificate=signer.certificate,
            key=signer.key.private_bytes_raw(),
            url=url,
            broker_host="localhost",
            broker_port=broker_port,
        )
        settle(
            home,
            identity,
            tls_key=key.read_bytes(),
            tls_certificate=certificate.read_bytes(),
            authority=self.pem.read_bytes(),
        )
        return home


@contextlib.contextmanager
def serving(desk: Desk, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The hub's HTTPS door for the files of one folder, by hash, and what was asked for at it."""
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.iterdir()}
    asked: list[str] = []

    class Door(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = files[self.path.removeprefix("/b/")].read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
    server.socket = desk.server_tls().wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"https://localhost:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    """Waits until something is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.02)
