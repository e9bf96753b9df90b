"""Small worlds for tests, and what one must have ended with: worked out from the devices' own words, without a hub."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_agent.effects import Save as DeviceSave
from edge_agent.effects import Seal
from fedge.messages import Open, decode, decode_envelope
from fedge.update import codec as coding
from firmware_sim.scenario import Campaign, Group, LinkKind, Presence, Scenario
from firmware_sim.world.world import World
from hub.effects import LedgerEntry, RoundRow
from hub.effects import Save as HubSave

HOUR = 3_600.0


def plain(**campaign: Any) -> Scenario:
    """Two kinds of boards, always on, on a quick network; blocs form within minutes."""
    wish = {
        "form_at_share": 1.0,
        "bundle_mb": 1.0,
        "form_seconds": 300.0,
        "rest_seconds": 60.0,
        "training_share": 0.0,
        **campaign,
    }
    group = Group(
        name="bench",
        boards={"pi5": 1.0, "orin-nano": 1.0},
        presence=Presence(kind="always"),
        link=LinkKind(kind="ethernet"),
    )
    return Scenario(name="plain", groups=(group,), campaign=Campaign(**wish))


def small(devices: int = 16, hours: float = 2.0, seed: int = 1, **more: Any) -> World:
    scenario = more.pop("scenario", None) or plain()
    return World(scenario, devices=devices, days=hours / 24, seed=seed, **more)


class Books:
    """What devices say that they sealed, and which sums the hub says that it opened."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seals: dict[int, Seal] = {}
        self.words: dict[tuple[bytes, int], tuple[Any, Seal]] = {}
        self.sealed: list[tuple[bytes, int]] = []
        self.opened: list[RoundRow] = []
        self.accepted: set[tuple[bytes, int]] = set()
        world.watch(Seal, self._seal)
        world.watch(DeviceSave, self._saved)
        world.watch(HubSave, self._row)

    def _seal(self, world: World, number: int, effect: Seal) -> None:
        self.seals[number] = effect
        self.sealed.append((effect.transcript, number))

    def _saved(self, world: World, number: int, effect: DeviceSave) -> None:
        files = world.devices[number].disk.round
        if effect.state.accepted and files is not None:
            self.accepted.add((files.transcript, number))
        if not effect.state.report or files is None or files.sent is None or number not in self.seals:
            return
        seal = self.seals[number]
        if seal.transcript == files.transcript:
            words = coding.encode(files.sent, seal.codec, seal.entropy).words
            self.words[files.transcript, number] = words, seal

    def _row(self, world: World, number: int, effect: HubSave) -> None:
        row = effect.row
        if isinstance(row, LedgerEntry) and row.kind == "opened":
            self.opened.append(world.hub.store.rounds[row.campaign, row.bloc])

    def members(self, row: RoundRow) -> list[int]:
        bloc = self.world.hub.store.blocs[row.campaign, row.bloc]
        return [int(member[1:]) for member in bloc.members]

    def total(self, row: RoundRow) -> np.ndarray:
        """The sum that the devices' words make, without masks."""
        codec = decode(decode_envelope(row.envelope).body, Open).codec
        parts = [self.words[row.transcript, number][0] for number in self.members(row)]
        words = np.sum(parts, axis=0, dtype=parts[0].dtype)
        return coding.decode(words, codec, self.world.task.numbers)

    def expected_adapter(self, share: Callable[[RoundRow, int], float]) -> np.ndarray:
        """The first adapter and every opened sum times `share(row, versions since its model)`, in order."""
        adapter = np.frombuffer(self.world.task.first(), "<f4")
        for version, row in enumerate(self.opened):
            adapter = adapter + self.total(row) * np.float32(share(row, version - row.base_version))
        return adapter


def mean_share(world: World) -> Callable[[RoundRow, int], float]:
    """The hub's rule when all blocs may train side by side (ADR 6)."""
    row = next(iter(world.hub.store.campaigns.values()))

    def share(opened: RoundRow, behind: int) -> float:
        blocs = len(world.hub.store.blocs)
        late = max(0, behind - (blocs - 1))
        return min(1.0, row.server_rate / blocs) * (1.0 / (row.bloc_devices * math.sqrt(1 + late)))

    return share


def adapter_of(world: World) -> np.ndarray:
    row = next(iter(world.hub.store.campaigns.values()))
    return np.frombuffer(world.hub.blobs[row.adapter.sha256], "<f4")
