"""The broker inside the hub's process: amqtt behind mutual TLS, for machines without mosquitto, up to 300 devices.

amqtt 0.12 leaves six doors open, which are closed here: a client without a certificate gets in; the client id is
believed, and sessions of that id are ended, before anyone is authenticated; a last will is not checked against the
access list; a silent client is never given up; a returning one gets the retained messages of everybody's
subscriptions; and dictionaries are changed while they are walked, which loses messages. So the first packet is read
here, rewritten to what the certificate says, and played to amqtt.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Final

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.errors import AMQTTError, BrokerError, MQTTError, NoDataError
from amqtt.mqtt.connect import ConnectPacket
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from fedge.errors import UnavailableError
from hub import access
from hub.broker import PACKET_BYTES_MAX, BrokerSetup, ensure_free, local_address
from hub.tls import server_tls

_CONNECT_SECONDS: Final = 10.0
_TAKE_OVER_SECONDS: Final = 2.0
_STOP_SECONDS: Final = 10.0
_BROKEN: Final = (AMQTTError, MQTTError, NoDataError, OSError, EOFError, TimeoutError)


class EmbeddedBroker:
    """amqtt in a thread with its own event loop."""

    kind = "embedded"

    def __init__(self, setup: BrokerSetup) -> None:
        self._setup = setup
        self.host, self.port = local_address(setup.bind), setup.port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="broker", daemon=True)
        self._broker: CertifiedBroker | None = None
        self._revoked: frozenset[int] = frozenset()

    def start(self) -> None:
        """Serves. Raises UnavailableError when it cannot."""
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # a traceback for every port scan otherwise
        ensure_free(self._setup.bind, self.port, "mqtt_port")
        self._thread.start()
        self._call(self._serve())

    def stop(self) -> None:
        """Stops serving; what amqtt remembered is gone, as after any restart."""
        if not self._thread.is_alive():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)

    def expel(self, revoked: frozenset[int]) -> None:
        """From now on refuses these X.509 serial numbers, live connections included."""
        self._revoked = revoked
        if self._broker is not None:
            self._call(self._broker.expel(revoked))

    def refresh(self) -> None:
        """The list file is for other brokers; here the numbers themselves are compared."""

    async def _serve(self) -> None:
        bind = f"[{self._setup.bind}]" if ":" in self._setup.bind else self._setup.bind
        listener = {"type": "tcp", "bind": f"{bind}:{self.port}", "ssl": True}
        plugins: dict[str, dict[str, str]] = {f"{__name__}.{plugin}": {} for plugin in ("Known", "Access")}
        self._broker = CertifiedBroker({"listeners": {"default": listener}, "plugins": plugins}, self._setup)
        await self._broker.expel(self._revoked)
        try:
            await self._broker.start()
        except BrokerError as error:
            raise UnavailableError(f"the embedded broker does not start: {error}", field="broker") from error

    async def _end(self) -> None:
        if self._broker is not None:
            await self._broker.shutdown()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _call(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_STOP_SECONDS)


class CertifiedBroker(Broker):  # type: ignore[misc]  # amqtt is untyped here
    """amqtt's broker that knows a client by its certificate and by nothing else."""

    def __init__(self, config: dict[str, object], setup: BrokerSetup) -> None:
        super().__init__(config)
        self._setup = setup
        self._subscriptions = _Snapshots()
        self._serials: dict[str, int] = {}  # of the certificate each connected client has shown
        self._revoked: frozenset[int] = frozenset()

    def _create_ssl_context(self, _listener: object) -> object:
        return server_tls(self._setup.server, clients=self._setup.authority)

    async def expel(self, revoked: frozenset[int]) -> None:
        """Refuses these serial numbers and ends their connections."""
        self._revoked = revoked
        for name, serial in list(self._serials.items()):
            if serial in revoked:
                await self._cleanup_session(name)

    async def _client_connected(self, listener: str, reader: ReaderAdapter, writer: WriterAdapter) -> None:
        try:
            admitted = await asyncio.wait_for(self._admit(reader, writer), _CONNECT_SECONDS)
            if admitted is not None:
                await super()._client_connected(listener, admitted, writer)
                return
        except _BROKEN:
            pass  # the other side broke the protocol or left
        await _close(writer)

    async def _admit(self, reader: ReaderAdapter, writer: WriterAdapter) -> ReaderAdapter | None:
        """The stream from its CONNECT packet on, in the name of the certificate; None when it is refused."""
        shown = writer.get_ssl_info().getpeercert()
        name = dict(pair[0] for pair in shown["subject"])["commonName"]
        serial = int(shown["serialNumber"], 16)
        connect = await ConnectPacket.from_stream(_Bounded(b"", reader, None))
        will_refused = connect.will_flag and not access.may_write(name, connect.will_topic)
        if serial in self._revoked or will_refused:
            return None
        silence = 1.5 * connect.keep_alive or None  # MQTT 3.1.1 section 3.1.2.10
        connect.client_id, connect.keep_alive = name, 0
        await self._end_connection(name)
        self._serials[name] = serial
        return _Bounded(bytes(connect.to_bytes()), reader, silence)

    async def _end_connection(self, name: str) -> None:
        """Ends an older connection of this client and waits for its farewell, which would disturb the new one."""
        session, handler = self._sessions.get(name, (None, None))
        if session is None or not session.transitions.is_connected():
            return
        await handler.handle_connection_closed()
        until = asyncio.get_running_loop().time() + _TAKE_OVER_SECONDS
        while session.transitions.is_connected() and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        members = self._subscriptions.get(subscription[0], [])
        if any(member.client_id == session.client_id for member, _ in members):
            await super()._publish_retained_messages_for_subscription(subscription, session)


