"""Files fetched by their hash, over a line that may cut, lie or ask for a login.

The rule: nothing gets its name before its SHA-256 is right, and nothing is opened before it has its name. Bytes are
placed only at an offset that the server has confirmed. A cut costs only what was under way, and an attempt that
moved forward does not count; there is no deadline for the whole.

Several processes may share one folder: a lock on the unfinished file lets one download while the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import random
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from fedge.errors import ConfigError, IntegrityError, UnavailableError
from fedge.io import durable

ATTEMPTS: Final = 6  # in a row without a new byte
_TIMEOUT_SECONDS: Final = 30.0
_BACK_OFF_SECONDS: Final = (0.2, 10.0)
_LOCK_SECONDS: Final = 0.2
_READ_BYTES: Final = 65_536
_RESERVE_BYTES: Final = 16 << 20  # downloads leave this to the rounds' own files
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_PORTAL: Final = "Is there a captive portal or a proxy between this device and its hub?"


class WrongAnswerError(UnavailableError):
    """The server, or something in between, answered with other than what was asked for."""


class Fetcher:
    """Brings blobs from `<url>/b/<sha256>` into `folder`. `stopping` ends all work with UnavailableError."""

    def __init__(
        self,
        folder: Path,
        tls: ssl.SSLContext | None,
        stopping: threading.Event,
        *,
        attempts: int = ATTEMPTS,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        back_off_seconds: tuple[float, float] = _BACK_OFF_SECONDS,
    ) -> None:
        self.folder, self.bytes_down = folder, 0
        self._tls, self._stopping = tls, stopping
        self._attempts, self._timeout, self._back_off = attempts, timeout_seconds, back_off_seconds

    def path(self, sha256: bytes) -> Path:
        """Where this blob lies once it is whole and verified."""
        return self.folder / sha256.hex()

    def fetch(self, url: str, sha256: bytes, size: int) -> Path:
        """The file of this hash and `size` bytes; asks the server at `url` only when it is not here.

        Raises UnavailableError (try later), IntegrityError (downloaded whole, and it is another file), StorageError.
        """
        final = self.path(sha256)
        if final.exists():
            return final
        self._pause(0)
        try:
            with self._lock(final.with_name(f".{final.name}.unfinished"), size) as part:
                if final.exists():  # somebody else was quicker
                    part.path.unlink(missing_ok=True)
                    return final
                durable.ensure_space(self.folder, size - part.offset + _RESERVE_BYTES)
                self._complete(part, f"{url.rstrip('/')}/b/{sha256.hex()}", sha256)
                part.finish(final)
        except OSError as error:
            raise durable.storage_error(error, final, bytes_needed=size) from error
        return final

    @contextmanager
    def _lock(self, path: Path, size: int) -> Iterator[_Unfinished]:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(handle):
                self._pause(_LOCK_SECONDS)
            yield _Unfinished(path, handle, size)
        finally:
            os.close(handle)

    def _complete(self, part: _Unfinished, url: str, sha256: bytes) -> None:
        """Downloads until the whole has the right hash. Bytes of several answers get one more chance as one."""
        while True:
            self._fill(part, url)
            if part.digest() == sha256:
                return
            answers = part.answers
            part.restart()
            if answers == 1:
                raise IntegrityError(
                    "a download is not the announced file",
                    field="url",
                    value=url,
                    hint="Tell the hub's operator",
                )

    def _fill(self, part: _Unfinished, url: str) -> None:
        furthest, failures, resume = part.offset, 0, True
        while part.offset < part.size:
            problem: UnavailableError = UnavailableError("the connection was cut", field="url", value=url)
            try:
                self._ask(part, url, resume)
            except UnavailableError as error:
                problem = error
            # A server that answers a range wrongly is asked for the whole file next.
            resume = not isinstance(problem, WrongAnswerError) or not resume
            failures = 0 if part.offset > furthest else failures + 1
            furthest = max(furthest, part.offset)
            if part.offset < part.size:
                if failures >= self._attempts:
                    raise problem
                self._pause(self._delay(failures))

    def _delay(self, failures: int) -> float:
        first, last = self._back_off
        return random.SystemRandom().uniform(0.0, min(last, first * 2.0**failures))

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise UnavailableError("the download was stopped")

    def _ask(self, part: _Unfinished, url: str, resume: bool) -> None:
        """One request, and whatever of its answer fits at the end of `part`."""
        place = urlsplit(url)
        with closing(self._connect(url)) as connection:
            headers = {"Accept-Encoding": "identity"}
            if resume and part.offset:
                headers["Range"] = f"bytes={part.offset}-"
            with _network(url):
                connection.request("GET", place.path, headers=headers)
                answer = connection.getresponse()
            _begin(part, answer, url)
            while part.offset < part.size:
                with _network(url):
                    data = answer.read1(min(_READ_BYTES, part.size - part.offset))
                if not data:
                    return
                self.bytes_down += len(data)
                part.append(data)
                self._pause(0)

    def _connect(self, url: str) -> http.client.HTTPConnection:
        place = urlsplit(url)
        if place.scheme == "https" and self._tls is not None:
            return http.client.HTTPSConnection(place.netloc, context=self._tls, timeout=self._timeout)
        if place.scheme == "http" and self._tls is None:
            return http.client.HTTPConnection(place.netloc, timeout=self._timeout)
        raise ConfigError("the hub's address must begin with https://", field="url", value=url)


class _Unfinished:
    """The bytes so far, their hash, and how many answers they came from."""

    def __init__(self, path: Path, handle: int, size: int) -> None:
        self.path, self.size = path, size
        self._handle, self._hash = handle, hashlib.sha256()
        self.offset = self.answers = 0
        while data := os.read(handle, 1 << 20):
            self._hash.update(data)
            self.offset += len(data)
            self.answers = 2  # of an earlier process, who knows how many
        if self.offset > size:
            self.restart()

    def restart(self) -> None:
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.ftruncate(self._handle, 0)
        self._hash, self.offset, self.answers = hashlib.sha256(), 0, 0

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.write(self._handle, view)
            self._hash.update(view[:written])
            self.offset += written
            view = view[written:]

    def digest(self) -> bytes:
        return self._hash.digest()

    def finish(self, final: Path) -> None:
        os.fsync(self._handle)
        self.path.replace(final)
        durable.sync_folder(final.parent)


def _begin(part: _Unfinished, answer: http.client.HTTPResponse, url: str) -> None:
    """Checks what the answer claims to be; afterwards its body belongs at `part.offset`."""
    if answer.status == 404:
        raise UnavailableError("the hub does not have this file", field="url", value=url)
    if answer.status == 416:
        part.restart()
    if answer.status not in (200, 206):
        where = answer.getheader("Location")
        what = f"HTTP {answer.status}" + (f", redirected to {where}" if where else "")
        raise WrongAnswerError(f"no download: {what}", field="url", value=url, hint=_PORTAL)
    if (answer.getheader("Content-Encoding") or "identity") != "identity":
        raise WrongAnswerError("the download was compressed on its way", field="url", value=url, hint=_PORTAL)
    if answer.status == 206:
        _check_range(part, answer.getheader("Content-Range") or "", url)
    elif answer.getheader("Content-Length", str(part.size)) != str(part.size):
        raise WrongAnswerError(
            "this is not the file: it has another size",
            field="content_length",
            value=answer.getheader("Content-Length"),
            hint=_PORTAL,
        )
    elif "text/html" in (answer.getheader("Content-Type") or ""):
        raise WrongAnswerError("this is a web page and not the file", field="url", value=url, hint=_PORTAL)
    elif part.offset:
        part.restart()  # the whole file comes, from its beginning
    part.answers += 1


def _check_range(part: _Unfinished, content_range: str, url: str) -> None:
    found = _CONTENT_RANGE.fullmatch(content_range.strip())
    if found is None or int(found[1]) != part.offset or found[2] not in ("*", str(part.size)):
        raise WrongAnswerError(
            f"the server sent another part of the file than asked for: {url}",
            field="content_range",
            value=content_range,
            hint=_PORTAL,
        )


@contextmanager
def _network(url: str) -> Iterator[None]:
    """Tells failures of the network from those of the disk."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise UnavailableError(
            f"the server's certificate is not trusted: {error.verify_message}",
            field="url",
            value=url,
            hint=_PORTAL,
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(
            f"the download broke off: {error or type(error).__name__}", field="url", value=url
        ) from error


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
