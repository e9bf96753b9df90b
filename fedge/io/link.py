"""The link to the broker: the only user of paho-mqtt, with its known traps closed.

MQTT 3.1.1, quality of service 1, no clean session. What paho leaves open is closed here:

- it reconnects without jitter, so a restarted broker would meet the whole fleet at once: full-jitter back-off here
  (Brooker, "Exponential Backoff And Jitter", 2015);
- a message above the broker's limit makes it reconnect for ever and blocks everything behind it: refused before it
  is queued;
- its queue has no bound and its own loop uses select(), which fails silently above file number 1023: bounded here,
  and driven by poll().

Callbacks come from one network thread, between `start` and `stop`, and must only enqueue. `on_up` (connected and
subscribed) and `on_down` (with a reason in plain words) come once for each change, and `on_up` comes before any
message of that connection. A PUBACK says that the broker has a message, not that the other side has it.
"""

from __future__ import annotations

import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from paho.mqtt import client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fedge import limits
from fedge.errors import ProtocolError, UnavailableError

KEEPALIVE_SECONDS: Final = 30
IN_FLIGHT: Final = 8
_QUEUED_MAX: Final = 256  # messages that wait for a connection or a PUBACK
_BACK_OFF_SECONDS: Final = (0.2, 30.0)
_STABLE_SECONDS: Final = 5.0  # a connection that lasted so long starts the back-off anew
_CONNECT_SECONDS: Final = 10.0
_FLUSH_SECONDS: Final = 2.0
_POLL_MILLISECONDS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, for a client that vanished."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Token:
    """Names a received message for `acknowledge`; good for the connection it came on and no other."""

    connection: int
    message: int


OnMessage = Callable[[str, bytes, Token], None]


