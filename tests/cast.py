"""Who plays in `playbook`: keys of a test's own fleet, a campaign to ask for, devices and what they made durable."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent import effects as device_effects
from edge_agent.agent import Agent
from edge_agent.effects import AgentState
from edge_agent.policy import Policy
from fedge.authority import Authority, new_authority
from fedge.errors import ProtocolError
from fedge.identity import Signer, Verifier
from fedge.lora import LoraConfig
from fedge.messages import BlobRef, Facts, Training, decode_envelope
from fedge.update.spec import UpdateCodec
from hub.effects import CampaignRow

NUMBERS = 2048
NOW = 1_800_000_000.0


class PowerCut(BaseException):
    """Raised by a test's hook; no handler of the machines may swallow it."""


def kind_of(payload: bytes) -> str:
    """The tag of the message in an envelope or bare; `chunk` for a frame."""
    if payload[:2] == b"FG":
        return "chunk"
    with contextlib.suppress(ProtocolError):
        payload = decode_envelope(payload).body
    return str(msgspec.msgpack.decode(payload)["type"])


def entropy_from(seed: int) -> Callable[[int], bytes]:
    """Seeded bytes, so that one seed replays one run."""
    return random.Random(seed).randbytes


def authority(seed: int = 0) -> Authority:
    return new_authority("test", entropy_from(seed)(96), now=NOW)


def signer(root: Authority, subject: str, role: str, seed: int) -> Signer:
    key = Ed25519PrivateKey.from_private_bytes(entropy_from(seed)(32))
    certificate = root.certify(
        subject, role, key.public_key().public_bytes_raw(), serial=1000 + seed, now=NOW, days=3650
    )
    return Signer(key, certificate)


def campaign(
    devices: int, *, rounds: int = 2, bloc: int = 8, name: str = "c1", **knobs: float
) -> CampaignRow:
    """A campaign that opens a bloc as soon as it is whole; `knobs` are the scheduler's fields."""
    adapter = bytes(4 * NUMBERS)
    return CampaignRow(
        id=name,
        manifest=BlobRef(hashlib.sha256(b"manifest").digest(), 8),
        manifest_signature=bytes(64),
        publisher=bytes(32),
        url="https://localhost:1",
        lora=LoraConfig(),
        training=Training(),
        numbers=NUMBERS,
        rounds=rounds,
        steps=5,
        bloc_devices=bloc,
        form_at_devices=devices,
        seed=0,
        adapter=BlobRef(hashlib.sha256(adapter).digest(), len(adapter)),
        **{"window_seconds": 3600, **knobs},
    )


@dataclass
class Device:
    """One agent, what it made durable, and the files its effects left."""

    name: str
    signer: Signer
    verifier: Verifier
    policy: Policy
    seed: int
    saved: AgentState = field(default_factory=AgentState)
    deltas: dict[bytes, np.ndarray] = field(default_factory=dict)
    sent: dict[bytes, np.ndarray] = field(default_factory=dict)
    reports: dict[bytes, bytes] = field(default_factory=dict)
    carry: np.ndarray | None = None
    words: dict[bytes, tuple[np.ndarray, UpdateCodec]] = field(default_factory=dict)  # before the masks
    parts: dict[bytes, frozenset[bytes]] = field(default_factory=dict)  # whose deltas a report carries
    carried: frozenset[bytes] = frozenset()
    timers: dict[str, float] = field(default_factory=dict)
    told: list[device_effects.Tell] = field(default_factory=list)
    seals: list[bytes] = field(default_factory=list)
    scale: float = 0.01
    facts: Facts = field(default_factory=lambda: Facts(samples_bucket=9))

    def start(self) -> None:
        self.entropy = entropy_from(self.seed * 1_000 + self.saved.boot)
        self.agent = Agent(
            self.name, self.signer, self.verifier, self.policy, self.facts, self.saved, self.entropy
        )

    @property
    def refusals(self) -> list[str]:
        return [tell.refusal for tell in self.told if tell.refusal]
