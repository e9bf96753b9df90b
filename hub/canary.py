"""A canary tries the broker's access list as a device would, at every start of the hub.

An MQTT 3.1.1 broker acknowledges what it throws away, so a wrong access list looks like silence. The canary's words
must reach the hub, the hub's must reach the canary, and what the canary says in another's name must reach nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from fedge import topics
from fedge.errors import UnavailableError
from fedge.io.link import Link, Token
from fedge.io.tls import client_tls
from hub.authority import CANARY, VICTIM, TlsPair

_CONNECT_SECONDS: Final = 20.0
_SECONDS: Final = 5.0  # for one message, there and back, once both are connected


class Canary:
    """One try. `saw` is told what the hub received on the canary's topics."""

    def __init__(self, host: str, port: int, authority_pem: str, pair: TlsPair, nonce: bytes) -> None:
        self._nonce = nonce
        self._up, self._reached_hub, self._reached_canary = (threading.Event() for _ in range(3))
        self._forged = threading.Event()
        self._reason = ""
        self._link = Link(
            host,
            port,
            CANARY,
            client_tls(pair.certificate, pair.certificate, pair.key, pem=authority_pem),
            [topics.receipts(CANARY)],
            on_up=self._up.set,
            on_down=self._down,
            on_message=self._received,
        )

    def saw(self, topic: str, payload: bytes) -> None:
        """The hub received this on the canary's topics, or on those of its victim."""
        if payload == self._nonce:
            (self._reached_hub if topics.device_of(topic) == CANARY else self._forged).set()

    def check(self, publish: Callable[[str, bytes], None]) -> None:
        """Runs the try; `publish` speaks as the hub. Raises UnavailableError saying what does not pass."""
        self._link.start()
        try:
            if not self._up.wait(_CONNECT_SECONDS):
                raise _denied(f"a device cannot connect: {self._reason or 'no answer'}")
            self._link.publish(topics.control(VICTIM), self._nonce)
            self._link.publish(
                topics.control(CANARY), self._nonce
            )  # arrives after the forgery, if that arrives
            if not self._reached_hub.wait(_SECONDS):
                raise _denied(f"the hub never receives what a device publishes on {topics.control('DEVICE')}")
            if self._forged.is_set():
                raise _denied("a device can publish in another device's name")
            publish(topics.receipts(CANARY), self._nonce)
            if not self._reached_canary.wait(_SECONDS):
                raise _denied(
                    f"a device never receives what the hub publishes on {topics.receipts('DEVICE')}"
                )
        finally:
            self._link.stop()

    def _down(self, reason: str) -> None:
        self._reason = reason

    def _received(self, _topic: str, payload: bytes, _token: Token) -> None:
        if payload == self._nonce:
            self._reached_canary.set()


def _denied(what: str) -> UnavailableError:
    return UnavailableError(what, field="broker", hint="Check the broker's access list and its certificates")
