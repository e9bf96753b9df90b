"""Joining over real TLS: the pin, refusals, lost answers, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from desk import Desk

from edge_agent import enrol
from edge_agent.effects import AgentState
from edge_agent.home import Home
from edge_agent.journal import Journal
from edge_agent.policy import Policy, load_policy
from fedge.authority import fingerprint
from fedge.errors import (
    FedgeError,
    IntegrityError,
    ProtocolError,
    StorageError,
    UnavailableError,
    UsageError,
)
from fedge.io import durable
from fedge.io.tls import client_tls
from fedge.joining import JoinReply, JoinRequest, JoinToken

Answer = tuple[int, bytes]


class Office:
    """A hub's HTTPS door with just the two routes that joining needs. `answers` changes what the second one says."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.requests = desk, list[JoinRequest]()
        self.answer: Callable[[JoinRequest], Answer | None] = lambda request: (200, self.reply(request))
        office = self

        class Door(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say(200, desk.pem.read_bytes())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                office.requests.append(msgspec.msgpack.decode(body, type=JoinRequest))
                found = office.answer(office.requests[-1])
                if found is None:
                    self.close_connection = True
                else:
                    self.say(*found)

            def say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.server.socket = desk.server_tls().wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def token(self, pin: bytes | None = None, host: str = "localhost") -> str:
        url = f"https://{host}:{self.server.server_address[1]}"
        return JoinToken(url, pin or fingerprint(self.desk.pem.read_bytes()), bytes(20)).text()

    def reply(self, request: JoinRequest, **changes: object) -> bytes:
        now = time.time()
        authority = self.desk.authority
        made = JoinReply(
            fleet="lab",
            device="dev-1",
            root=authority.root_public,
            tls_certificate=authority.certify_tls(
                "dev-1",
                load_pem_public_key(request.tls_key.encode()),  # type: ignore[arg-type]
                serial=5,
                now=now,
            ).decode(),
            certificate=authority.certify("dev-1", "device", request.identity_key, serial=6, now=now),
            broker_host="localhost",
            broker_port=8_883,
        )
        return msgspec.msgpack.encode(msgspec.structs.replace(made, **changes))


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(Desk(tmp_path / "desk"))
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def refused(error: type[FedgeError], office: Office, home: Home, token: str = "") -> FedgeError:
    with pytest.raises(error) as caught:
        enrol.enroll(token or office.token(), home)
    assert [path for path in home.folder.rglob("*") if path.is_file()] == []
    return caught.value


def test_a_device_joins_and_everything_it_needs_is_in_its_home(office: Office, home: Home) -> None:
    identity = enrol.enroll(office.token(), home, name="kitchen")
    assert identity == home.who()
    assert (identity.device, identity.broker_host, identity.broker_port) == ("dev-1", "localhost", 8_883)
    assert office.requests[0].name == "kitchen"
    assert Journal(home.state).load() == AgentState()
    assert load_policy(home.policy) == Policy()
    client_tls(home.authority, home.certificate, home.key)  # they fit together
    assert home.key.stat().st_mode & 0o777 == home.identity.stat().st_mode & 0o777 == 0o600


def test_private_keys_never_travel(office: Office, home: Home) -> None:
    identity = enrol.enroll(office.token(), home)
    sent = msgspec.msgpack.encode(office.requests[0])
    assert identity.key not in sent
    assert b"PRIVATE" not in sent


def test_every_device_makes_other_keys(office: Office, home: Home, tmp_path: Path) -> None:
    enrol.enroll(office.token(), home)
    enrol.enroll(office.token(), Home(tmp_path / "second"))
    assert len({request.identity_key for request in office.requests}) == 2
    assert len({request.tls_key for request in office.requests}) == 2


def test_the_owners_policy_is_not_overwritten(office: Office, home: Home) -> None:
    home.create()
    home.policy.write_text("bloc_devices_min = 9\n")
    enrol.enroll(office.token(), home)
    assert load_policy(home.policy).bloc_devices_min == 9


def test_a_hub_with_another_authority_never_hears_the_secret(office: Office, home: Home) -> None:
    error = refused(IntegrityError, office, home, office.token(pin=hashlib.sha256(b"other").digest()))
    assert "not the hub" in str(error)
    assert office.requests == []


def test_a_server_with_another_name_never_hears_the_secret(office: Office, home: Home) -> None:
    refused(IntegrityError, office, home, office.token(host="127.0.0.1"))
    assert office.requests == []


def test_a_second_identity_is_not_put_over_the_first(office: Office, home: Home) -> None:
    first = enrol.enroll(office.token(), home)
    with pytest.raises(UsageError, match="already"):
        enrol.enroll(office.token(), home)
    assert home.who() == first


def test_a_used_token_is_refused_by_the_hubs_own_name_for_it(office: Office, home: Home) -> None:
    office.answer = lambda _: (403, b'{"error": "bad-token", "what": "token is used up"}')
    error = refused(ProtocolError, office, home)
    assert isinstance(error, ProtocolError)
    assert error.name == "bad-token"
    assert "used up" in str(error)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_in_trouble_may_be_asked_again(office: Office, home: Home, status: int) -> None:
    office.answer = lambda _: (status, b"<html>busy</html>")
    refused(UnavailableError, office, home)


def test_a_lost_answer_is_asked_for_again_with_the_same_request(
    office: Office, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrol.time, "sleep", lambda _: None)
    answers: list[Answer | None] = [None, None]
    office.answer = lambda request: answers.pop() if answers else (200, office.reply(request))
    enrol.enroll(office.token(), home)
    assert len(office.requests) == 3
    assert office.requests[0] == office.requests[1] == office.requests[2]


@pytest.mark.parametrize(
    "what", ["nonsense", "cut", "other-root", "other-key", "other-name", "other-tls", "no-tls"]
)
def test_an_answer_that_does_not_hold_is_not_kept(office: Office, home: Home, what: str) -> None:
    authority = office.desk.authority
    now = time.time()

    def wrong(request: JoinRequest) -> bytes:
        strange = authority.certify("dev-1", "device", os.urandom(32), serial=7, now=now)
        other_tls = office.desk.certify("dev-2")[0].read_text()
        return {
            "nonsense": b"hello",
            "cut": office.reply(request)[:-10],
            "other-root": office.reply(request, root=os.urandom(32)),
            "other-key": office.reply(request, certificate=strange),
            "other-name": office.reply(request, device="dev-9"),
            "other-tls": office.reply(request, tls_certificate=other_tls),
            "no-tls": office.reply(request, tls_certificate="hello"),
        }[what]

    office.answer = lambda request: (200, wrong(request))
    refused(FedgeError, office, home)


def test_a_full_disk_is_noticed_before_the_token_is_used_up(
    office: Office, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "bytes_free", lambda _: 4_096)
    refused(StorageError, office, home)
    assert office.requests == []


@pytest.mark.parametrize("fails_at", range(6))
def test_a_disk_that_fails_at_any_file_leaves_nothing(
    office: Office, home: Home, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    real, calls = durable.write_bytes, iter(range(100))

    def failing(path: Path, data: bytes, *, secret: bool = False) -> None:
        if next(calls) == fails_at:
            raise StorageError("cannot write")
        real(path, data, secret=secret)

    monkeypatch.setattr(durable, "write_bytes", failing)
    refused(StorageError, office, home)


def test_no_token_and_no_hub(office: Office, home: Home) -> None:
    assert "fedge hub token" in str(refused(ProtocolError, office, home, "fedge1.AAAA"))
    refused(UnavailableError, office, home, JoinToken("https://localhost:9", bytes(32), bytes(20)).text())
    refused(ProtocolError, office, home, JoinToken("http://localhost:9", bytes(32), bytes(20)).text())