class Link:
    """One client of one broker. Keeps trying until `stop`."""

    def __init__(
        self,
        host: str,
        port: int,
        client_id: str,
        tls: ssl.SSLContext | None,
        subscriptions: Sequence[str],
        will: Will | None = None,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: OnMessage,
        manual_ack: bool = False,
        queued_max: int = _QUEUED_MAX,
    ) -> None:
        self._host, self._port, self._subscriptions = host, port, list(subscriptions)
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self.bytes_up = self.bytes_down = 0  # payload bytes, each message once
        self._unconfirmed = 0
        self._count_lock = threading.Lock()
        self._connection = 0
        self._up_since: float | None = None
        self._told_down = False
        self._problem = ""
        self._early: list[tuple[str, bytes, Token]] = []
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._client = self._make_client(client_id, tls, will, manual_ack, queued_max)
        self._thread = threading.Thread(target=self._run, name=f"link {client_id}", daemon=True)

    @property
    def is_up(self) -> bool:
        """Whether the link is connected and subscribed right now."""
        return self._up_since is not None

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Wait briefly for what is under way, disconnect cleanly (no will is sent) and end the thread."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self.is_up and self._unconfirmed and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stopping.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(_FLUSH_SECONDS + _CONNECT_SECONDS)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Queue a message; it survives reconnects of this process, not its end.

        Raises ProtocolError `oversize`, and UnavailableError when too many messages wait already.
        """
        if len(payload) > limits.FRAME_BYTES_HARD_MAX:
            raise ProtocolError(
                "oversize", f"message for {topic} is too large", field="bytes", value=len(payload)
            )
        with self._count_lock:
            self._unconfirmed += 1
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            self._confirm()
            raise UnavailableError(
                "too many messages wait for the broker",
                field="topic",
                value=topic,
                hint=self._problem or "is the broker slow?",
            )
        self.bytes_up += len(payload)

    def acknowledge(self, token: Token) -> None:
        """With `manual_ack`: this message is dealt with, the broker may forget it.

        A token of an earlier connection is ignored: the broker sends that message again, and its number may by
        now belong to another one.
        """
        if token.connection == self._connection:
            self._client.ack(token.message, 1)

    # ------------------------------------------------------------ network thread
    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            attempt = 0 if self._session() >= _STABLE_SECONDS else attempt + 1
            self._stopping.wait(_back_off(attempt))
        self._wake_read.close()

    def _session(self) -> float:
        """One attempt to connect and what comes of it; returns for how many seconds the link was up."""
        self._problem = "connection lost"
        try:
            self._client.connect(self._host, self._port, KEEPALIVE_SECONDS)
            self._pump()
        except OSError as error:
            self._problem = _plain(error)
        seconds = 0.0 if self._up_since is None else time.monotonic() - self._up_since
        self._up_since = None
        self._early.clear()
        if not self._told_down and not self._stopping.is_set():
            self._told_down = True
            self._on_down(f"broker {self._host}:{self._port}: {self._problem}")
        return seconds

    def _pump(self) -> None:
        """Moves bytes until the socket is closed, by either side."""
        client, deadline = self._client, 0.0
        while (sock := client.socket()) is not None:
            if self._stopping.is_set() and not deadline:
                deadline = time.monotonic() + _FLUSH_SECONDS
                client.disconnect()
            if deadline and time.monotonic() > deadline:
                return  # the other side takes nothing any more, not even our farewell
            readable = self._wait(sock)
            if readable:
                client.loop_read()
            if client.want_write():
                client.loop_write()
            client.loop_misc()

    def _wait(self, sock: mqtt.SocketLike) -> bool:
        """Sleeps until there is something to do; whether `sock` can be read."""
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True  # already decrypted: poll() would not see it
        poll = select.poll()
        poll.register(sock, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        poll.register(self._wake_read, select.POLLIN)
        ready = dict(poll.poll(_POLL_MILLISECONDS))
        if self._wake_read.fileno() in ready:
            self._wake_read.recv(4_096)
        return bool(ready.get(sock.fileno(), 0) & ~select.POLLOUT)

    def _wake(self) -> None:
        with suppress(OSError):  # full: it is awake already
            self._wake_write.send(b"\0")

    # ------------------------------------------------------------ paho's callbacks
    def _make_client(
        self, client_id: str, tls: ssl.SSLContext | None, will: Will | None, manual_ack: bool, queued_max: int
    ) -> mqtt.Client:
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            protocol=mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        client.connect_timeout = _CONNECT_SECONDS
        client.max_inflight_messages_set(IN_FLIGHT)
        client.max_queued_messages_set(queued_max)
        if tls is not None:
            client.tls_set_context(tls)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_publish = lambda *_: self._confirm()
        client.on_message = self._received
        client.on_socket_open = _without_delay
        client.on_socket_register_write = lambda *_: self._wake()
        return client

    def _connected(
        self, _c: mqtt.Client, _u: object, _f: mqtt.ConnectFlags, code: ReasonCode, _p: Properties | None
    ) -> None:
        if code.is_failure:
            self._problem = f"refused: {code}"
            return
        self._connection += 1
        if self._subscriptions:
            self._client.subscribe([(topic, 1) for topic in self._subscriptions])
        else:
            self._is_up_now()

    def _subscribed(
        self, _c: mqtt.Client, _u: object, _m: int, codes: list[ReasonCode], _p: Properties | None
    ) -> None:
        refused = [topic for topic, code in zip(self._subscriptions, codes, strict=False) if code.is_failure]
        if refused:
            self._problem = f"subscription to {refused[0]} refused"
            self._client.disconnect()
        else:
            self._is_up_now()

    def _is_up_now(self) -> None:
        self._up_since, self._told_down = time.monotonic(), False
        self._on_up()
        early, self._early = self._early, []
        for message in early:
            self._on_message(*message)

    def _received(self, _c: mqtt.Client, _u: object, message: mqtt.MQTTMessage) -> None:
        token = Token(self._connection, message.mid)
        self.bytes_down += len(message.payload)
        try:
            arrived = (message.topic, bytes(message.payload), token)
        except UnicodeDecodeError:  # no topic of ours: nobody would know what to do with it
            return self.acknowledge(token)
        if self._up_since is None:
            self._early.append(arrived)
        else:
            self._on_message(*arrived)

    def _confirm(self) -> None:
        with self._count_lock:
            self._unconfirmed -= 1


def _without_delay(_c: mqtt.Client, _u: object, sock: mqtt.SocketLike) -> None:
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _back_off(attempt: int) -> float:
    """Full jitter: anything between nothing and an exponentially growing bound."""
    first, last = _BACK_OFF_SECONDS
    return random.SystemRandom().uniform(0.0, min(last, first * 2.0 ** min(attempt, 16)))


def _plain(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)
