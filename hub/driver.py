"""Runs the machine for real: one queue, one thread that calls `handle`, and the order that makes kills harmless.

Of each event: blobs are written, then all its rows in one transaction, then everything else in order, and only then
is the MQTT message acknowledged, so the broker sends again whatever was not committed. When the disk refuses, the
machine's memory is ahead of its rows: the driver stops with that error, and the next start reads the rows.

What is retained at the broker is a copy: after every reconnect it is said again, over the last will that told the
fleet the hub was gone.
"""

from __future__ import annotations

import heapq
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from fedge import topics
from fedge.errors import FedgeError, ProtocolError, UnavailableError
from fedge.io.link import Token
from fedge.messages import HubState, encode
from hub import effects
from hub.authority import CANARY, VICTIM
from hub.blobs import Blobs
from hub.effects import (
    CampaignAsked,
    Effect,
    Event,
    Publish,
    Received,
    Save,
    SetTimer,
    Started,
    StoreBlob,
    Tell,
)
from hub.store import Store

INBOX_SECONDS: Final = 0.5  # how soon a running hub sees what the command line left for it
_WAITING_MAX: Final = 20_000  # messages kept for a broker that is away
SUBSCRIPTIONS: Final = (topics.ALL_UP, topics.ALL_STATES)


class Machine(Protocol):
    """What the driver drives: `hub.hub.Hub`, or a small one in a test."""

    def handle(self, now: float, event: Event) -> list[Effect]:
        """The effects of `event` at Unix time `now`."""


class Carrier(Protocol):
    """What the driver needs of a `fedge.io.link.Link`."""

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Queues a message; raises UnavailableError when too many wait."""

    def acknowledge(self, token: Token) -> None:
        """The broker may forget this message."""


class Clock:
    """Unix seconds that never go back within a process."""

    def __init__(self, read: Callable[[], float] = time.time) -> None:
        self._read, self._last = read, 0.0

    def __call__(self) -> float:
        self._last = max(self._last, self._read())
        return self._last


@dataclass(frozen=True, slots=True)
class _Arrived:
    event: Received
    token: Token


@dataclass(frozen=True, slots=True)
class _Up:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class Driver:
    """Carries out what one machine asks. `enqueue_*` and `stop` may be called from any thread or signal handler."""

    def __init__(
        self,
        machine: Machine,
        store: Store,
        blobs: Blobs,
        *,
        hub: str,
        epoch: int,
        tell: Callable[[Tell], None],
        on_canary: Callable[[str, bytes], None],
        on_idle: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._machine, self._store, self._blobs = machine, store, blobs
        self._hub, self._epoch, self._clock = hub, epoch, clock
        self._tell, self._on_canary, self._on_idle = tell, on_canary, on_idle
        self._queue: queue.SimpleQueue[_Arrived | _Up | _Stop] = queue.SimpleQueue()
        self._link: Carrier | None = None
        self._retained: dict[str, bytes] = {}
        self._waiting: deque[Publish] = deque()
        self._timers: dict[str, float] = {}  # name -> when, on the monotonic clock
        self._heap: list[tuple[float, str]] = []
        self._inbox_at = 0.0

    # ------------------------------------------------------------ from other threads
    def enqueue_message(self, topic: str, payload: bytes, token: Token) -> None:
        """A message arrived."""
        self._queue.put(_Arrived(Received(topic, payload), token))

    def enqueue_up(self) -> None:
        """The link is up (again)."""
        self._queue.put(_Up())

    def stop(self) -> None:
        """Ends `run` after the event under way."""
        self._queue.put(_Stop())

    # ------------------------------------------------------------ the one thread
    def run(self, link: Carrier) -> None:
        """Drives until `stop`. Raises StorageError when the disk refuses: the process must end then."""
        self._link = link
        self._carry_out(Started(self._epoch))
        while True:
            match self._next():
                case _Arrived(event, token):
                    self._arrived(event, token)
                case _Up():
                    self._say_again()
                case _Stop():
                    break
                case None:
                    pass
            self._fire_timers()
            self._look_into_inbox()
            self._send_waiting()
        down = HubState(hub=self._hub, up=False, epoch=self._epoch)
        self._publish(Publish(topics.HUB_STATE, encode(down), retain=True))

    def _next(self) -> _Arrived | _Up | _Stop | None:
        next_timer = self._heap[0][0] if self._heap else float("inf")
        until = min(next_timer, self._inbox_at)
        try:
            return self._queue.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return None

    def _arrived(self, event: Received, token: Token) -> None:
        if topics.device_of(event.topic) in (CANARY, VICTIM):
            self._on_canary(event.topic, event.payload)
            self._acknowledge(token)
            return
        try:
            self._carry_out(event)
        except FedgeError:
            raise  # the disk: the broker keeps the message for the next start
        except Exception:
            self._acknowledge(token)  # a bug of ours: the same message must not meet it at every start
            raise
        self._acknowledge(token)

    def _carry_out(self, event: Event, *, taken: int | None = None) -> None:
        wanted = self._machine.handle(self._clock(), event)
        for effect in wanted:
            if isinstance(effect, StoreBlob):
                self._keep_blob(effect)
        rows = [effect.row for effect in wanted if isinstance(effect, Save)]
        if rows or taken is not None:
            self._store.transaction(rows, taken=taken)
        self._release(wanted)

    def _keep_blob(self, effect: StoreBlob) -> None:
        ref = self._blobs.put(effect.data)
        assert ref == effect.ref, "the machine named bytes by another hash"

    def _release(self, wanted: Iterable[Effect]) -> None:
        for effect in wanted:
            match effect:
                case Publish():
                    self._publish(effect)
                case SetTimer():
                    self._set_timer(effect)
                case Tell():
                    self._tell(effect)
                case _:
                    pass  # rows and blobs are safe by now

    # ------------------------------------------------------------ messages
    def _publish(self, effect: Publish) -> None:
        if effect.retain:
            self._retained[effect.topic] = effect.payload
        self._waiting.append(effect)
        if len(self._waiting) > _WAITING_MAX:
            self._waiting.popleft()
            self._tell(Tell("the broker takes nothing: a message was dropped", "queue-full"))
        self._send_waiting()

    def _send_waiting(self) -> None:
        assert self._link is not None
        while self._waiting:
            effect = self._waiting[0]
            try:
                self._link.publish(effect.topic, effect.payload, effect.retain)
            except UnavailableError:
                return  # the link's own queue is full; later
            except ProtocolError as error:
                self._tell(Tell(str(error), error.name))
            self._waiting.popleft()

    def _say_again(self) -> None:
        for topic, payload in list(self._retained.items()):
            self._publish(Publish(topic, payload, retain=True))

    def _acknowledge(self, token: Token) -> None:
        assert self._link is not None
        self._link.acknowledge(token)

    # ------------------------------------------------------------ time
    def _set_timer(self, effect: SetTimer) -> None:
        at = time.monotonic() + effect.seconds
        self._timers[effect.name] = at
        heapq.heappush(self._heap, (at, effect.name))

    def _fire_timers(self) -> None:
        while self._heap and self._heap[0][0] <= time.monotonic():
            at, name = heapq.heappop(self._heap)
            if self._timers.get(name) == at:  # else it was set anew meanwhile
                del self._timers[name]
                self._carry_out(effects.TimerFired(name))

    def _look_into_inbox(self) -> None:
        if time.monotonic() < self._inbox_at:
            return
        for number, campaign in self._store.asked():
            self._carry_out(CampaignAsked(campaign), taken=number)
        self._on_idle()
        self._inbox_at = time.monotonic() + INBOX_SECONDS
