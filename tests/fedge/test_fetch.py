"""Downloads from a server that cuts, lies, compresses, or shows a login page (field case F22)."""

from __future__ import annotations

import hashlib
import http.server
import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedge.errors import ConfigError, IntegrityError, StorageError, UnavailableError
from fedge.io import durable
from fedge.io.fetch import Fetcher, WrongAnswerError

CONTENT = bytes(range(256)) * 3_000
SHA256 = hashlib.sha256(CONTENT).digest()
SIZE = len(CONTENT)


class Request(http.server.BaseHTTPRequestHandler):
    """Hands each request, with the offset it asks for, to the behaviour under test."""

    behaviour: Callable[[Request, int], None]

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "bytes=0-")
        self.server.asked.append(self.headers.get("Range"))  # type: ignore[attr-defined]
        self.server.behaviour(self, int(asked.removeprefix("bytes=").rstrip("-")))  # type: ignore[attr-defined]

    def answer(self, status: int, body: bytes, sent: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if sent is None else body[:sent])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(behaviour: Callable[[Request, int], None]) -> Iterator[tuple[str, list[str | None]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.behaviour, server.asked = behaviour, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def fetcher(folder: Path, attempts: int = 4) -> Fetcher:
    return Fetcher(folder, None, threading.Event(), attempts=attempts, back_off_seconds=(0.001, 0.01))


def ranged(request: Request, offset: int, content: bytes = CONTENT, sent: int | None = None) -> None:
    if offset:
        text = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        request.answer(206, content[offset:], sent, content_range=text)
    else:
        request.answer(200, content, sent)


def check(folder: Path, got: Path) -> None:
    assert got == folder / SHA256.hex()
    assert got.read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [SHA256.hex()]


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    with serving(ranged) as (url, asked):
        one = fetcher(tmp_path)
        check(tmp_path, one.fetch(url, SHA256, SIZE))
        check(tmp_path, one.fetch(url, SHA256, SIZE))
        assert len(asked) == 1
        assert one.bytes_down == SIZE


def test_cut_after_every_tenth_it_finishes_and_sends_each_byte_once(tmp_path: Path) -> None:
    with serving(lambda request, offset: ranged(request, offset, sent=SIZE // 10)) as (url, asked):
        one = fetcher(tmp_path, attempts=2)
        check(tmp_path, one.fetch(url, SHA256, SIZE))
        assert one.bytes_down == SIZE
        assert len(asked) >= 10


def test_a_new_process_goes_on_where_the_killed_one_was(tmp_path: Path) -> None:
    (tmp_path / f".{SHA256.hex()}.unfinished").write_bytes(CONTENT[:500_000])
    with serving(ranged) as (url, asked):
        one = fetcher(tmp_path)
        check(tmp_path, one.fetch(url, SHA256, SIZE))
        assert asked == ["bytes=500000-"]
        assert one.bytes_down == SIZE - 500_000


def test_range_ignored_the_whole_file_replaces_the_half(tmp_path: Path) -> None:
    (tmp_path / f".{SHA256.hex()}.unfinished").write_bytes(CONTENT[:1_000])
    with serving(lambda request, _: request.answer(200, CONTENT)) as (url, _):
        check(tmp_path, fetcher(tmp_path).fetch(url, SHA256, SIZE))


@pytest.mark.parametrize(
    "text",
    [f"bytes 0-{SIZE - 1}/{SIZE}", f"bytes 1001-{SIZE - 1}/{SIZE}", f"bytes 1000-{SIZE}/{SIZE + 1}", ""],
)
def test_another_range_than_asked_for_is_not_glued_on(tmp_path: Path, text: str) -> None:
    (tmp_path / f".{SHA256.hex()}.unfinished").write_bytes(CONTENT[:1_000])

    def wrong(request: Request, offset: int) -> None:
        if offset:
            request.answer(206, CONTENT[offset:], content_range=text)
        else:
            request.answer(200, CONTENT)

    with serving(wrong) as (url, asked):
        check(tmp_path, fetcher(tmp_path).fetch(url, SHA256, SIZE))
        assert asked == ["bytes=1000-", None]


def test_200_with_only_the_rest_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    (tmp_path / f".{SHA256.hex()}.unfinished").write_bytes(CONTENT[:1_000])
    with serving(lambda request, offset: request.answer(200, CONTENT[offset:])) as (url, _):
        check(tmp_path, fetcher(tmp_path).fetch(url, SHA256, SIZE))


def test_a_file_that_changed_between_two_answers_is_fetched_anew(tmp_path: Path) -> None:
    (tmp_path / f".{SHA256.hex()}.unfinished").write_bytes(bytes(500_000))
    with serving(ranged) as (url, asked):
        check(tmp_path, fetcher(tmp_path).fetch(url, SHA256, SIZE))
        assert asked == ["bytes=500000-", None]


def test_another_file_is_refused_and_leaves_nothing_with_a_name(tmp_path: Path) -> None:
    with (
        serving(lambda request, _: request.answer(200, bytes(SIZE))) as (url, asked),
        pytest.raises(IntegrityError, match="not the announced file"),
    ):
        fetcher(tmp_path).fetch(url, SHA256, SIZE)
    assert len(asked) == 1
    assert not (tmp_path / SHA256.hex()).exists()


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (200, b"<html>log in</html>", {"content_type": "text/html"}, "another size"),
        (200, CONTENT, {"content_type": "text/html; charset=utf-8"}, "web page"),
        (200, CONTENT, {"content_encoding": "gzip"}, "compressed"),
        (302, b"", {"location": "http://login.example"}, "login.example"),
        (511, b"", {}, "HTTP 511"),
        (200, CONTENT + b"x", {}, "another size"),
    ],
)
def test_what_a_portal_or_proxy_does_is_named_and_keeps_the_half(
    tmp_path: Path, status: int, body: bytes, headers: dict[str, str], words: str
) -> None:
    half = tmp_path / f".{SHA256.hex()}.unfinished"
    half.write_bytes(CONTENT[:1_000])
    with (
        serving(lambda request, _: request.answer(status, body, **headers)) as (url, _),
        pytest.raises(WrongAnswerError, match=words) as caught,
    ):
        fetcher(tmp_path).fetch(url, SHA256, SIZE)
    assert "captive portal" in caught.value.hint
    assert half.read_bytes() == CONTENT[:1_000]
    assert not (tmp_path / SHA256.hex()).exists()


def test_an_endless_answer_is_not_read_past_the_announced_size(tmp_path: Path) -> None:
    def endless(request: Request, _: int) -> None:
        request.answer(200, CONTENT + bytes(1_000_000), content_length="")

    with serving(endless) as (url, _):
        one = fetcher(tmp_path)
        check(tmp_path, one.fetch(url, SHA256, SIZE))
        assert one.bytes_down == SIZE


def test_a_server_that_is_not_there_or_lacks_the_file(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="refused"):
        fetcher(tmp_path).fetch("http://127.0.0.1:9", SHA256, SIZE)
    with (
        serving(lambda request, _: request.answer(404, b"")) as (url, asked),
        pytest.raises(UnavailableError, match="does not have"),
    ):
        fetcher(tmp_path, attempts=3).fetch(url, SHA256, SIZE)
    assert len(asked) == 3


def test_a_file_that_does_not_fit_is_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "bytes_free", lambda _: SIZE)
    with serving(ranged) as (url, asked), pytest.raises(StorageError, match="free"):
        fetcher(tmp_path).fetch(url, SHA256, SIZE)
    assert asked == []


def test_without_tls_only_http_and_with_tls_only_https(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="https"):
        fetcher(tmp_path).fetch("https://127.0.0.1:9", SHA256, SIZE)


def test_stopping_ends_a_download(tmp_path: Path) -> None:
    stopping = threading.Event()

    def slow(request: Request, offset: int) -> None:
        stopping.set()
        ranged(request, offset)

    with serving(slow) as (url, _), pytest.raises(UnavailableError, match="stopped"):
        Fetcher(tmp_path, None, stopping).fetch(url, SHA256, SIZE)


def _fetch_in_child(url: str, folder: str, results: multiprocessing.Queue[int]) -> None:
    one = fetcher(Path(folder))
    one.fetch(url, SHA256, SIZE)
    results.put(one.bytes_down)


def test_processes_that_share_a_folder_download_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    requests = itertools.count()

    def slow(request: Request, offset: int) -> None:
        ranged(request, offset, sent=SIZE // 2 if next(requests) == 0 else None)

    with serving(slow) as (url, _):
        children = [
            spawn.Process(target=_fetch_in_child, args=(url, str(tmp_path), results)) for _ in range(3)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0
    assert sorted(results.get() for _ in children) == [0, 0, SIZE]
    assert (tmp_path / SHA256.hex()).read_bytes() == CONTENT
