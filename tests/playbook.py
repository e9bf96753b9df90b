"""A hub and its devices in one thread: the shipped machines, real cryptography, and a link that a test can disturb.

Training is answered with a seeded random delta, sealing with the shipped codec and masks. Every Save is kept, so that
a device or the hub can be killed at any point and started again from what was durable: raise PowerCut from
`before_effect` or `after_effect`. The hub's broker sends again what was not acknowledged; a device's message is lost.
`expected_adapter` works out, by other means than the hub, what the campaign must have ended with.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from cast import NOW, NUMBERS, Device, PowerCut, authority, campaign, entropy_from, kind_of, signer

from edge_agent import effects as device_effects
from edge_agent.policy import Policy
from edge_agent.round import Phase
from fedge import topics
from fedge.frames import ChunkHeader, chunk_span, encode_frame
from fedge.identity import Verifier
from fedge.messages import Presence, encode
from fedge.secagg.masks import Member
from fedge.update import codec as coding
from fedge.update.report import build_report
from hub import effects as hub_effects
from hub.effects import BlocRow, CampaignRow, LedgerEntry, RoundRow
from hub.hub import Hub

__all__ = [
    "NOW",
    "NUMBERS",
    "Device",
    "Fleet",
    "PowerCut",
    "authority",
    "campaign",
    "entropy_from",
    "kind_of",
    "signer",
]


class Fleet:
    """Devices, a hub and the messages between them. `run` delivers until nothing is left."""

    def __init__(
        self, devices: int = 8, *, seed: int = 0, policy: Policy | None = None, root: int = 0
    ) -> None:
        self.now, self.shuffle = NOW, random.Random(seed)
        self.root = authority(root)
        verifier = Verifier("test", self.root.root_public)
        self.devices = {
            name: Device(name, signer(self.root, name, "device", i + 10), verifier, policy or Policy(), i + 1)
            for i, name in enumerate(f"d{i:02d}" for i in range(devices))
        }
        self.rows: dict[object, hub_effects.Row] = {}
        self.ledger: list[LedgerEntry] = []
        self.blobs = {campaign(1).adapter.sha256: bytes(4 * NUMBERS)}
        self.retained: dict[str, bytes] = {}
        self.queue: deque[tuple[str, str, bytes]] = deque()  # (to, topic, payload)
        self.hub_told: list[hub_effects.Tell] = []
        self.filter: Callable[[str, str, bytes], list[bytes]] = lambda to, topic, payload: [payload]
        self.hub_signer, self.hub_seed, self.epoch = signer(self.root, "hub", "hub", 1), 77, 0
        self.before_effect: Callable[[str, object], None] = lambda who, effect: None
        self.after_effect: Callable[[str, object], None] = lambda who, effect: None
        self.start_hub()
        for device in self.devices.values():
            device.start()

    # ---------------------------------------------------------------- processes
    def start_hub(self) -> None:
        self.epoch += 1
        self.hub = Hub(
            "hub",
            self.hub_signer,
            Verifier("test", self.root.root_public),
            list(self.rows.values()),
            lambda ref: self.blobs[ref.sha256],
            entropy_from(self.hub_seed + self.epoch),
        )
        self.hub_event(hub_effects.Started(self.epoch))

    def boot(self, name: str) -> None:
        """(Re)starts a device from what it saved, and connects it."""
        device = self.devices[name]
        device.start()
        device.timers.clear()
        self.device_event(name, device_effects.Started())
        self.device_event(name, device_effects.Connected())
        for topic, payload in self.retained.items():
            self.queue.append((name, topic, payload))

    def begin(self, row: CampaignRow) -> None:
        self.hub_event(hub_effects.CampaignAsked(row))
        for name in self.devices:
            self.boot(name)

    # ---------------------------------------------------------------- the link
    def run(self, most: int = 100_000) -> None:
        while self.queue and most:
            most -= 1
            self.step()
        assert most, "the machines talk for ever"

    def step(self) -> None:
        """Delivers one message."""
        if len(self.queue) > 1 and self.shuffle.random() < 0.3:
            self._swap()
        to, topic, payload = self.queue.popleft()
        for copy in self.filter(to, topic, payload):
            if to == "hub":
                self.hub_event(hub_effects.Received(topic, copy))
            else:
                self.device_event(to, device_effects.Received(topic, copy))

    def _swap(self) -> None:
        """Messages of different senders may overtake each other; those on one topic may not."""
        other = self.shuffle.randrange(1, len(self.queue))
        topic = self.queue[other][:2]
        if all(entry[:2] != topic for entry in list(self.queue)[:other]):
            entry = self.queue[other]
            del self.queue[other]
            self.queue.appendleft(entry)

    def publish(self, sender: str, topic: str, payload: bytes, retain: bool) -> None:
        if retain:
            self.retained[topic] = payload
        if sender != "hub":
            self.queue.append(("hub", topic, payload))
        elif name := topics.device_of(topic):
            self.queue.append((name, topic, payload))
        else:
            self.queue.extend((name, topic, payload) for name in self.devices)

    def fire_timers(self, *names: str) -> None:
        """Lets time pass until every timer (of these names) has run out."""
        self.now += 120
        for device in self.devices.values():
            for name in [name for name in device.timers if not names or name in names]:
                del device.timers[name]
                self.device_event(device.name, device_effects.TimerFired(name))
        self.hub_event(hub_effects.TimerFired("tick"))

    def wait(self, seconds: float, *, step: float = 30.0) -> None:
        """Lets time pass for the hub and for what devices wait for, and delivers what is said."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            for device in self.devices.values():
                for name in [name for name, at in device.timers.items() if at <= self.now]:
                    del device.timers[name]
                    self.device_event(device.name, device_effects.TimerFired(name))
            self.hub_event(hub_effects.TimerFired("tick"))
            self.run()

    def presence(self, name: str, up: bool) -> None:
        """The broker tells the hub that a device came or went."""
        said = Presence(device=name, up=up, boot=self.devices[name].saved.boot)
        self.hub_event(hub_effects.Received(topics.state(name), encode(said)))

    def conditions(self, name: str, stay_seconds: int, **facts: object) -> None:
        """What the device can do now: with a stay of 0 it is not allowed to work."""
        device = self.devices[name]
        device.facts = msgspec.structs.replace(device.facts, **facts)
        told = device_effects.Conditions(stay_seconds > 0, stay_seconds, device.facts)
        self.device_event(name, told)

    def settle(self, minutes: int = 100) -> None:
        """Delivers and lets time pass until every campaign is closed and nobody has more to say."""
        for _ in range(minutes):
            self.run()
            running = any(isinstance(row, CampaignRow) and not row.closed for row in self.rows.values())
            if not running and all(d.agent.phase is Phase.CLOSED for d in self.devices.values()):
                return
            self.fire_timers()
        raise AssertionError("the campaign never ends")

    # ---------------------------------------------------------------- effects
    def hub_event(self, event: hub_effects.Event) -> None:
        try:
            self._hub_event(event)
        except PowerCut:
            self.start_hub()
            if not isinstance(event, hub_effects.Started | hub_effects.TimerFired):
                self.hub_event(event)  # it was never acknowledged

    def _hub_event(self, event: hub_effects.Event) -> None:
        done = self.hub.handle(self.now, event)
        saves = [effect for effect in done if isinstance(effect, hub_effects.Save)]
        for effect in done:
            if isinstance(effect, hub_effects.StoreBlob):
                self.before_effect("hub", effect)
                self.blobs[effect.ref.sha256] = effect.data
        if saves:  # one transaction
            self.before_effect("hub", saves[0])
            for effect in saves:
                self._keep(effect.row)
            self.after_effect("hub", saves[0])
        for effect in done:
            if isinstance(effect, hub_effects.Publish):
                self.before_effect("hub", effect)
                self.publish("hub", effect.topic, effect.payload, effect.retain)
            elif isinstance(effect, hub_effects.Tell):
                self.hub_told.append(effect)

    def _keep(self, row: hub_effects.Row) -> None:
        if isinstance(row, LedgerEntry):
            self.ledger.append(row)
        else:
            key = getattr(row, "transcript", None) or (getattr(row, "campaign", ""), row.id)
            self.rows[type(row), key] = msgspec.structs.replace(row)

    def device_event(self, name: str, event: device_effects.Event) -> None:
        device = self.devices[name]
        waiting: deque[device_effects.Event] = deque([event])
        try:
            while waiting:
                for effect in device.agent.handle(self.now, waiting.popleft()):
                    self.before_effect(name, effect)
                    waiting.extend(self._device_effect(device, effect))
                    self.after_effect(name, effect)
        except PowerCut:
            self.boot(name)

    def _device_effect(self, device: Device, effect: device_effects.Effect) -> Iterator[device_effects.Event]:
        match effect:
            case device_effects.Save():
                device.saved = effect.state
            case device_effects.Publish():
                self.publish(device.name, effect.topic, effect.payload, effect.retain)
            case device_effects.SendChunk():
                body = device.reports[effect.transcript]
                start, length = chunk_span(len(body), effect.index)
                header = ChunkHeader(effect.transcript, effect.digest, effect.index)
                frame = encode_frame(header, body[start : start + length])
                self.publish(device.name, effect.topic, frame, False)
            case device_effects.FetchBundle():
                yield device_effects.Fetched(effect.announcement.manifest.sha256)
            case device_effects.FetchBlob():
                yield device_effects.Fetched(effect.ref.sha256)
            case device_effects.Train():
                device.deltas[effect.transcript] = self.delta(device, effect)
                yield device_effects.Trained(effect.transcript, 40.0, 10, 20, effect.steps, 1.0)
            case device_effects.Seal():
                yield self._seal(device, effect)
            case device_effects.KeepCarry():
                self._keep_carry(device, effect.transcript)
            case device_effects.DropCarry():
                device.carry, device.carried = None, frozenset()
                for files in (device.deltas, device.sent, device.reports):
                    files.pop(effect.transcript, None)
            case device_effects.SetTimer():
                device.timers[effect.name] = self.now + effect.seconds
            case device_effects.CancelTimer():
                device.timers.pop(effect.name, None)
            case device_effects.Tell():
                device.told.append(effect)

    def delta(self, device: Device, effect: device_effects.Train) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(device.name.encode() + effect.transcript).digest()[:8], "big")
        return np.random.default_rng(seed).normal(0, device.scale, NUMBERS).astype(np.float32)

    def _keep_carry(self, device: Device, transcript: bytes) -> None:
        """As edge_agent.round_files does it with files."""
        sent, delta = device.sent.pop(transcript, None), device.deltas.pop(transcript, None)
        if sent is not None:
            device.carry, device.carried = sent, device.parts[transcript]
        elif delta is not None and device.carry is None:
            device.carry, device.carried = delta, frozenset({transcript})
        device.reports.pop(transcript, None)

    def _seal(self, device: Device, effect: device_effects.Seal) -> device_effects.Event:
        assert device.saved.consumed == effect.transcript, "masks are consumed on disk before they are made"
        device.seals.append(effect.transcript)
        built = build_report(
            device.deltas[effect.transcript],
            carry=device.carry,
            loss_sum=effect.loss_sum,
            labels=effect.labels,
            samples=effect.samples,
            steps=effect.steps,
            codec=effect.codec,
            h=effect.transcript,
            position=effect.position,
            roster=[Member(prekey, aes) for prekey, aes in effect.roster],
            prekey_secret=effect.prekey,
            entropy=effect.entropy,
        )
        device.reports[effect.transcript], device.sent[effect.transcript] = built.body, built.sent
        words = coding.encode(built.sent, effect.codec, effect.entropy).words
        device.words[effect.transcript] = words, effect.codec
        device.parts[effect.transcript] = device.carried | {effect.transcript}
        return device_effects.Sealed(effect.transcript, built.digest, len(built.body))

    # ---------------------------------------------------------------- what tests ask
    def kinds(self, kind: str) -> list[LedgerEntry]:
        return [entry for entry in self.ledger if entry.kind == kind]

    @property
    def campaign(self) -> CampaignRow:
        return next(row for row in self.rows.values() if isinstance(row, CampaignRow))

    def adapter(self) -> np.ndarray:
        return np.frombuffer(self.blobs[self.campaign.adapter.sha256], "<f4")

    def opened(self) -> list[RoundRow]:
        """The rounds whose sums were opened, in that order."""
        rounds = {(r.bloc, r.round): r for r in self.rows.values() if isinstance(r, RoundRow)}
        return [rounds[entry.bloc, entry.round] for entry in self.kinds("opened")]

    def expected_adapter(self) -> np.ndarray:
        """The mean rule over what the devices say that they sent, bit for bit: no masks, no hub."""
        blocs = {row.id: row for row in self.rows.values() if isinstance(row, BlocRow)}
        formed_at = sorted(row.formed_at for row in blocs.values())
        adapter = np.zeros(NUMBERS, np.float32)
        for version, (entry, row) in enumerate(zip(self.kinds("opened"), self.opened(), strict=True)):
            members = blocs[row.bloc].members
            side_by_side = sum(at <= entry.at for at in formed_at)
            if most := self.campaign.training_devices_max:
                side_by_side = min(side_by_side, max(1, most // len(members)))
            late = max(0, version - row.base_version - (side_by_side - 1))
            share = min(1.0, self.campaign.server_rate / side_by_side) / (len(members) * math.sqrt(1 + late))
            sent = [self.devices[name].words[row.transcript] for name in members]
            words = np.sum([words for words, _ in sent], axis=0, dtype=sent[0][0].dtype)
            adapter = adapter + coding.decode(words, sent[0][1], NUMBERS) * np.float32(share)
        return adapter

    def check(self) -> None:
        """What must hold whatever went wrong: the exact mean, every update once, no transcript masked twice."""
        assert self.adapter().tobytes() == self.expected_adapter().tobytes()
        members = {row.id: row.members for row in self.rows.values() if isinstance(row, BlocRow)}
        for device in self.devices.values():
            assert len(set(device.seals)) == len(device.seals), "one transcript was masked twice"
            counted = [
                p for r in self.opened() if device.name in members[r.bloc] for p in device.parts[r.transcript]
            ]
            assert len(set(counted)) == len(counted), "an update was counted twice"
