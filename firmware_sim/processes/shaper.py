"""A slow, late, faulty line for each device: TCP forwarded byte by byte, one listening port a device, no root needed.

Each way of a connection is paced by a token bucket, then travels for its latency in order. TLS passes untouched, so
certificates are verified as ever. What a lossy path does to TCP is modelled by its two effects: a segment that is lost
is sent again after a round trip and everything behind it waits, and throughput falls as Mathis et al. 1997 say
(rate <= 1.22 * segment / (round trip * sqrt(loss))). Memory is bounded: a reader that does not read stops the writer.

`Shaper` runs in a thread of its own with its own event loop; its methods may be called from any other thread, while
traffic flows.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, TypeVar

from fedge.errors import UnavailableError
from firmware_sim.world.streams import Stream

Result = TypeVar("Result")

SEGMENT_BYTES: Final = 1_460  # an Ethernet frame's TCP payload
RETRANSMIT_SECONDS: Final = 0.2  # Linux's smallest retransmission timeout, beside the round trip
BURST_SECONDS: Final = 0.05  # the bucket's depth: what was not used may be caught up within so long
CHUNK_SECONDS: Final = 0.05  # a chunk keeps a line busy for about so long, so that changes show soon
CHUNK_BYTES: Final = (512, 65_536)
FLYING_MAX: Final = 64  # chunks under way each way of a connection
_SOCKET_BYTES: Final = 65_536  # of a kernel's buffer; what lies there is lost with a cut, as in a modem
_READ_AHEAD_BYTES: Final = 16_384
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
_CALL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Line:
    """How a line is now. Bytes a second each way (0 = no bound), seconds one way, loss per segment.

    `carries`: everything; `nothing` (a black hole: connections stay and nobody is told); `refused` (nothing comes
    through and whoever connects is reset).
    """

    up: float = 0.0
    down: float = 0.0
    latency: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    carries: Literal["all", "nothing", "refused"] = "all"


# Measured or usual figures of links that devices have.
LINES: Final[dict[str, Line]] = {
    "ethernet": Line(latency=0.0005),
    "wifi": Line(up=2.5e6, down=5e6, latency=0.01, jitter=0.005, loss=0.001),
    "lte": Line(up=625_000, down=2.5e6, latency=0.03, jitter=0.015, loss=0.0005),
    "3g": Line(up=48_000, down=250_000, latency=0.08, jitter=0.04, loss=0.002),
    "rural": Line(up=31_250, down=31_250, latency=0.15, jitter=0.05, loss=0.002),
    "satellite": Line(up=125_000, down=625_000, latency=0.3, jitter=0.02, loss=0.001),
}


@dataclass(slots=True)
class Carried:
    """Bytes taken in and given out, one way; the difference is under way, or was lost with a cut."""

    taken: int = 0
    given: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """What a line carried since it was laid, how often somebody connected, and how many connections were cut."""

    up: Carried
    down: Carried
    connections: int
    cuts: int


class Clock(Protocol):
    """Time of a line; a test brings its own."""

    def now(self) -> float:
        """Seconds, never going back."""

    async def until(self, moment: float) -> None:
        """Waits for `moment`."""


class WallClock:
    """Real time. Pauses too short to be kept are left out; the bucket accounts for them."""

    def now(self) -> float:
        return time.monotonic()

    async def until(self, moment: float) -> None:
        if (seconds := moment - time.monotonic()) > 0.001:
            await asyncio.sleep(seconds)


class Pacer:
    """One way of one line in time: when a chunk has left, and when it arrives. Decides, and does nothing."""

    __slots__ = ("_arrived", "_free", "_stream")

    def __init__(self, stream: Stream) -> None:
        self._stream, self._free, self._arrived = stream, -math.inf, -math.inf

    def admit(self, now: float, size: int, line: Line, bytes_per_second: float) -> tuple[float, float]:
        """When the last byte of `size` has left, and when it arrives: never before an earlier chunk."""
        rate = effective_rate(bytes_per_second, line)
        self._free = max(self._free, now - BURST_SECONDS)
        if rate:
            self._free += size / rate
        left = max(now, self._free)
        late = line.jitter * self._stream.uniform() if line.jitter else 0.0
        if line.loss and self._stream.chance(1.0 - (1.0 - line.loss) ** math.ceil(size / SEGMENT_BYTES)):
            late += 2 * line.latency + RETRANSMIT_SECONDS
        self._arrived = max(self._arrived, left + line.latency + late)
        return left, self._arrived


def effective_rate(bytes_per_second: float, line: Line) -> float:
    """What TCP gets out of a line in the long run; 0 = no bound (Mathis, Semke, Mahdavi, Ott 1997)."""
    if not line.loss or not line.latency:
        return bytes_per_second
    bound = 1.22 * SEGMENT_BYTES / (2 * line.latency * math.sqrt(line.loss))
    return min(bytes_per_second or bound, bound)


def chunk_bytes(rate: float) -> int:
    """How much is read at a time from a line of `rate` bytes a second."""
    least, most = CHUNK_BYTES
    return max(least, min(most, int(rate * CHUNK_SECONDS))) if rate else most


class Shaper:
    """All lines of a fleet. `start` before anything else, `stop` at the end."""

    def __init__(self, seed: int = 0, clock: Clock | None = None) -> None:
        self._seed, self._clock = seed, clock or WallClock()
        self._lines: dict[str, _Port] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="shaper", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Cuts every line and ends the thread."""
        if not self._thread.is_alive():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)

    def lay(self, name: str, host: str, port: int, line: Line) -> int:
        """Lays a line to `host`:`port`; its port on 127.0.0.1. Raises UnavailableError."""
        return self._call(self._lay(name, host, port, line))

    def line(self, name: str) -> Line:
        """How a line is now."""
        return self._lines[name].line

    def set(self, name: str, line: Line) -> None:
        """From now on the line is like this, also for connections that are open."""
        self._call(self._lines[name].set(line))

    def change(self, name: str, **changes: Any) -> None:
        """`set` with these fields of the line changed."""
        self.set(name, replace(self.line(name), **changes))

    def cut(self, name: str) -> int:
        """Resets the connections that are open; how many. Whoever connects again is served."""
        return self._call(self._lines[name].cut())

    def counts(self, name: str) -> Counts:
        """What the line carried so far."""
        port = self._lines[name]
        return Counts(replace(port.up), replace(port.down), port.connections, port.cuts)

    # ------------------------------------------------------------ the loop's own
    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)

    async def _lay(self, name: str, host: str, port: int, line: Line) -> int:
        self._lines[name] = laid = _Port(host, port, line, self._clock, Stream(self._seed, name, "line"))
        return await laid.listen()

    async def _close(self) -> None:
        for line in self._lines.values():
            await line.close()


