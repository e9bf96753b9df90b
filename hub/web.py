"""HTTPS: files by their hash, the authority's certificate, and joining. There are no other doors.

`GET /b/<sha256>` serves content-addressed files with Range (RFC 9110 section 14) and lets everybody cache them for
ever; a name is 64 hexadecimal digits, so no request leaves the folder. `GET /v1/authority` is what a join token pins.
`POST /v1/join` takes a `fedge.joining.JoinRequest` as msgpack and answers a JoinReply as msgpack; who guesses tokens is
made to wait. `GET /healthz` says that the process answers.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedge.errors import ProtocolError, StorageError, UnavailableError
from fedge.joining import JoinReply, JoinRequest
from hub.authority import TlsPair
from hub.blobs import Blobs
from hub.broker import listen
from hub.tls import server_tls

JOIN_BYTES_MAX: Final = 4_096
FAILURES_MAX: Final = 10  # refused joins of one address within the window
FAILURE_WINDOW_SECONDS: Final = 60.0
_ADDRESSES_MAX: Final = 10_000
_CONNECTIONS_MAX: Final = 2_000
_START_SECONDS: Final = 15.0
_STOP_SECONDS: Final = 5.0

_FOREVER: Final = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "X-Content-Type-Options": "nosniff",
}
_STATUS: Final = {"bad-token": 403, "name-taken": 409, "bad-name": 400, "bad-key": 400}

Join = Callable[[JoinRequest], JoinReply]


class FailureLimit:
    """Counts refused requests by address, within a window, in bounded memory."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def blocked(self, address: str) -> bool:
        """Whether this address has to wait."""
        since, count = self._counts.get(address, (0.0, 0))
        return count >= FAILURES_MAX and self._clock() - since < FAILURE_WINDOW_SECONDS

    def count(self, address: str) -> None:
        """One refusal more."""
        since, count = self._counts.pop(address, (self._clock(), 0))
        if self._clock() - since >= FAILURE_WINDOW_SECONDS:
            since, count = self._clock(), 0
        self._counts[address] = since, count + 1
        if len(self._counts) > _ADDRESSES_MAX:
            self._counts.popitem(last=False)


def make_app(
    blobs: Blobs, authority_pem: bytes, join: Join, clock: Callable[[], float] = time.monotonic
) -> Starlette:
    """The application: four routes and nothing else."""
    failures = FailureLimit(clock)

    async def blob(request: Request) -> Response:
        name: str = request.path_params["name"]
        path = blobs.path(name)
        if path is None:
            return _refusal(404, "not-found", "no such file")
        return FileResponse(
            path, media_type="application/octet-stream", headers={**_FOREVER, "ETag": f'"{name}"'}
        )

    async def authority(_request: Request) -> Response:
        return Response(authority_pem, media_type="application/x-pem-file")

    async def joining(request: Request) -> Response:
        address = request.client.host if request.client else ""
        if failures.blocked(address):
            return _refusal(
                429, "too-many", "too many refused requests", retry_seconds=FAILURE_WINDOW_SECONDS
            )
        try:
            body = await _body(request)
            wanted = msgspec.msgpack.decode(body, type=JoinRequest)
            reply = await run_in_threadpool(join, wanted)
        except ProtocolError as error:
            failures.count(address)
            return _refusal(_STATUS.get(error.name, 400), error.name, str(error))
        except (msgspec.MsgspecError, ValueError) as error:
            failures.count(address)
            return _refusal(400, "malformed", str(error))
        except StorageError:
            return _refusal(503, "storage", "the hub cannot write to its disk")
        return Response(msgspec.msgpack.encode(reply), media_type="application/msgpack")

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    return Starlette(
        routes=[
            Route("/b/{name}", blob, methods=["GET"]),
            Route("/v1/authority", authority, methods=["GET"]),
            Route("/v1/join", joining, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
        ]
    )


class WebServer:
    """uvicorn in a thread, on a socket that was bound before it started."""

    def __init__(self, app: Starlette, bind: str, port: int, pair: TlsPair) -> None:
        self._listener = listen(bind, port, "https_port")
        self.port = int(self._listener.getsockname()[1])
        context = server_tls(pair)
        config = uvicorn.Config(
            app,
            ssl_context_factory=lambda _config, _default: context,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # an address that the client chooses would defeat the failure limit
            lifespan="off",
            ws="none",
            limit_concurrency=_CONNECTIONS_MAX,
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="https", daemon=True)

    def start(self) -> None:
        """Serves; returns when requests are accepted. Raises UnavailableError when the server does not start."""
        self._thread.start()
        until = time.monotonic() + _START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        if not self._server.started:
            self.stop()
            raise UnavailableError("the HTTPS server does not start", field="https_port", value=self.port)

    def stop(self) -> None:
        """Stops serving; running downloads have two seconds and resume elsewhere."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        self._listener.close()

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])


async def _body(request: Request) -> bytes:
    """The request's body, refused before it is read when it is too large."""
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > JOIN_BYTES_MAX:
                raise ProtocolError("oversize", "request is too large", field="bytes", value=len(body))
    except ClientDisconnect as error:
        raise ProtocolError("malformed", "the client left") from error
    return bytes(body)


def _refusal(status: int, name: str, text: str, *, retry_seconds: float = 0.0) -> Response:
    headers = {"Retry-After": f"{retry_seconds:.0f}"} if retry_seconds else None
    body = msgspec.json.encode({"error": name, "what": text})
    return Response(body, status, headers, "application/json")
