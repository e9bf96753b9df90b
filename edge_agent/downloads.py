"""What an agent fetches: bundles and adapters, in one thread of their own so that the machine never waits.

Every file lies under its hash; a bundle is a folder `<manifest hash>.bundle` where the same files have the names that
the manifest gives. The folder gets its name when all its files are verified. Several agents may share the blobs.
"""

from __future__ import annotations

import errno
import queue
import shutil
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_agent.effects import FetchBlob, FetchBundle, Fetched, FetchFailed
from fedge.errors import FedgeError, IntegrityError, UnsupportedError
from fedge.io import durable
from fedge.io.fetch import Fetcher
from fedge.limits import MANIFEST_BYTES_MAX
from fedge.messages import Announcement
from fedge.release import MANIFEST, SIGNATURE, open_manifest

_NO_HARD_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_FOR_GOOD: Final = (IntegrityError, UnsupportedError)


class Downloads:
    """Answers each FetchBundle and FetchBlob with one Fetched or FetchFailed, through `report`."""

    def __init__(
        self,
        folder: Path,
        tls: ssl.SSLContext | None,
        report: Callable[[Fetched | FetchFailed], None],
        *,
        private: bool,
    ) -> None:
        self._folder, self._report, self._private = folder, report, private
        self._stopping = threading.Event()
        self._ended = False
        self._fetcher = Fetcher(folder, tls, self._stopping)
        self._wanted: queue.SimpleQueue[FetchBundle | FetchBlob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)

    @property
    def bytes_down(self) -> int:
        """Body bytes received over HTTPS."""
        return self._fetcher.bytes_down

    def start(self) -> None:
        """Begin to serve requests."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way; it resumes at the next start."""
        self._ended = True
        self._stopping.set()
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(1.0)

    def hold(self, held: bool) -> None:
        """While held, what is under way is given up and nothing new is begun; what is here already stays."""
        if held:
            self._stopping.set()
        elif not self._ended:
            self._stopping.clear()

    def want(self, effect: FetchBundle | FetchBlob) -> None:
        """Queue a request."""
        self._wanted.put(effect)

    def bundle(self, manifest: bytes) -> Path:
        """The folder of the bundle with this manifest."""
        return self._folder / f"{manifest.hex()}.bundle"

    def blob(self, sha256: bytes) -> Path:
        """The file of this hash."""
        return self._fetcher.path(sha256)

    def _run(self) -> None:
        while (effect := self._wanted.get()) is not None and not self._ended:
            self._report(self._carry_out(effect))

    def _carry_out(self, effect: FetchBundle | FetchBlob) -> Fetched | FetchFailed:
        ref = effect.ref if isinstance(effect, FetchBlob) else effect.announcement.manifest
        try:
            if isinstance(effect, FetchBlob):
                self._fetcher.fetch(effect.url, ref.sha256, ref.size)
                self._sweep(keep=ref.sha256)
            else:
                self._fetch_bundle(effect.announcement)
        except FedgeError as error:
            return FetchFailed(ref.sha256, str(error), final=isinstance(error, _FOR_GOOD))
        except OSError as error:
            return FetchFailed(ref.sha256, str(durable.storage_error(error, self._folder)))
        return Fetched(ref.sha256)

    def _fetch_bundle(self, announced: Announcement) -> None:
        ref = announced.manifest
        if ref.size > MANIFEST_BYTES_MAX:
            raise IntegrityError("manifest is too large", field="size", value=ref.size)
        path = self._fetcher.fetch(announced.url, ref.sha256, ref.size)
        manifest = open_manifest(
            path.read_bytes(), announced.manifest_signature, publisher=announced.publisher, sha256=ref.sha256
        )
        for entry in manifest.files.values():
            self._fetcher.fetch(announced.url, bytes.fromhex(entry.sha256), entry.size)
        links = {MANIFEST: ref.sha256.hex(), **{name: e.sha256 for name, e in manifest.files.items()}}
        self._link(self.bundle(ref.sha256), links, announced.manifest_signature)

    def _link(self, folder: Path, links: dict[str, str], signature: bytes) -> None:
        if folder.exists():
            return
        part = durable.part_name(folder)
        part.mkdir()
        for name, target in links.items():
            _name(part / name, self._folder / target)
        durable.write_bytes(part / SIGNATURE, signature)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another agent that shares the blobs was quicker
                raise
            shutil.rmtree(part, ignore_errors=True)
        durable.sync_folder(self._folder)

    def _sweep(self, keep: bytes) -> None:
        """Remove the adapters of earlier rounds; shared blobs are left to whoever owns them."""
        if not self._private:
            return
        bundled = {path.stat().st_ino for path in self._folder.glob("*.bundle/*")}
        for path in self._folder.iterdir():
            if not path.is_file() or len(path.name) != 64 or path.name == keep.hex():
                continue
            if path.stat().st_ino not in bundled:
                path.unlink(missing_ok=True)


def _name(path: Path, file: Path) -> None:
    """A second name for `file`, in a folder beside it.

    A hard link, because the runtime opens no weights through a symbolic one when it generates. Where the file system
    has no hard links, the symbolic one does for training, which maps the weights itself.
    """
    try:
        path.hardlink_to(file)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        path.symlink_to(Path("..") / file.name)