class _Port:
    """One device's line: a listening port, how the line is, and the connections on it."""

    def __init__(self, host: str, port: int, line: Line, clock: Clock, stream: Stream) -> None:
        self.line, self.clock = line, clock
        self.up, self.down = Carried(), Carried()
        self.connections = self.cuts = 0
        self._to = host, port
        self._pacers = [Pacer(Stream(stream.word(), way)) for way in ("up", "down")]
        self._carrying = asyncio.Event()
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._server: asyncio.Server | None = None

    async def listen(self) -> int:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)  # connections inherit it
        try:
            listener.bind(("127.0.0.1", 0))
        except OSError as error:
            raise UnavailableError(f"no port for a shaped line: {error.strerror or error}") from error
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=_READ_AHEAD_BYTES)
        await self.set(self.line)
        return int(listener.getsockname()[1])

    async def set(self, line: Line) -> None:
        self.line = line
        if line.carries == "all":
            self._carrying.set()
        else:
            self._carrying.clear()
        if line.carries == "refused":
            await self.cut()

    async def carrying(self) -> Line:
        """The line, as soon as it carries something."""
        await self._carrying.wait()
        return self.line

    async def cut(self) -> int:
        connections = list(self._open.items())
        for task, writers in connections:
            for writer in writers:
                _reset(writer)
            task.cancel()
        self.cuts += len(connections)
        return len(connections)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        serving = list(self._open)
        await self.cut()
        await asyncio.gather(*serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writers = [writer]
        self._open[asyncio.create_task(self._serve(reader, writers))] = writers

    async def _serve(self, reader: asyncio.StreamReader, writers: list[asyncio.StreamWriter]) -> None:
        try:
            await self._forward(reader, writers)
        except* OSError:
            for each in writers:
                _reset(each)
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._open[task]
            for each in writers:
                each.close()

    async def _forward(self, reader: asyncio.StreamReader, writers: list[asyncio.StreamWriter]) -> None:
        if self.line.carries == "refused":
            raise ConnectionResetError
        line = await self.carrying()
        await self.clock.until(self.clock.now() + 2 * line.latency)  # SYN there, SYN-ACK back
        far_reader, far_writer = await asyncio.open_connection(
            sock=await self._connect(), limit=_READ_AHEAD_BYTES
        )
        writers.append(far_writer)
        up, down = self._pacers
        async with asyncio.TaskGroup() as ways:
            ways.create_task(_Way(self, up, self.up, lambda line: line.up).run(reader, far_writer))
            ways.create_task(_Way(self, down, self.down, lambda line: line.down).run(far_reader, writers[0]))

    async def _connect(self) -> socket.socket:
        far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        far.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(far, self._to)
        except OSError:
            far.close()
            raise
        return far


class _Way:
    """Bytes of one connection in one direction: taken in at the line's pace, given out after its latency."""

    def __init__(self, port: _Port, pacer: Pacer, carried: Carried, rate: Callable[[Line], float]) -> None:
        self._port, self._pacer, self._carried, self._rate = port, pacer, carried, rate
        self._flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(FLYING_MAX)

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take(reader))
            both.create_task(self._give(writer))

    async def _take(self, reader: asyncio.StreamReader) -> None:
        clock, data = self._port.clock, b"-"
        while data:
            line = await self._port.carrying()
            data = await reader.read(chunk_bytes(effective_rate(self._rate(line), line)))
            line = await self._port.carrying()
            left, arrives = self._pacer.admit(clock.now(), len(data), line, self._rate(line))
            await clock.until(left)
            self._carried.taken += len(data)
            await self._flying.put((arrives, data))

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        while True:
            arrives, data = await self._flying.get()
            await self._port.clock.until(arrives)
            if not data:
                break
            writer.write(data)
            await writer.drain()
            self._carried.given += len(data)
        with suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes so that the other side sees a reset, not an end."""
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
