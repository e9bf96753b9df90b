"""The adversary's bench: a real fleet held at the moment before its first round, and the keys to say anything in it.

A malicious hub has the hub's own key and certificate, a malicious device its own. Neither has the fleet root's, nor
another device's. Each attack is a genuine message with one thing wrong, and each test ends with the honest message
getting through, which shows that the one thing was the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from playbook import Device, Fleet, authority, campaign, kind_of, signer

from edge_agent import effects as device_effects
from edge_agent.policy import Policy
from edge_agent.round import Phase
from fedge import topics
from fedge.identity import Signer
from fedge.messages import (
    Announcement,
    BlocCard,
    Envelope,
    Facts,
    Message,
    Open,
    Ready,
    decode,
    decode_envelope,
    encode,
)
from hub import effects as hub_effects

VICTIM = "d03"


def body(envelope: bytes) -> bytes:
    return decode_envelope(envelope).body


def changed(message: Message, **changes: object) -> Message:
    return msgspec.structs.replace(message, **changes)


def tampered(
    envelope: bytes, change: Callable[[dict[str, object]], object], by: Signer | None = None
) -> bytes:
    """The envelope with its body changed below the level of types, signed again if `by` is given."""
    old = decode_envelope(envelope)
    raw = msgspec.msgpack.decode(old.body)
    change(raw)
    new = msgspec.msgpack.encode(raw)
    if by is None:
        return encode(Envelope(new, old.certificate, old.signature))
    return encode(Envelope(new, by.certificate, by.key.sign(b"fedge message v1\x00" + new)))


def ready_of(
    name: str, by: Signer, *, counter: int = 90, secret: bytes = b"\5" * 32, **facts: object
) -> bytes:
    """A READY in the name of `name`, sealed by whoever `by` is."""
    prekey = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    ready = Ready(
        campaign="c1",
        device=name,
        counter=counter,
        prekey=prekey,
        stay_seconds=9,
        facts=Facts(**{"samples_bucket": 9, **facts}),
    )
    return by.seal(ready)


class Bench:
    """Eight devices that said READY to a hub that formed their bloc and sealed an OPEN; nobody has heard of it yet."""

    def __init__(self, devices: int = 8, *, policy: Policy | None = None) -> None:
        self.fleet = Fleet(devices, policy=policy)
        self.held: dict[str, dict[str, bytes]] = {}
        self.fleet.filter = self._hold
        self.fleet.begin(campaign(8))
        self.fleet.run()
        self.victim: Device = self.fleet.devices[VICTIM]
        self.open_envelope = self.held[VICTIM]["open"]
        self.card_envelope = self.held[VICTIM]["bloccard"]
        self.opening = decode(body(self.open_envelope), Open)
        self.card = decode(body(self.card_envelope), BlocCard)
        self.announcement = decode(body(self.victim.saved.announcement), Announcement)
        self.hub = self.fleet.hub_signer

    def _hold(self, to: str, topic: str, payload: bytes) -> list[bytes]:
        kind = kind_of(payload)
        if kind not in ("open", "bloccard"):
            return [payload]
        self.held.setdefault(to, {})[kind] = payload
        return []

    # ---------------------------------------------------------------- a malicious hub
    def says(self, payload: bytes | Message, *, topic: str = "", by: Signer | None = None) -> list[str]:
        """Lets the victim hear a message, sealed by the hub unless by another; what it refused by name."""
        envelope = (by or self.hub).seal(payload) if isinstance(payload, Message) else payload
        before = len(self.victim.refusals)
        topic = topic or topics.commands(VICTIM)
        self.fleet.device_event(VICTIM, device_effects.Received(topic, envelope))
        return self.victim.refusals[before:]

    def refuses(
        self, name: str, payload: bytes | Message, *, topic: str = "", by: Signer | None = None
    ) -> None:
        """The victim refuses by this name and is afterwards exactly as before."""
        before, phase, seals = self.victim.agent.state, self.victim.agent.phase, list(self.victim.seals)
        assert self.says(payload, topic=topic, by=by) == [name]
        assert (self.victim.agent.state, self.victim.agent.phase) == (before, phase)
        assert self.victim.saved == before
        assert self.victim.seals == seals

    def pins_card(self) -> Bench:
        assert self.says(self.card_envelope) == []
        return self

    def accepts(self) -> None:
        """The honest card and OPEN get through: the victim trains and seals."""
        assert self.says(self.card_envelope) == []
        assert self.says(self.open_envelope) == []
        assert self.victim.agent.phase is Phase.SENDING
        assert len(self.victim.seals) == 1

    def honest_round(self) -> None:
        """Everybody hears the OPEN and the campaign goes on undisturbed."""
        self.fleet.filter = lambda to, topic, payload: [payload]
        for name, held in self.held.items():
            for kind in ("bloccard", "open"):
                self.fleet.publish("hub", topics.commands(name), held[kind], False)
        self.fleet.run()

    # ---------------------------------------------------------------- a malicious device
    def tells_hub(
        self, device: str, payload: bytes | Message, *, by: Signer | None = None, topic: str = ""
    ) -> list[str]:
        """Lets the hub hear a message on this device's topic; what it refused by name."""
        envelope = (
            (by or self.fleet.devices[device].signer).seal(payload)
            if isinstance(payload, Message)
            else payload
        )
        before = len(self.fleet.hub_told)
        self.fleet.hub_event(hub_effects.Received(topic or topics.control(device), envelope))
        return [tell.refusal for tell in self.fleet.hub_told[before:]]

    def hub_refuses(
        self, name: str, device: str, payload: bytes | Message, *, by: Signer | None = None, topic: str = ""
    ) -> None:
        """The hub refuses by this name, writes one line in the ledger, and changes no other row."""
        before, lines, waiting = dict(self.fleet.rows), len(self.fleet.ledger), len(self.fleet.queue)
        assert self.tells_hub(device, payload, by=by, topic=topic) == [name]
        assert self.fleet.rows == before
        assert [entry.detail["name"] for entry in self.fleet.ledger[lines:]] == [name]
        assert len(self.fleet.queue) == waiting


def stranger(name: str, role: str = "device") -> Signer:
    """An identity that another fleet's root vouches for."""
    return signer(authority(99), name, role, 55)
