"""A whole fleet as processes on this machine: one hub, one broker, N agents, nothing shared that a network would not.

Every device has its own folder, keys, certificate and data, joins with its own token over HTTPS, and talks to the hub
over mTLS, exactly as `fedge hub up` and `fedge agent run` do. What one machine has once is shared on purpose: the
bundle's files (content-addressed, verified by each), and as many training slots as there are cores.

With a `line`, each device reaches the broker through a line of its own (`firmware_sim.processes.shaper`). Downloads
over HTTPS take the straight way: their address is in the signed announcement, the same for all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from edge_agent.enrol import enroll
from edge_agent.home import Home
from edge_agent.stats import Figures
from fedge.errors import UnavailableError
from fedge.io import durable
from firmware_sim.processes.cgroups import Cgroups
from firmware_sim.processes.shaper import Line, Shaper
from firmware_sim.processes.supervisor import Supervisor
from hub import commands
from hub.campaigns import Wish
from hub.effects import BlocRow, CampaignRow, LedgerEntry
from hub.server import ReadyInfo
from hub.store import FILE, Store

Found = TypeVar("Found")

HUB: Final = "hub"
READY_SECONDS: Final = 60.0
TOKEN_MINUTES: Final = 60.0
LINGER_SECONDS: Final = 120.0  # a worker waits this long for its next round; others train meanwhile


class LocalFleet:
    """The hub and devices below `folder`; `data` maps each device's name to its private file.

    `line` is how every device's line to the broker begins, None = no lines; `cgroups` bounds every agent.
    """

    def __init__(
        self,
        folder: Path,
        data: Mapping[str, Path],
        *,
        broker: str = "auto",
        slots: int = 0,
        line: Line | None = None,
        cgroups: Cgroups | None = None,
        seed: int = 0,
    ) -> None:
        self.folder, self.data, self.broker = folder, dict(data), broker
        self.line, self.cgroups = line, cgroups
        self.shaper = Shaper(seed) if line is not None else None
        self.slots = slots or len(os.sched_getaffinity(0))
        self.hub_home = folder / HUB
        self.supervisor = Supervisor(folder / "logs")
        self._seen = 0
        self._broker_port = 0

    def home(self, device: str) -> Home:
        """Where a device keeps what is its own."""
        return Home(self.folder / "devices" / device)

    # ------------------------------------------------------------ hub
    def start_hub(self) -> ReadyInfo:
        """Creates the hub if there is none, and starts it. UnavailableError when it does not come up."""
        if not (self.hub_home / FILE).exists():
            commands.create(self.hub_home, "demo")
        ready = self.folder / "hub-ready.json"
        ready.unlink(missing_ok=True)
        flags = ("--bind", "127.0.0.1", "--port", "0", "--mqtt-port", "0", "--broker", self.broker)
        hub = [sys.executable, "-m", "hub", "up", "--home", str(self.hub_home), *flags]
        child = self.supervisor.add(HUB, [*hub, "--ready-file", str(ready)])
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if not child.running or time.monotonic() > deadline:
                raise UnavailableError(
                    f"the hub did not come up: {child.tail()}", field="log", value=str(child.log)
                )
            time.sleep(0.05)
        info = msgspec.json.decode(ready.read_bytes(), type=ReadyInfo)
        self._broker_port = info.mqtt_port
        return info

    def start_campaign(self, bundle: Path, wish: Wish) -> None:
        """Starts the campaign, unless it was started before."""
        known = {row.id for row in self._read(Store.campaigns)}
        if wish.name not in known and wish.name not in {row.id for _, row in self._read(Store.asked)}:
            commands.new_campaign(self.hub_home, bundle, wish)

    # ------------------------------------------------------------ devices
    def enroll(self, progress: Callable[[int], None]) -> None:
        """Every device that has not joined yet joins with a token of its own."""
        new = [device for device in self.data if not self.home(device).identity.exists()]
        tokens = commands.new_tokens(self.hub_home, len(new), TOKEN_MINUTES)
        progress(len(self.data) - len(new))
        for device, token in zip(new, tokens, strict=True):
            enroll(token, self.home(device), name=device)
            progress(1)

    def start_agents(self) -> None:
        """Starts one agent process for each device, at the end of its line where there are lines."""
        if self.shaper is not None:
            self.shaper.start()
        for device, data in self.data.items():
            self._show_broker(device)
            born = self.cgroups.bound(device) if self.cgroups is not None else None
            self.supervisor.add(device, self._agent_command(device, data), born)

    def _show_broker(self, device: str) -> None:
        """Writes into the device's identity where it finds the broker: itself, or its own line's near end."""
        home, port = self.home(device), self._broker_port
        if self.shaper is not None and self.line is not None:
            port = self.shaper.lay(device, "127.0.0.1", port, self.line)
        identity = home.who()
        if identity.broker_port != port:
            moved = msgspec.structs.replace(identity, broker_port=port)
            durable.write_bytes(home.identity, msgspec.json.encode(moved), secret=True)

    def _agent_command(self, device: str, data: Path) -> list[str]:
        shared = ["--blobs", str(self.folder / "blobs"), "--slots", str(self.folder / "slots")]
        return [
            *(sys.executable, "-m", "edge_agent", "run", "--home", str(self.home(device).folder)),
            *("--data", str(data), "--threads", "1", "--linger", f"{LINGER_SECONDS:g}"),
            *(*shared, "--slot-count", str(self.slots)),
        ]

    def figures(self) -> dict[str, Figures]:
        """What each agent says about itself."""
        found = {}
        for device in self.data:
            try:
                found[device] = msgspec.json.decode(self.home(device).stats.read_bytes(), type=Figures)
            except (OSError, msgspec.MsgspecError):
                found[device] = Figures()
        return found

    # ------------------------------------------------------------ what the hub knows
    def look(self) -> list[LedgerEntry]:
        """New entries of the hub's ledger; restarts processes that died."""
        self.supervisor.look()
        entries = self._read(lambda store: store.entries(self._seen))
        if entries:
            self._seen = entries[-1][0]
        return [entry for _, entry in entries]

    def campaign(self, name: str) -> CampaignRow | None:
        """The campaign as the hub has it."""
        return next((row for row in self._read(Store.campaigns) if row.id == name), None)

    def blocs(self) -> list[BlocRow]:
        """The blocs that were formed."""
        return [row for row in self._read(Store.load) if isinstance(row, BlocRow)]

    def _read(self, ask: Callable[[Store], Found]) -> Found:
        store = Store.open(self.hub_home / FILE, read_only=True)
        try:
            return ask(store)
        finally:
            store.close()

    def stop(self) -> None:
        """Stops agents first, then their lines, then the hub."""
        self.supervisor.stop([name for name in self.supervisor.children if name != HUB])
        if self.shaper is not None:
            self.shaper.stop()
        self.supervisor.stop()
        if self.cgroups is not None:
            self.cgroups.remove()
