"""The playbook's fleet under the world's invariants: every effect that was carried out is judged at once.

Signatures are real, and each is checked once: the outcome is a function of its bytes, and seven others read them too.
What a device learns depends on its name and the round's data seed alone, so that two runs can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from playbook import NOW, NUMBERS, Device, Fleet

from edge_agent import effects as device_effects
from fedge.identity import Verifier
from firmware_sim.rules.invariants import Invariants
from hub import effects as hub_effects


@lru_cache(maxsize=4_096)
def _check_once(public_key: bytes, signature: bytes, data: bytes) -> None:
    Verifier("test", b"").check_signature(public_key, signature, data)


class RememberingVerifier(Verifier):
    """The shipped checks; a signature that was good is not worked out again."""

    def check_signature(self, public_key: bytes, signature: bytes, data: bytes) -> None:
        _check_once(public_key, signature, data)


class WatchedFleet(Fleet):
    """A Fleet that cannot break a rule without raising InvariantBroken."""

    def __init__(self, devices: int = 8, *, seed: int = 0, replay: str = "") -> None:
        self.invariants = Invariants(
            lambda: (self.now - NOW, len(self.ledger)),
            sent=lambda name, transcript: self.devices[name].sent.get(transcript),
            blob=lambda sha256: self.blobs[sha256],
            seed=seed,
            replay=replay,
        )
        self.trained: dict[str, set[bytes]] = {}  # device -> transcripts for which it has trained
        super().__init__(devices, seed=seed)
        for device in self.devices.values():
            device.verifier = RememberingVerifier("test", self.root.root_public)

    def start_hub(self) -> None:
        super().start_hub()
        self.hub.verifier = RememberingVerifier("test", self.root.root_public)

    def delta(self, device: Device, effect: device_effects.Train) -> np.ndarray:
        self.trained.setdefault(device.name, set()).add(effect.transcript)
        text = f"{device.name}/{effect.data_seed}".encode()
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
        return draw.normal(0, device.scale, NUMBERS).astype(np.float32)

    def _keep(self, row: hub_effects.Row) -> None:
        super()._keep(row)
        self.invariants.hub(hub_effects.Save(row))

    def publish(self, sender: str, topic: str, payload: bytes, retain: bool) -> None:
        super().publish(sender, topic, payload, retain)
        if sender == "hub":
            self.invariants.hub(hub_effects.Publish(topic, payload, retain))

    def _device_effect(self, device: Device, effect: device_effects.Effect) -> Iterator[device_effects.Event]:
        events = list(super()._device_effect(device, effect))
        self.invariants.device(device.name, effect)
        return iter(events)

    def check(self) -> None:
        super().check()
        self.invariants.leases_end(self.now)
        self.invariants.leverage_holds()