class Known(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is untyped here
    """Everyone who comes this far has shown a certificate, and bears its name."""

    async def authenticate(self, *, session: Session) -> bool:
        """True: an authenticated session is one that amqtt keeps while its client is away."""
        session.username = session.client_id
        return True


class Access(BaseTopicPlugin):  # type: ignore[misc]  # amqtt is untyped here
    """The fleet's access list."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool:
        """Whether this session may publish, subscribe to or receive this topic."""
        if session is None or not topic:
            return False
        allowed = access.may_write if action == Action.PUBLISH else access.may_read
        return allowed(str(session.client_id), topic)


class _Snapshots(dict[str, list[tuple[Session, int]]]):
    """Subscriptions that may change while amqtt walks over them."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(self.keys()))

    def items(self) -> list[tuple[str, list[tuple[Session, int]]]]:  # type: ignore[override]  # a copy on purpose
        return [(topic, list(sessions)) for topic, sessions in super().items()]


class _Bounded(ReaderAdapter):  # type: ignore[misc]  # amqtt is untyped here
    """Plays `first`, then the stream; ends it at a packet above the limit or after `silence` seconds of nothing."""

    def __init__(self, first: bytes, rest: ReaderAdapter, silence: float | None) -> None:
        self._first, self._rest, self._silence = first, rest, silence

    async def read(self, n: int = -1) -> bytes:
        """`n` bytes. Raises ConnectionAbortedError, which amqtt does not swallow, as it does its own errors."""
        if not 0 <= n <= PACKET_BYTES_MAX:
            raise ConnectionAbortedError(f"a packet of {n} bytes is too large")
        if self._first:
            head, self._first = self._first[:n], self._first[n:]
            return head
        try:
            async with asyncio.timeout(self._silence):
                return bytes(await self._rest.read(n))
        except TimeoutError as error:
            raise ConnectionAbortedError("the client is silent") from error

    def feed_eof(self) -> None:
        """The other side is gone."""
        self._rest.feed_eof()


async def _close(writer: WriterAdapter) -> None:
    try:
        await writer.close()
    except _BROKEN:
        return
