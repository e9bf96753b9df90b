"""A shaped line keeps bytes and their order; pace and faults are what was asked for. Pace is seen in virtual time."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fedge.io.tls import client_tls
from firmware_sim.processes import shaper as shaping
from firmware_sim.processes.shaper import Line, Pacer, Shaper, chunk_bytes, effective_rate
from firmware_sim.world.streams import Stream
from hub.authority import authority_folder, create_authority, own_identity


class VirtualClock:
    """Time passes only where a line waits, and every wait is counted."""

    def __init__(self) -> None:
        self.seconds, self.waits = 0.0, 0

    def now(self) -> float:
        return self.seconds

    async def until(self, moment: float) -> None:
        self.waits += 1
        self.seconds = max(self.seconds, moment)
        await asyncio.sleep(0)


class Sink:
    """A server that keeps what comes, once `reading` is set, and answers the end with the number of bytes."""

    def __init__(self, *, reading: bool = True) -> None:
        self.received: list[bytearray] = []
        self.reset = threading.Event()
        self.reading = threading.Event()
        if reading:
            self.reading.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.received.append(bytearray())
            threading.Thread(target=self._read, args=(connection, self.received[-1]), daemon=True).start()

    def _read(self, connection: socket.socket, kept: bytearray) -> None:
        with connection:
            self.reading.wait()
            try:
                while data := connection.recv(65_536):
                    kept += data
                connection.sendall(str(len(kept)).encode())
            except ConnectionResetError:
                self.reset.set()

    def close(self) -> None:
        self.reading.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
        self._listener.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


@contextmanager
def shaped(clock: VirtualClock | None = None) -> Iterator[Shaper]:
    shaper = Shaper(seed=3, clock=clock)
    shaper.start()
    try:
        yield shaper
    finally:
        shaper.stop()


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it never became true"
        time.sleep(0.005)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 20)


# ---------------------------------------------------------------- pace, without a network
@pytest.mark.parametrize("rate", [2_000.0, 31_250.0, 1e6, 40e6])
def test_a_pacer_lets_through_what_the_line_carries(rate: float) -> None:
    pacer, line, now, sent = Pacer(Stream(1)), Line(up=rate), 0.0, 0
    for _ in range(400):
        now, arrives = pacer.admit(now, chunk_bytes(rate), line, rate)
        assert arrives == now
        sent += chunk_bytes(rate)
    assert sent / now == pytest.approx(rate, rel=0.2)


def test_an_idle_line_saves_up_no_more_than_its_bucket() -> None:
    pacer, line = Pacer(Stream(1)), Line(up=10_000)
    pacer.admit(0.0, 1_000, line, line.up)
    left, _ = pacer.admit(1_000.0, 10_000, line, line.up)
    assert left == pytest.approx(1_001.0 - shaping.BURST_SECONDS)


def test_jitter_and_loss_delay_but_never_reorder() -> None:
    line = Line(up=1e6, latency=0.1, jitter=0.2, loss=0.05)
    pacer, now, arrivals = Pacer(Stream(1)), 0.0, []
    for _ in range(500):
        now, arrives = pacer.admit(now, 1_460, line, line.up)
        arrivals.append(arrives)
        assert arrives >= now + line.latency
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) < len(arrivals), "something must have waited behind a lost segment"


def test_loss_bounds_what_tcp_gets_out_of_a_line() -> None:
    clean, lossy = Line(latency=0.15), Line(latency=0.15, loss=0.03)
    assert effective_rate(1e6, clean) == 1e6
    assert effective_rate(1e6, lossy) == pytest.approx(1.22 * 1_460 / 0.3 / 0.03**0.5)
    assert effective_rate(0.0, lossy) == effective_rate(1e6, lossy)


# ---------------------------------------------------------------- bytes, over real sockets
@pytest.mark.parametrize("rate", [4_000.0, 1e6, 30e6])
def test_bytes_arrive_whole_in_order_and_at_the_line_s_pace(sink: Sink, rate: float) -> None:
    clock, data = VirtualClock(), os.urandom(int(min(rate * 10, 4e6)))
    with shaped(clock) as shaper:
        port = shaper.lay("d", "127.0.0.1", sink.port, Line(up=rate, down=rate))
        with connect(port) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == str(len(data)).encode()
        assert sink.received == [bytearray(data)]
        counts = shaper.counts("d")
        assert counts.up.taken == counts.up.given == len(data)
    assert clock.seconds == pytest.approx(len(data) / rate - shaping.BURST_SECONDS, rel=0.2)


def test_a_line_with_everything_wrong_with_it_still_delivers_every_byte_in_order(sink: Sink) -> None:
    data, line = os.urandom(500_000), Line(up=8e6, latency=0.002, jitter=0.004, loss=0.0002)
    with shaped() as shaper, connect(shaper.lay("d", "127.0.0.1", sink.port, line)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == str(len(data)).encode()
        assert sink.received == [bytearray(data)]


def test_a_new_rate_holds_for_the_next_chunk_of_an_open_connection(sink: Sink) -> None:
    clock, data = VirtualClock(), bytes(100_000)
    with shaped(clock) as shaper, connect(shaper.lay("d", "127.0.0.1", sink.port, Line(up=20_000))) as client:
        waits = []
        for rate in (20_000.0, 2e6):
            shaper.change("d", up=rate)
            before, arrived = clock.waits, shaper.counts("d").up.given
            client.sendall(data)
            eventually(lambda arrived=arrived: shaper.counts("d").up.given == arrived + len(data))
            waits.append(clock.waits - before)
        assert waits[0] >= 2 * 100_000 / chunk_bytes(20_000.0)  # each chunk leaves, and arrives
        assert waits[1] < waits[0] / 2


def test_a_cut_is_a_reset_on_both_sides_and_the_next_connection_is_served(sink: Sink) -> None:
    with shaped() as shaper:
        port = shaper.lay("d", "127.0.0.1", sink.port, Line())
        with connect(port) as client:
            client.sendall(b"one")
            eventually(lambda: sink.received == [bytearray(b"one")])
            assert shaper.cut("d") == 1
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert sink.reset.wait(20)
        with connect(port) as client:
            client.sendall(b"two")
            eventually(lambda: sink.received[1:] == [bytearray(b"two")])
        counts = shaper.counts("d")
        assert (counts.connections, counts.cuts) == (2, 1)


def test_a_black_hole_keeps_the_connection_and_tells_nobody(sink: Sink) -> None:
    with shaped() as shaper:
        hole = shaper.lay("hole", "127.0.0.1", sink.port, Line())
        other = shaper.lay("other", "127.0.0.1", sink.port, Line())
        with connect(hole) as lost:
            lost.sendall(b"a")
            eventually(lambda: sink.received == [bytearray(b"a")])
            shaper.change("hole", carries="nothing")
            lost.sendall(b"b")
            with connect(hole), connect(other) as client:  # the first of them gets no further than our door
                client.sendall(b"c")
                eventually(lambda: sink.received[1:] == [bytearray(b"c")])
                assert sink.received[0] == b"a"
                assert shaper.counts("hole").up.given == 1
            shaper.change("hole", carries="all")
            eventually(lambda: sink.received[0] == b"ab")


def test_who_was_cut_off_inside_a_black_hole_never_arrives(sink: Sink) -> None:
    with shaped() as shaper:
        port = shaper.lay("d", "127.0.0.1", sink.port, Line(carries="nothing"))
        with connect(port) as lost:
            eventually(lambda: shaper.cut("d"))
            with pytest.raises(ConnectionResetError):
                lost.recv(1)
        shaper.change("d", carries="all")
        with connect(port) as client:
            client.sendall(b"a")
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b"1"
        assert sink.received == [bytearray(b"a")]


def test_a_line_that_goes_down_resets_what_is_open(sink: Sink) -> None:
    with shaped() as shaper, connect(shaper.lay("d", "127.0.0.1", sink.port, Line())) as client:
        client.sendall(b"a")
        eventually(lambda: sink.received == [bytearray(b"a")])
        shaper.change("d", carries="refused")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_refused_line_resets_whoever_connects(sink: Sink) -> None:
    with shaped() as shaper:
        port = shaper.lay("d", "127.0.0.1", sink.port, Line(carries="refused"))
        with pytest.raises(ConnectionResetError), connect(port) as client:
            client.recv(1)
        assert sink.received == []


def test_a_broker_that_is_away_resets_whoever_connects(sink: Sink) -> None:
    with shaped() as shaper:
        port = shaper.lay("d", "127.0.0.1", sink.port, Line())
        sink.close()
        with pytest.raises(ConnectionResetError), connect(port) as client:
            client.recv(1)


def test_a_reader_that_does_not_read_stops_the_writer() -> None:
    sink, data, sent = Sink(reading=False), bytes(48 << 20), 0
    with shaped() as shaper, connect(shaper.lay("d", "127.0.0.1", sink.port, Line(latency=0.001))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        client.setblocking(False)
        blocked = 0
        while blocked < 40 and sent < len(data):  # nothing more was taken in forty looks
            try:
                sent += client.send(data[sent : sent + (1 << 20)])
                blocked = 0
            except BlockingIOError:
                blocked += 1
                time.sleep(0.01)
        most = shaping.FLYING_MAX * shaping.CHUNK_BYTES[1]
        up = shaper.counts("d").up
        assert up.taken - up.given <= most + shaping.CHUNK_BYTES[1]
        assert sent < len(data) // 2
        client.setblocking(True)
        sink.reading.set()
        client.sendall(data[sent:])
        eventually(lambda: sum(map(len, sink.received)) == len(data))
    sink.close()


def test_tls_passes_and_the_far_certificate_is_verified(tmp_path: Path) -> None:
    authority = create_authority(tmp_path, "lab", now=time.time(), entropy=os.urandom)
    own = own_identity(tmp_path, authority, (), now=time.time(), entropy=os.urandom)
    pem = authority_folder(tmp_path) / "authority.pem"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(own.server.certificate, own.server.key)
    server.load_verify_locations(pem)
    server.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listener.accept()[0] as plain, server.wrap_socket(plain, server_side=True) as secure:
            secure.sendall(secure.recv(100)[::-1])

    threading.Thread(target=answer, daemon=True).start()
    client = client_tls(pem, own.client.certificate, own.client.key)
    with shaped() as shaper:
        port = shaper.lay("d", "127.0.0.1", listener.getsockname()[1], Line(latency=0.002))
        with client.wrap_socket(connect(port), server_hostname="127.0.0.1") as secure:
            secure.sendall(b"abc")
            assert secure.recv(100) == b"cba"
    listener.close()
