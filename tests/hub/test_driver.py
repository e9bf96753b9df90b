"""The driver's promises: rows before words, acknowledgement last, nothing said when the disk refused."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedge import topics
from fedge.errors import StorageError, UnavailableError
from fedge.io.link import Token
from fedge.messages import BlobRef, HubState, decode
from hub.blobs import Blobs
from hub.driver import Clock, Driver
from hub.effects import (
    CampaignAsked,
    DeviceRow,
    Effect,
    Event,
    LedgerEntry,
    Publish,
    Received,
    Row,
    Save,
    SetTimer,
    Started,
    StoreBlob,
    Tell,
    TimerFired,
)
from hub.store import Store

Eventually = Callable[[Callable[[], object]], None]
UP = topics.control("d-1")


class Echo:
    """A small machine: counts a device's messages, keeps a blob of each, and answers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.count = 0

    def handle(self, now: float, event: Event) -> list[Effect]:
        self.events.append(event)
        match event:
            case Started():
                return [
                    Publish(topics.HUB_STATE, b"up", retain=True),
                    Publish(topics.commands("d-1"), b"hello"),
                ]
            case Received(payload=b"timer"):
                return [SetTimer("t", 5.0), SetTimer("t", 0.01), Tell("a timer")]
            case Received(payload=b"bug"):
                raise ZeroDivisionError
            case Received(payload=payload):
                self.count += 1
                blob = StoreBlob(BlobRef(hashlib.sha256(payload).digest(), len(payload)), payload)
                answer = Publish(topics.commands("d-1"), payload)
                row = Save(DeviceRow(id="d-1", counter=self.count))
                return [answer, row, blob, Save(LedgerEntry(at=now, kind="report"))]
            case CampaignAsked():
                return [Save(event.campaign)]
            case _:
                return []


class Wire:
    """Stands where the link stands, and writes down what happens in which order."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.sent, self.full = log, list[tuple[str, bytes, bool]](), False

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        if self.full:
            raise UnavailableError("too many messages wait")
        self.log.append(f"publish {payload.decode('latin-1')}")
        self.sent.append((topic, payload, retain))

    def acknowledge(self, token: Token) -> None:
        self.log.append(f"ack {token.message}")


class RecordingStore(Store):
    """The real store, with a log, and a disk that may refuse."""

    log: list[str]
    broken = False

    def transaction(self, rows: list[Row], *, taken: int | None = None) -> None:  # type: ignore[override]
        if self.broken:
            raise StorageError("cannot write: No space left on device")
        super().transaction(rows, taken=taken)
        self.log.append("rows")


class RecordingBlobs(Blobs):
    log: list[str]

    def put(self, data: bytes) -> BlobRef:
        ref = super().put(data)
        self.log.append("blob")
        return ref


class Stage:
    """A driver in a thread."""

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        self.machine, self.wire, self.told = Echo(), Wire(self.log), list[Tell]()
        opened = RecordingStore.open(folder / "hub.sqlite")
        assert isinstance(opened, RecordingStore)
        self.store, self.blobs = opened, RecordingBlobs(folder / "blobs")
        self.store.log = self.blobs.log = self.log
        self.canary: list[bytes] = []
        self.error: BaseException | None = None
        self.driver = Driver(
            self.machine,
            self.store,
            self.blobs,
            hub="hub",
            epoch=3,
            tell=self.told.append,
            on_canary=lambda _topic, payload: self.canary.append(payload),
            on_idle=lambda: None,
            clock=Clock(),
        )
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.driver.run(self.wire)
        except BaseException as error:
            self.error = error

    def say(self, payload: bytes, number: int = 1, topic: str = UP) -> None:
        self.driver.enqueue_message(topic, payload, Token(1, number))

    def finish(self) -> None:
        self.driver.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    if made.thread.is_alive():
        made.finish()
    made.store.close()


def test_blob_then_rows_then_words_then_acknowledgement(stage: Stage) -> None:
    stage.say(b"report", 7)
    stage.thread.start()
    stage.finish()
    assert stage.error is None
    assert stage.log[2:6] == ["blob", "rows", "publish report", "ack 7"]
    assert stage.store.load() == [DeviceRow(id="d-1", counter=1)]


def test_nothing_is_said_when_the_disk_refuses(stage: Stage) -> None:
    stage.store.broken = True
    stage.say(b"report", 7)
    stage.thread.start()
    stage.thread.join(10)
    assert isinstance(stage.error, StorageError)
    assert stage.log == ["publish up", "publish hello", "blob"]  # no answer, and above all no acknowledgement


def test_a_bug_is_met_once(stage: Stage) -> None:
    stage.say(b"bug", 9)
    stage.thread.start()
    stage.thread.join(10)
    assert isinstance(stage.error, ZeroDivisionError)
    assert stage.log[-1] == "ack 9"


def test_a_timer_replaces_its_elder(stage: Stage, eventually: Eventually) -> None:
    stage.thread.start()
    stage.say(b"timer")
    eventually(lambda: TimerFired("t") in stage.machine.events)
    stage.finish()
    assert stage.machine.events.count(TimerFired("t")) == 1
    assert stage.told == [Tell("a timer")]


def test_the_inbox_becomes_an_event_once(stage: Stage, eventually: Eventually) -> None:
    from test_store import campaign

    stage.thread.start()
    stage.store.ask(campaign("wanted"))
    eventually(lambda: CampaignAsked(campaign("wanted")) in stage.machine.events)
    eventually(lambda: not stage.store.asked())
    stage.finish()
    assert stage.store.campaigns() == [campaign("wanted")]
    assert stage.machine.events.count(CampaignAsked(campaign("wanted"))) == 1


def test_the_end_is_announced(stage: Stage) -> None:
    stage.thread.start()
    stage.finish()
    topic, payload, retain = stage.wire.sent[-1]
    assert (topic, retain) == (topics.HUB_STATE, True)
    assert decode(payload, HubState) == HubState(hub="hub", up=False, epoch=3)


def test_what_is_retained_is_said_again_after_a_reconnect(stage: Stage) -> None:
    stage.driver.enqueue_up()
    stage.driver.enqueue_up()
    stage.thread.start()
    stage.finish()
    assert [payload for topic, payload, _ in stage.wire.sent if topic == topics.HUB_STATE][:3] == [b"up"] * 3
    assert stage.log.count("publish hello") == 1


def test_a_full_link_loses_nothing_and_keeps_the_order(stage: Stage, eventually: Eventually) -> None:
    stage.wire.full = True
    stage.thread.start()
    stage.say(b"one", 1)
    stage.say(b"two", 2)
    eventually(lambda: "ack 2" in stage.log)
    stage.wire.full = False
    eventually(lambda: len(stage.wire.sent) == 4)
    assert [payload for _, payload, _ in stage.wire.sent] == [b"up", b"hello", b"one", b"two"]


def test_the_canary_is_not_the_machines_business(stage: Stage) -> None:
    stage.say(b"chirp", 4, topics.control("canary"))
    stage.thread.start()
    stage.finish()
    assert stage.canary == [b"chirp"]
    assert stage.machine.events == [Started(3)]
    assert "ack 4" in stage.log


def test_the_clock_never_goes_back() -> None:
    readings = iter([10.0, 9.0, 11.0])
    clock = Clock(lambda: next(readings))
    assert [clock(), clock(), clock()] == [10.0, 10.0, 11.0]
