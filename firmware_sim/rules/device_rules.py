"""What must hold of a device, seen from outside: by its effects, in the order in which they were carried out.

A device's memory here is what its last `Save` made durable. So a mask that is made before `consumed` is on the disk, a
chunk that leaves before its report is, or a counter that goes back over a restart shows at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter, lt
from typing import Any, Final, NoReturn

from edge_agent import effects
from edge_agent.effects import AgentState
from fedge import topics
from fedge.limits import BLOC_DEVICES_MIN
from fedge.messages import Announcement, Report, decode, decode_envelope
from fedge.update.spec import UpdateCodec
from firmware_sim.faults.tampering import tag

Fail = Callable[[str, str], NoReturn]
Fate = Callable[[bytes], str]  # transcript -> "open", "opened", "sat-out", or empty: as durable at the hub
_GROWING: Final = ("boot", "counter", "sequence", "rounds_opened")
_growing: Final = attrgetter(*_GROWING)
NEVER: Final = AgentState()


@dataclass(slots=True)
class DeviceMemory:
    """What was seen of one device."""

    state: AgentState = NEVER  # as durable
    transcript: bytes = b""  # of the running round
    since: float = 0.0  # when it began
    sealed: set[bytes] = field(default_factory=set)
    prekeys: set[bytes] = field(default_factory=set)  # SHA-256 of those that made masks
    carried: frozenset[bytes] = frozenset()  # transcripts whose deltas are in the carry
    parts: dict[bytes, frozenset[bytes]] = field(default_factory=dict)  # and in each sealed report
    recipes: dict[bytes, tuple[UpdateCodec, bytes]] = field(default_factory=dict)  # how each was rounded


class DeviceRules:
    """The rules over all devices; `fail` raises, `fate` asks what became of a round at the hub.

    `floor` is the smallest bloc that a device's owner allows now.
    """

    def __init__(self, fail: Fail, fate: Fate, floor: Callable[[str], int]) -> None:
        self._fail, self._fate, self._floor = fail, fate, floor
        self.devices: dict[str, DeviceMemory] = {}
        self._judges: dict[type, Callable[[str, DeviceMemory, Any], None]] = {
            effects.Save: self._saved,
            effects.Publish: self._published,
            effects.SendChunk: self._sends,
            effects.Seal: self._seals,
            effects.KeepCarry: self._keeps,
            effects.DropCarry: self._drops,
        }

    def memory(self, device: str) -> DeviceMemory:
        """What was seen of `device` so far."""
        memory = self.devices.get(device)
        if memory is None:
            memory = self.devices[device] = DeviceMemory()
        return memory

    def carried_out(self, at: float, device: str, effect: object) -> None:
        """Judges one effect of a device, after it was carried out at time `at`."""
        judge = self._judges.get(type(effect))
        if judge is not None:
            memory = self.memory(device)
            running = memory.transcript
            judge(device, memory, effect)
            if memory.transcript != running:
                memory.since = at

    # ------------------------------------------------------------ the durable state
    def _saved(self, device: str, memory: DeviceMemory, effect: effects.Save) -> None:
        old, new = memory.state, effect.state
        memory.state = new
        if any(map(lt, _growing(new), _growing(old))):
            for name in _GROWING:
                if getattr(new, name) < getattr(old, name):
                    text = f"{name} of {device}: {getattr(old, name)} -> {getattr(new, name)}"
                    self._fail("goes-back", text)
        if new.card == old.card:
            if old.card and new.last_round < old.last_round:
                self._fail("goes-back", f"round of {device}: {old.last_round} -> {new.last_round}")
        elif old.card and _campaign(old) == _campaign(new) and _body(old.card) != _body(new.card):
            self._fail("second-partition", f"{device} changed its bloc in one campaign")
        if new.opened != old.opened:
            if old.opened and new.opened:
                self._fail("two-rounds", f"{device} began a round while another was open")
            memory.transcript = hashlib.sha256(_body(new.opened)).digest() if new.opened else b""
        elif new.opened:
            self._same_round(device, old, new)
        if new.report and new.consumed != memory.transcript:
            self._fail("consumed", f"{device} has a report and its transcript is not consumed")

    def _same_round(self, device: str, old: AgentState, new: AgentState) -> None:
        if old.consumed and new.consumed != old.consumed:
            self._fail("consumed", f"{device} forgot in a round that its masks were made")
        if old.report and new.report != old.report:
            self._fail("second-report", f"{device} replaced its report in one round")
        if old.accepted and not new.accepted:
            self._fail("accepted", f"{device} forgot that its report was accepted")

    # ------------------------------------------------------------ what leaves the device
    def _sends(self, device: str, memory: DeviceMemory, effect: effects.SendChunk) -> None:
        if (effect.transcript, effect.digest) != (memory.transcript, memory.state.report):
            self._fail("report-before-chunk", f"{device} sent a chunk of a report that is not durable")

    def _published(self, device: str, memory: DeviceMemory, effect: effects.Publish) -> None:
        if effect.payload is memory.state.ready or effect.topic != topics.control(device):
            return
        kind = tag(effect.payload)
        if kind == "ready" and effect.payload != memory.state.ready:
            self._fail("ready-before-save", f"{device} said a READY that is not durable")
        if kind == "report":
            report = decode(_body(effect.payload), Report)
            if (report.transcript, report.digest) != (memory.transcript, memory.state.report):
                self._fail("report-before-chunk", f"{device} offered a report that is not durable")

    def _seals(self, device: str, memory: DeviceMemory, effect: effects.Seal) -> None:
        if memory.state.consumed != effect.transcript:
            self._fail("consumed", f"{device} makes masks and `consumed` is not durable")
        if len(effect.roster) < max(self._floor(device), BLOC_DEVICES_MIN):
            self._fail("leverage", f"{device} takes part in a bloc that is smaller than its owner allows")
        if effect.transcript in memory.sealed:
            self._fail("masked-twice", f"{device} masks one transcript a second time")
        used = hashlib.sha256(effect.prekey).digest()
        if used in memory.prekeys:
            self._fail("prekey-twice", f"{device} makes masks of two rounds from one prekey")
        memory.sealed.add(effect.transcript)
        memory.prekeys.add(used)
        memory.parts[effect.transcript] = memory.carried | {effect.transcript}
        memory.recipes[effect.transcript] = effect.codec, effect.entropy

    # ------------------------------------------------------------ what becomes of the work
    def _keeps(self, device: str, memory: DeviceMemory, effect: effects.KeepCarry) -> None:
        transcript = effect.transcript
        if self._fate(transcript) == "opened":
            self._fail("counted-twice", f"{device} carries an update that was opened")
        memory.recipes.pop(transcript, None)
        sent = memory.parts.pop(transcript, None)
        if sent is not None:
            memory.carried = sent
        elif not memory.carried:
            memory.carried = frozenset({transcript})  # at most: it may not have been trained

    def _drops(self, device: str, memory: DeviceMemory, effect: effects.DropCarry) -> None:
        transcript = effect.transcript
        if self._fate(transcript) == "sat-out":
            self._fail("lost-work", f"{device} erases work of a round that sat out")
        memory.carried = frozenset()
        memory.parts.pop(transcript, None)
        memory.recipes.pop(transcript, None)


def _body(envelope: bytes) -> bytes:
    return decode_envelope(envelope).body


def _campaign(state: AgentState) -> str:
    return decode(_body(state.announcement), Announcement).campaign if state.announcement else ""
