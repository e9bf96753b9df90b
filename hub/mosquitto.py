"""A private mosquitto: a child of the hub with a generated configuration, started again when it dies.

It is bound to the hub's life twice: the kernel ends it with us (`setpriv --pdeathsig`), and where that program is
missing, the next start ends the one whose number is in `mosquitto.pid`. Its memory is a cache: retained messages and
queues are saved every few seconds, and hub and devices say again what was lost.

A revocation restarts it, because mosquitto 2.0 applies a new list to new connections only.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedge.errors import UnavailableError, UnsupportedError
from fedge.io.durable import make_folder, write_bytes
from hub import access
from hub.broker import (
    PACKET_BYTES_MAX,
    QUEUED_BYTES_MAX,
    QUEUED_MESSAGES_MAX,
    BrokerSetup,
    ensure_free,
    local_address,
)

_START_SECONDS: Final = 15.0
_STOP_SECONDS: Final = 5.0
_BACK_OFF_SECONDS: Final = (0.2, 10.0)
_STABLE_SECONDS: Final = 10.0
_LOG_BYTES_MAX: Final = 10 * 1024**2


def find_mosquitto() -> Path | None:
    """The program, also where distributions hide it from users' PATH."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


class Mosquitto:
    """One private mosquitto and the thread that keeps it alive."""

    kind = "mosquitto"

    def __init__(self, program: Path, setup: BrokerSetup) -> None:
        self._program, self._setup = program, setup
        self.host, self.port = local_address(setup.bind), setup.port
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="mosquitto", daemon=True)
        self.log = setup.folder / "mosquitto.log"

    def start(self) -> None:
        """Starts the child. Raises UnavailableError, with mosquitto's own words, when it does not serve."""
        folder = make_folder(self._setup.folder, secret=True)
        self._end_orphan()
        ensure_free(self._setup.bind, self.port, "mqtt_port")
        write_bytes(folder / "access.list", access.mosquitto_rules().encode(), secret=True)
        write_bytes(folder / "mosquitto.conf", self._configuration().encode(), secret=True)
        self._thread.start()
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and not self._stopping.is_set():
            self._started.wait(_START_SECONDS)
            with suppress(OSError), socket.create_connection((self.host, self.port), 1):
                return
            if self._child is not None and self._child.poll() is not None:
                break
            time.sleep(0.02)
        self.stop()
        raise UnavailableError(
            f"mosquitto does not start: {self._last_words()}",
            field="broker",
            value=str(self._program),
            hint=f"Its log is {self.log}",
        )

    def stop(self) -> None:
        """Ends the child, after it has saved what it remembers."""
        self._stopping.set()
        self._terminate()
        if self._thread.is_alive():
            self._thread.join(2 * _STOP_SECONDS)
        self._pid_file.unlink(missing_ok=True)

    def expel(self, revoked: frozenset[int]) -> None:
        """The list is on the disk; a restart applies it to live connections, too. Others come back by themselves."""
        self._terminate()

    def refresh(self) -> None:
        """Reads the revocation list again, which has a new date; nobody is disconnected."""
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGHUP)

    # ------------------------------------------------------------ keeping it alive
    def _keep_alive(self) -> None:
        """Runs in its own thread, which is the child's parent in the kernel's eyes: it must outlive the child."""
        first, last = _BACK_OFF_SECONDS
        pause = first
        while not self._stopping.is_set():
            began = time.monotonic()
            self._run_once()
            pause = first if time.monotonic() - began > _STABLE_SECONDS else min(2 * pause, last)
            self._stopping.wait(pause)

    def _run_once(self) -> None:
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES_MAX:
            self.log.replace(self.log.with_suffix(".log.old"))
        command = [*_bound_to_us(), str(self._program), "-c", str(self._setup.folder / "mosquitto.conf")]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603
        self._pid_file.write_text(str(self._child.pid))
        self._started.set()
        if self._stopping.is_set():  # stop() came between the check and the start
            self._child.terminate()
        self._child.wait()

    def _terminate(self) -> None:
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()

    @property
    def _pid_file(self) -> Path:
        return self._setup.folder / "mosquitto.pid"

    def _end_orphan(self) -> None:
        """Ends a child that a killed hub left behind, if the number still belongs to it."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if str(self._setup.folder / "mosquitto.conf").encode() not in command.split(b"\0"):
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + _STOP_SECONDS
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            time.sleep(0.02)

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            lines = []
        errors = [line for line in lines if " Error: " in line]  # OpenSSL's own lines below say less
        return (errors or lines or ["it said nothing"])[-1]

    # ------------------------------------------------------------ configuration
    def _configuration(self) -> str:
        major = _version(self._program)[0]
        if major >= 3:  # acl_file is gone there
            raise UnsupportedError(
                "this mosquitto is newer than fedge knows",
                field="version",
                value=major,
                hint="Use version 2, or set broker = embedded",
            )
        setup, folder = self._setup, self._setup.folder
        lines = [
            f"user {getpass.getuser()}",  # started by root it would become another user and lose its own files
            f"listener {setup.port} {setup.bind}",
            f"cafile {setup.authority}",
            f"certfile {setup.server.certificate}",
            f"keyfile {setup.server.key}",
            f"crlfile {setup.revocations}",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",  # else one device could throw another off by taking its client id
            "allow_anonymous false",
            f"acl_file {folder / 'access.list'}",
            f"max_packet_size {PACKET_BYTES_MAX}",
            "max_inflight_messages 20",
            f"max_queued_messages {QUEUED_MESSAGES_MAX}",
            f"max_queued_bytes {QUEUED_BYTES_MAX}",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_interval 5",
            "persistent_client_expiration 14d",
            "log_dest stderr",
            "log_timestamp_format %Y-%m-%dT%H:%M:%S",
            "log_type error",
            "log_type warning",
            "log_type notice",
        ]
        return "\n".join(lines) + "\n"


def _bound_to_us() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def _version(program: Path) -> tuple[int, int]:
    """Major and minor number, from its help text (`-h`; it has no other way to say it)."""
    told = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    found = re.search(r"mosquitto version (\d+)\.(\d+)", told.stdout + told.stderr)
    return (int(found[1]), int(found[2])) if found else (2, 0)
