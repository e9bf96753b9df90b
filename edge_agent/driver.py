"""Runs the machine for real: one queue, one loop, one event at a time, its effects carried out in order.

Network, downloads and worker have threads of their own that only put events into the queue. The loop alone touches the
machine and the saved state. A `Save` that fails ends the machine like a power cut would: nothing after it is carried
out, and a new machine starts from what the disk still has, as soon as the disk takes it.
"""

from __future__ import annotations

import os
import queue
import signal
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Final

from edge_agent import effects
from edge_agent.agent import Agent
from edge_agent.clock import Clock
from edge_agent.downloads import Downloads
from edge_agent.effects import Effect, Event
from edge_agent.journal import Journal
from edge_agent.pace import Pace, is_lacking
from edge_agent.policy import load_policy
from edge_agent.resources import measure, memory_is_bounded, memory_of, threads_allowed
from edge_agent.round_files import Rounds
from edge_agent.settings import Settings
from edge_agent.stats import Stats
from edge_agent.surroundings import Surroundings
from edge_agent.work import Work
from edge_agent.worker_process import Reply
from fedge import __version__, topics
from fedge.errors import FedgeError, StorageError
from fedge.io import durable
from fedge.io.link import Link, Will
from fedge.io.tls import client_tls
from fedge.messages import Presence, encode

_STATS_SECONDS: Final = 5.0
_WORKING_SECONDS: Final = 0.5  # how often memory is looked at while the worker lives
_CLOCK_SECONDS: Final = 1.0
_RECOVER_SECONDS: Final = (5.0, 300.0)
_SAME_LINE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class _LinkUp:
    pass


@dataclass(frozen=True, slots=True)
class _LinkDown:
    reason: str


@dataclass(frozen=True, slots=True)
class _WorkerSaid:
    number: int
    reply: Reply


class _Stop:
    pass


_Item = Event | _LinkUp | _LinkDown | _WorkerSaid | _Stop


def run(settings: Settings) -> int:
    """Run the agent until SIGTERM or SIGINT. Raises the FedgeError that keeps it from starting."""
    with settings.home.alone():
        driver = Driver(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, driver.on_signal)
        driver.run()
    return 0


