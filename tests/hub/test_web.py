"""HTTPS: files with Range and nothing else, the authority, joining once."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import Fleet
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.authority import fingerprint, p256_key
from fedge.errors import UnavailableError
from fedge.identity import Verifier
from fedge.io.tls import client_tls
from fedge.joining import JoinReply, JoinRequest
from hub.authority import authority_folder, create_authority, own_identity
from hub.blobs import Blobs
from hub.broker import free_port
from hub.registry import Registry
from hub.store import Store
from hub.web import FAILURES_MAX, FailureLimit, WebServer, make_app

Cleanup = list[Callable[[], None]]
Answer = tuple[int, dict[str, str], bytes]


def public_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


class Site:
    """A running HTTPS server and a client that verifies strictly."""

    def __init__(self, fleet: Fleet, cleanup: Cleanup) -> None:
        self.fleet, self.now = fleet, 1_800_000_000.0
        self.store = Store.open(fleet.home / "hub.sqlite")
        self.blobs = Blobs(fleet.home / "blobs")
        self.registry = Registry(self.store, os.urandom)
        app = make_app(self.blobs, fleet.pem.read_bytes(), self._join)
        self.server = WebServer(app, "127.0.0.1", 0, fleet.own.server)
        self.server.start()
        cleanup.append(self.store.close)
        cleanup.append(self.server.stop)

    def _join(self, request: JoinRequest) -> JoinReply:
        return self.registry.join(request, self.fleet.authority, ("broker.example", 8_883), now=self.now)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        tls = client_tls(self.fleet.pem)
        connection = http.client.HTTPSConnection("localhost", self.server.port, timeout=20, context=tls)
        connection.request(method, path, body or None, headers)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def token(self, seconds: float = 60.0) -> bytes:
        return self.registry.new_token(now=self.now, seconds=seconds)

    def join(self, secret: bytes, name: str = "", key: str = "") -> Answer:
        return self.ask("POST", "/v1/join", msgspec.msgpack.encode(request(secret, name, key)))


def request(secret: bytes, name: str = "", key: str = "") -> JoinRequest:
    identity = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    return JoinRequest(secret, key or public_pem(p256_key(os.urandom(48))), identity, name)


def error_of(answer: Answer) -> str:
    return str(msgspec.json.decode(answer[2])["error"])


@pytest.fixture
def site(fleet: Fleet, cleanup: Cleanup) -> Site:
    return Site(fleet, cleanup)


# ---------------------------------------------------------------- files
def test_a_file_by_its_hash(site: Site) -> None:
    data = bytes(range(256)) * 1_000
    ref = site.blobs.put(data)
    status, headers, body = site.ask("GET", f"/b/{ref.sha256.hex()}")
    assert (status, body) == (200, data)
    assert "immutable" in headers["cache-control"]
    assert headers["accept-ranges"] == "bytes"


def test_a_part_of_a_file(site: Site) -> None:
    data = os.urandom(100_000)
    path = f"/b/{site.blobs.put(data).sha256.hex()}"
    status, headers, body = site.ask("GET", path, Range="bytes=70000-")
    assert (status, body) == (206, data[70_000:])
    assert headers["content-range"] == "bytes 70000-99999/100000"
    assert site.ask("GET", path, Range="bytes=10-19")[2] == data[10:20]
    assert site.ask("GET", path, Range="bytes=100000-")[0] == 416


@pytest.mark.parametrize(
    "path",
    [
        "/b/",
        "/b/..",
        "/b/../hub.sqlite",
        "/b/%2e%2e/hub.sqlite",
        "/b/%2e%2e%2fhub.sqlite",
        "/b/..%2fauthority%2froot.key",
        "/b//etc/passwd",
        "/b/%2fetc%2fpasswd",
        "/b/" + "0" * 64,
        "/b/" + "0" * 64 + "%00",
        "/b/" + "0" * 64 + "/..",
        "/authority/root.key",
        "/",
        "/docs",
        "/openapi.json",
    ],
)
def test_nothing_else_is_reachable(site: Site, path: str) -> None:
    status, _, body = site.ask("GET", path)
    assert status == 404
    assert b"PRIVATE" not in body


def test_an_unfinished_file_is_not_served(site: Site) -> None:
    (site.blobs.folder / (".%s.1.0.part" % ("0" * 64))).write_bytes(b"half")
    assert site.ask("GET", "/b/.%s.1.0.part" % ("0" * 64))[0] == 404


def test_other_methods_are_refused(site: Site) -> None:
    assert site.ask("PUT", "/b/" + "0" * 64, b"x")[0] == 405
    assert site.ask("DELETE", "/v1/authority")[0] == 405
    assert site.ask("GET", "/v1/join")[0] == 405


def test_health_and_authority(site: Site) -> None:
    assert site.ask("GET", "/healthz")[2] == b"ok\n"
    status, _, body = site.ask("GET", "/v1/authority")
    assert status == 200
    assert fingerprint(body) == fingerprint(site.fleet.pem.read_bytes())


# ---------------------------------------------------------------- joining
def test_a_token_lets_one_device_join(site: Site) -> None:
    status, _, body = site.join(site.token())
    assert status == 200
    reply = msgspec.msgpack.decode(body, type=JoinReply)
    assert reply.device.startswith("d-")
    assert len(reply.device) == 14
    assert (reply.broker_host, reply.broker_port) == ("broker.example", 8_883)
    leaf = x509.load_pem_x509_certificate(reply.tls_certificate.encode())
    assert leaf.subject.rfc4514_string() == f"CN={reply.device}"
    verifier = Verifier(reply.fleet, reply.root)
    assert verifier.certificate(reply.certificate, role="device", now=site.now).subject == reply.device


def test_a_token_is_good_once(site: Site) -> None:
    secret = site.token()
    assert site.join(secret)[0] == 200
    second = site.join(secret)
    assert (second[0], error_of(second)) == (403, "bad-token")
    assert len(site.registry.devices()) == 1


def test_the_same_request_gets_the_same_answer(site: Site) -> None:
    """The answer was lost on the way: the device asks again, and is not locked out by its own token."""
    body = msgspec.msgpack.encode(request(site.token()))
    assert site.ask("POST", "/v1/join", body)[2] == site.ask("POST", "/v1/join", body)[2]
    assert len(site.registry.devices()) == 1


def test_a_race_for_one_token_has_one_winner(site: Site) -> None:
    secret, statuses = site.token(), list[int]()
    racers = [threading.Thread(target=lambda: statuses.append(site.join(secret)[0])) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(statuses) == [200, 403, 403, 403, 403, 403]


def test_an_expired_token(site: Site) -> None:
    secret = site.token(seconds=10)
    site.now += 11
    assert error_of(site.join(secret)) == "bad-token"


def test_a_guessed_token(site: Site) -> None:
    assert error_of(site.join(os.urandom(20))) == "bad-token"


def test_only_the_hash_of_a_token_is_kept(site: Site) -> None:
    secret = site.token()
    kept = b"".join(path.read_bytes() for path in site.fleet.home.glob("hub.sqlite*"))
    assert secret not in kept


def test_a_name_may_be_asked_for(site: Site) -> None:
    reply = msgspec.msgpack.decode(site.join(site.token(), "kitchen-pi")[2], type=JoinReply)
    assert reply.device == "kitchen-pi"
    secret = site.token()
    assert error_of(site.join(secret, "kitchen-pi")) == "name-taken"
    assert site.join(secret, "attic-pi")[0] == 200  # a refusal does not use the token up


@pytest.mark.parametrize("name", ["hub", "canary", "+", "#", "a/b", "A", "-a", "ä", "a b", "x" * 65, "a\n"])
def test_names_that_would_be_dangerous(site: Site, name: str) -> None:
    assert error_of(site.join(site.token(), name)) == "bad-name"


def test_other_keys_are_refused(site: Site) -> None:
    p384 = public_pem(ec.generate_private_key(ec.SECP384R1()))
    assert error_of(site.join(site.token(), key=p384)) == "bad-key"
    assert error_of(site.join(site.token(), key="-----BEGIN NONSENSE-----")) == "bad-key"


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"{}", b"x" * 5_000, msgspec.msgpack.encode({"secret": b"short"})]
)
def test_nonsense_is_refused(site: Site, body: bytes) -> None:
    status, _, _ = site.ask("POST", "/v1/join", body)
    assert status == 400


def test_a_guesser_has_to_wait(site: Site) -> None:
    for _ in range(FAILURES_MAX):
        assert site.join(os.urandom(20))[0] == 403
    status, headers, _ = site.join(site.token())
    assert status == 429
    assert headers["retry-after"] == "60"


def test_the_wait_ends_and_memory_is_bounded() -> None:
    now = 0.0
    limit = FailureLimit(lambda: now)
    for _ in range(FAILURES_MAX):
        limit.count("a")
    assert limit.blocked("a")
    assert not limit.blocked("b")
    now = 61.0
    assert not limit.blocked("a")
    for number in range(20_000):
        limit.count(str(number))
    assert len(limit._counts) == 10_000


def test_revoking(site: Site) -> None:
    reply = msgspec.msgpack.decode(site.join(site.token(), "d-1")[2], type=JoinReply)
    site.registry.revoke("d-1", now=site.now)
    revoked = site.registry.revoked()
    leaf = x509.load_pem_x509_certificate(reply.tls_certificate.encode())
    assert revoked.tls == {leaf.serial_number}
    with pytest.raises(Exception, match="revoked"):
        Verifier(reply.fleet, reply.root, revoked.fleet).certificate(
            reply.certificate, role="device", now=site.now
        )


# ---------------------------------------------------------------- TLS (strict, by every name)
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "hub.example", "10.1.2.3"])
def test_the_server_is_verified_strictly_by_every_name(fleet: Fleet, cleanup: Cleanup, name: str) -> None:
    fleet.own = own_identity(
        fleet.home, fleet.authority, ("hub.example", "10.1.2.3"), now=time.time(), entropy=os.urandom
    )
    site = Site(fleet, cleanup)
    context = client_tls(fleet.pem)
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", site.server.port), 10) as plain,
        context.wrap_socket(plain, server_hostname=name) as stream,
    ):
        assert stream.version() in ("TLSv1.2", "TLSv1.3")


def test_a_wrong_authority_is_not_trusted(site: Site, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", "lab", now=time.time(), entropy=os.urandom)
    context = client_tls(authority_folder(tmp_path / "other") / "authority.pem")
    with (
        socket.create_connection(("127.0.0.1", site.server.port), 10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname="localhost")


def test_a_taken_port_is_named(fleet: Fleet) -> None:
    port = free_port("127.0.0.1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(UnavailableError, match=str(port)) as told:
            WebServer(
                make_app(Blobs(fleet.home / "blobs"), b"", _no_join), "127.0.0.1", port, fleet.own.server
            )
    assert told.value.field == "https_port"


def _no_join(_: JoinRequest) -> JoinReply:
    raise AssertionError("nobody joins here")
