"""Bundles and adapters by hash: verified, linked as a folder, shared or swept."""

from __future__ import annotations

import errno
import hashlib
import http.server
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from desk import eventually

from edge_agent.downloads import Downloads
from edge_agent.effects import FetchBlob, FetchBundle, Fetched, FetchFailed
from fedge.lora import LoraConfig
from fedge.messages import Announcement, BlobRef, Training
from fedge.release import FORMAT, FileEntry, Manifest, encode_manifest, sign_manifest

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLISHER = KEY.public_key().public_bytes_raw()
FILES = {"weights.bin": bytes(5_000), "tokenizer.json": b"{}"}


class Store:
    """A server of blobs over plain HTTP."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        store = self

        class Door(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = store.blobs.get(self.path.removeprefix("/b/"))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, data: bytes) -> BlobRef:
        digest = hashlib.sha256(data).digest()
        self.blobs[digest.hex()] = data
        return BlobRef(digest, len(data))


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Bench:
    def __init__(self, folder: Path, *, private: bool = True) -> None:
        folder.mkdir(exist_ok=True)
        self.outcomes: queue.Queue[Fetched | FetchFailed] = queue.Queue()
        self.downloads = Downloads(folder, None, self.outcomes.put, private=private)
        self.downloads.start()

    def want(self, effect: FetchBlob | FetchBundle) -> Fetched | FetchFailed:
        self.downloads.want(effect)
        return self.outcomes.get(timeout=30)


def announce(store: Store, **changes: object) -> Announcement:
    """A bundle whose files the store has."""
    entries = {
        name: FileEntry(size=len(data), sha256=store.add(data).sha256.hex()) for name, data in FILES.items()
    }
    lora = LoraConfig(r=8, alpha=16.0, targets=("q_proj",))
    plain = {str: "x", int: 1, bool: True}
    fields = {
        field.name: plain.get(field.type, {})  # type: ignore[arg-type]
        for field in msgspec.structs.fields(Manifest)
        if field.required
    }
    fields |= {"lora": lora, "files": entries, "publisher": PUBLISHER.hex(), "format": FORMAT}
    fields |= {"aux": (), "operators": ()}
    manifest = encode_manifest(msgspec.convert(fields, Manifest))
    made = Announcement(
        campaign="c1",
        hub="hub",
        sequence=1,
        closed=False,
        url=store.url,
        manifest=store.add(manifest),
        manifest_signature=sign_manifest(manifest, KEY),
        publisher=PUBLISHER,
        lora=lora,
        training=Training(),
        adapter=BlobRef(bytes(32), 4),
        adapter_version=0,
    )
    return msgspec.structs.replace(made, **changes)


def test_a_bundle_is_a_folder_of_verified_files(store: Store, tmp_path: Path) -> None:
    bench, said = Bench(tmp_path), announce(store)
    assert bench.want(FetchBundle(said)) == Fetched(said.manifest.sha256)
    folder = bench.downloads.bundle(said.manifest.sha256)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: found[name] for name in FILES} == FILES
    assert found["manifest.sig"] == said.manifest_signature
    assert not any(
        path.is_symlink() for path in folder.iterdir()
    )  # the runtime refuses to generate from them
    weights = bench.downloads.blob(hashlib.sha256(FILES["weights.bin"]).digest())
    assert weights.samefile(folder / "weights.bin")  # nothing lies here twice
    assert bench.want(FetchBundle(said)) == Fetched(said.manifest.sha256)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_bundle_of_another_publisher_or_signature_is_refused_for_good(store: Store, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for changes in ({"publisher": bytes(32)}, {"manifest_signature": bytes(64)}):
        said = announce(store, **changes)
        outcome = bench.want(FetchBundle(said))
        assert isinstance(outcome, FetchFailed)
        assert outcome.final
        assert not bench.downloads.bundle(said.manifest.sha256).exists()


def test_what_is_held_is_given_up_and_goes_on_later(store: Store, tmp_path: Path) -> None:
    bench, said = Bench(tmp_path), announce(store)
    bench.downloads.hold(True)
    outcome = bench.want(FetchBundle(said))
    assert isinstance(outcome, FetchFailed)
    assert not outcome.final
    assert "stopped" in outcome.reason
    bench.downloads.hold(False)
    assert bench.want(FetchBundle(said)) == Fetched(said.manifest.sha256)


def test_a_bundle_that_lacks_a_file_is_tried_again_later(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, said = Bench(tmp_path), announce(store)
    bench.downloads._fetcher._attempts = 1
    weights = store.blobs.pop(hashlib.sha256(FILES["weights.bin"]).hexdigest())
    outcome = bench.want(FetchBundle(said))
    assert isinstance(outcome, FetchFailed)
    assert not outcome.final
    assert "does not have this file" in outcome.reason
    store.add(weights)
    assert bench.want(FetchBundle(said)) == Fetched(said.manifest.sha256)


def test_a_file_system_without_hard_links_has_symbolic_ones(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    bench, said = Bench(tmp_path), announce(store)
    assert bench.want(FetchBundle(said)) == Fetched(said.manifest.sha256)
    bench.want(FetchBlob(store.url, store.add(b"adapter 1")))  # and sweeps
    folder = bench.downloads.bundle(said.manifest.sha256)
    assert (folder / "weights.bin").is_symlink()
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]


@pytest.mark.parametrize("private", [True, False])
def test_earlier_adapters_are_swept_from_private_blobs_and_bundles_are_not(
    store: Store, tmp_path: Path, private: bool
) -> None:
    bench, said = Bench(tmp_path, private=private), announce(store)
    bench.want(FetchBundle(said))
    first, second = store.add(b"adapter 1"), store.add(b"adapter 2")
    for ref in (first, second):
        assert bench.want(FetchBlob(store.url, ref)) == Fetched(ref.sha256)
    assert bench.downloads.blob(second.sha256).read_bytes() == b"adapter 2"
    assert bench.downloads.blob(first.sha256).exists() is not private
    folder = bench.downloads.bundle(said.manifest.sha256)
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert (folder / "manifest.json").exists()
    assert bench.downloads.blob(said.manifest.sha256).exists()


def test_stopping_does_not_wait_for_a_server(store: Store, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.downloads.want(FetchBlob("http://127.0.0.1:9", BlobRef(bytes(32), 4)))
    eventually(lambda: list(tmp_path.glob(".*.unfinished")))
    bench.downloads.stop()
    outcome = bench.outcomes.get(timeout=5)
    assert isinstance(outcome, FetchFailed)
    assert not outcome.final