class Driver:
    """One agent and everything around it."""

    def __init__(self, settings: Settings) -> None:
        home = settings.home
        self._identity = home.who()
        self._policy = load_policy(home.policy)
        self._clock = Clock(home.clock, self._identity.valid())
        self._journal = Journal(home.state)
        self._rounds = Rounds(home)
        self._stats = Stats(home.stats)
        facts = measure(settings.data, settings.reading)
        self._surroundings = Surroundings(home, self._policy, facts, self._stats.figures)
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._timers: dict[str, float] = {}
        self._agent: Agent | None = None
        self._link_problem = ""
        self._recover_at = self._look_at = 0.0
        self._recover_seconds = _RECOVER_SECONDS[0]
        self._failure: StorageError | None = None
        self._told: dict[str, float] = {}
        tls = client_tls(home.authority, home.certificate, home.key)
        blobs = settings.blobs or home.blobs
        durable.make_folder(blobs, secret=True)
        durable.sweep(home.folder)
        with suppress(StorageError):  # another agent that shares the blobs sweeps them, too
            durable.sweep(blobs)
        self._downloads = Downloads(blobs, tls, self._inbox.put, private=settings.blobs is None)
        self._work = Work(
            settings,
            self._downloads,
            self._stats,
            threads_allowed(settings.threads, self._policy.threads_max),
            lambda number, reply: self._inbox.put(_WorkerSaid(number, reply)),
            self._policy.memory_mb_max,
        )
        self._boot = self._journal.load().boot + 1
        self._link = self._make_link(tls)

    def _make_link(self, tls: ssl.SSLContext) -> Link:
        device = self._identity.device
        return Link(
            self._identity.broker_host,
            self._identity.broker_port,
            device,
            tls,
            (topics.HUB_STATE, topics.ANNOUNCEMENTS, topics.commands(device), topics.receipts(device)),
            Will(topics.state(device), self._presence(up=False)),
            on_up=lambda: self._inbox.put(_LinkUp()),
            on_down=lambda reason: self._inbox.put(_LinkDown(reason)),
            on_message=lambda topic, payload, _: self._inbox.put(effects.Received(topic, payload)),
        )

    def _presence(self, *, up: bool) -> bytes:
        return encode(Presence(device=self._identity.device, up=up, boot=self._boot, version=__version__))

    # ------------------------------------------------------------ the loop
    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: stop after the event under way."""
        self._inbox.put(_Stop())

    def run(self) -> None:
        """Serve until told to stop."""
        try:
            if self._wait_for_clock():
                self._say_what_is_lacking()
                self._start_machine()
                if self._failure is not None:
                    raise self._failure  # a service that cannot begin says so and ends
                self._stats.look(0)
                self._downloads.start()
                self._link.start()
                self._loop()
        finally:
            self._shut_down()

    def _wait_for_clock(self) -> bool:
        """False when told to stop before the clock was right. Nothing is done or used up while it is not."""
        while not self._clock.is_set():
            self._tell("clock not set yet: waiting for the right time")
            try:
                if isinstance(self._inbox.get(timeout=_CLOCK_SECONDS), _Stop):
                    return False
            except queue.Empty:
                continue
        self._clock.keep(every_seconds=0)
        return True

    def _say_what_is_lacking(self) -> None:
        if self._policy.memory_mb_max and not memory_is_bounded():
            self._tell(
                "the kernel enforces no memory limit here: this agent keeps to memory_mb_max by itself"
            )

    def _loop(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=self._patience())
            except queue.Empty:
                item = None
            if isinstance(item, _Stop):
                return
            if item is not None:
                self._take(item)
            self._fire_timers()
            self._tend()

    def _patience(self) -> float:
        due = min(self._timers.values(), default=float("inf")) - time.monotonic()
        return max(0.0, min(due, _WORKING_SECONDS if self._work.pid else _STATS_SECONDS))

    def _take(self, item: Event | _LinkUp | _LinkDown | _WorkerSaid) -> None:
        if isinstance(item, _LinkUp):
            self._link_problem = ""
            self._tell("connected to the broker")
            self._publish(effects.Publish(topics.state(self._identity.device), self._presence(up=True), True))
            self._handle(effects.Connected())
        elif isinstance(item, _LinkDown):
            self._link_problem = item.reason
            self._surroundings.uplink.cut()
            self._tell(item.reason)
        elif isinstance(item, _WorkerSaid):
            self._worked(self._work.said(item.number, item.reply))
        elif isinstance(item, effects.Fetched):
            self._fetched(item)
        else:
            if isinstance(item, effects.Received) and item.topic == topics.receipts(self._identity.device):
                self._surroundings.uplink.answered(time.monotonic())
            self._handle(item)

    def _fetched(self, event: effects.Fetched) -> None:
        """A bundle is timed before the machine hears of it, so that the first READY has the pace."""
        agent = self._agent
        if agent is None or not is_lacking(agent, event):
            self._handle(event)
        elif agent.allowed:  # otherwise the machine asks for the bundle again as soon as it may work
            self._worked(self._work.gauge(agent.announcement))

    def _worked(self, outcome: Event | Pace | None) -> None:
        if not isinstance(outcome, Pace):
            if outcome is not None:
                self._handle(outcome)
            return
        here = effects.Fetched(outcome.manifest)
        if self._agent is None or not is_lacking(self._agent, here):
            return  # the machine follows another campaign by now
        if outcome.reason:
            self._tell(f"this device's pace is not known before its first round: {outcome.reason}")
        self._surroundings.gauged(outcome.seconds)
        self._write_stats()
        self._look_around()
        self._handle(here)

    def _fire_timers(self) -> None:
        now = time.monotonic()
        for name in [name for name, due in self._timers.items() if due <= now]:
            if self._timers.pop(name, None) is not None:
                self._handle(effects.TimerFired(name))

    def _tend(self) -> None:
        """What is due now and then: memory, the worker's leisure, figures, clock, a new machine."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + (_WORKING_SECONDS if self._work.pid else _STATS_SECONDS)
        self._worked(self._work.keep_to(self._stats.look(self._work.pid)))
        self._work.tend()
        self._clock.keep()
        self._write_stats()
        self._look_around()
        if self._agent is None and now >= self._recover_at:
            self._start_machine()
            if self._agent is not None and self._link.is_up:
                self._take(_LinkUp())

    def _look_around(self) -> None:
        """The machine hears of its conditions when they have changed."""
        agent, pid = self._agent, self._work.pid
        if agent is None:
            return
        found = self._surroundings.look(
            self._clock.now(),
            rounds_spent=agent.state.rounds_opened,
            busy=self._work.busy,
            worker_mb=memory_of(pid).anonymous_kb // 1_024 if pid else 0,
        )
        if found is not None:
            self._downloads.hold(not found.allowed)
            self._work.hold_gauge(not found.allowed)
            self._handle(found)

    # ------------------------------------------------------------ the machine
    def _start_machine(self) -> None:
        try:
            state = self._journal.load()
            who = self._identity
            self._agent = Agent(
                who.device,
                who.signer(),
                who.verifier(),
                self._policy,
                self._surroundings.facts,
                state,
                os.urandom,
            )
            self._rounds.sweep(self._agent.transcript)
        except StorageError as error:
            self._power_cut(error)
        self._handle(effects.Started())
        self._surroundings.forget()
        self._look_around()

    def _handle(self, event: Event) -> None:
        if self._agent is None:
            return
        try:
            for effect in self._agent.handle(self._clock.now(), event):
                _CARRY_OUT[type(effect)](self, effect)
        except StorageError as error:
            self._power_cut(error)

    def _power_cut(self, error: StorageError) -> None:
        """The disk did not take the state: forget this machine; the next one starts from what is saved."""
        self._failure = error
        self._tell(f"{error} Trying again in {self._recover_seconds:.0f} s")
        self._agent = None
        self._work.stop()
        self._timers.clear()
        self._recover_at = time.monotonic() + self._recover_seconds
        self._recover_seconds = min(2 * self._recover_seconds, _RECOVER_SECONDS[1])

    # ------------------------------------------------------------ effects
    def _save(self, effect: effects.Save) -> None:
        self._journal.save(effect.state)
        self._recover_seconds = _RECOVER_SECONDS[0]

    def _publish(self, effect: effects.Publish) -> None:
        if not self._link.is_up:
            return  # the machine says everything again once the link is up
        try:
            self._link.publish(effect.topic, effect.payload, effect.retain)
        except FedgeError as error:
            self._tell(str(error))

    def _send_chunk(self, effect: effects.SendChunk) -> None:
        try:
            frame = self._rounds.frame(effect.transcript, effect.digest, effect.index)
        except StorageError as error:
            self._tell(str(error))
        else:
            self._publish(effects.Publish(effect.topic, frame))
            self._surroundings.uplink.sent(time.monotonic(), len(frame))

    def _begin(self, failed: Event | None) -> None:
        if failed is not None:
            self._inbox.put(failed)

    def _keep_carry(self, effect: effects.KeepCarry) -> None:
        self._rounds.keep_carry(effect.transcript)
        self._round_ended()

    def _drop_carry(self, effect: effects.DropCarry) -> None:
        self._rounds.drop_carry(effect.transcript)
        self._round_ended()

    def _round_ended(self) -> None:
        self._stats.round_ended(self._link.bytes_up)
        self._write_stats()

    # ------------------------------------------------------------ people
    def _tell(self, text: str, refusal: str = "") -> None:
        """A line for the log; the same line not again within a minute."""
        now = time.monotonic()
        self._told = {line: at for line, at in self._told.items() if now - at < _SAME_LINE_SECONDS}
        if text in self._told:
            return
        self._told[text] = now
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        name = f" [{refusal}]" if refusal else ""
        print(f"{stamp} {self._identity.device}: {text}{name}", file=sys.stderr, flush=True)

    def _write_stats(self) -> None:
        figures, agent = self._stats.figures, self._agent
        self._stats.count_bytes(
            self._clock.now(), self._link.bytes_up, self._link.bytes_down, self._downloads.bytes_down
        )
        figures.link_up, figures.problem = self._link.is_up, self._link_problem
        figures.phase = agent.phase.value if agent is not None else "waiting for the disk"
        if agent is not None:
            figures.campaign = agent.announcement.campaign if agent.state.announcement else ""
            figures.rounds_opened = agent.state.rounds_opened
        self._stats.write(self._clock.now())

    def _shut_down(self) -> None:
        self._work.stop()
        self._downloads.stop()
        self._publish(effects.Publish(topics.state(self._identity.device), self._presence(up=False), True))
        self._link.stop()
        self._clock.keep()
        self._write_stats()


_CARRY_OUT: Final[dict[type[Effect], Callable[..., None]]] = {
    effects.Save: Driver._save,
    effects.Publish: Driver._publish,
    effects.SendChunk: Driver._send_chunk,
    effects.FetchBundle: lambda driver, effect: driver._downloads.want(effect),
    effects.FetchBlob: lambda driver, effect: driver._downloads.want(effect),
    effects.Train: lambda driver, effect: driver._begin(driver._work.train(effect)),
    effects.Seal: lambda driver, effect: driver._begin(driver._work.seal(effect)),
    effects.KeepCarry: Driver._keep_carry,
    effects.DropCarry: Driver._drop_carry,
    effects.StopWork: lambda driver, effect: driver._work.stop_for(effect.transcript),
    effects.SetTimer: lambda driver, e: driver._timers.__setitem__(e.name, time.monotonic() + e.seconds),
    effects.CancelTimer: lambda driver, e: driver._timers.pop(e.name, None),
    effects.Tell: lambda driver, e: driver._tell(e.text, e.refusal),
}
