"""One agent on a stage: its events by hand, the hub's pen, and four other members who say READY when asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import msgspec
from playbook import NOW, Fleet, campaign, entropy_from, kind_of

from edge_agent import effects
from edge_agent.agent import Agent
from edge_agent.effects import AgentState
from edge_agent.round import Phase
from fedge import formation, topics
from fedge.formation import Candidate
from fedge.lora import LoraConfig
from fedge.messages import (
    Announcement,
    BlocCard,
    Facts,
    HubState,
    Message,
    Open,
    Ready,
    Receipt,
    Result,
    Training,
    decode,
    decode_envelope,
    encode,
)
from fedge.update.codec import first_codec

MEMBERS = tuple(f"d{i:02d}" for i in range(5))
ME = MEMBERS[2]


BEACONS = b"\5" * 32
# What makes the public order that of the names: the longest stay first, then the best history.
PLACES = {"d00": (86_400, 4), "d01": (86_400, 3), ME: (86_400, 0), "d03": (3_600, 4), "d04": (600, 4)}


def stranger(name: str, prekey: str, **changes: object) -> Ready:
    """A READY in the name of a member, with a prekey that no agent here knows the secret of."""
    stay, history = PLACES[name]
    ready = Ready(
        campaign="c1",
        device=name,
        counter=0,
        prekey=hashlib.sha256(prekey.encode()).digest(),
        stay_seconds=stay,
        facts=Facts(samples_bucket=1, history_bucket=history),
    )
    return msgspec.structs.replace(ready, **changes)


def formed(readys: Iterable[bytes], number: int = 1, beacon: bytes = b"") -> BlocCard:
    """The one card of a formation over these READYs."""
    beacon = beacon or formation.beacon_of(BEACONS, number)
    bodies = [(decode_envelope(envelope).body, envelope) for envelope in readys]
    candidates = [Candidate(decode(body, Ready), hashlib.sha256(body).digest(), e) for body, e in bodies]
    blocs = formation.cut(candidates, len(candidates), beacon, campaign(5).adapter.size)
    return formation.make_cards("c1", blocs, ["bloc-0"], beacon=beacon, formation=number)[0]


class Scene:
    """One agent, a hub's pen, and four other members who say READY when asked."""

    def __init__(self) -> None:
        self.fleet = Fleet(5)  # for its identities only
        self.device = self.fleet.devices[ME]
        self.saved = AgentState()
        self.sequence = 0
        self.boots = 0
        self.honest: BlocCard | None = None
        self.new_process()

    def new_process(self) -> None:
        """Power back on: a machine from what was saved last."""
        self.boots += 1
        device, entropy = self.device, entropy_from(self.boots)
        facts = Facts(samples_bucket=9)
        self.agent = Agent(
            ME,
            device.signer,
            device.verifier,
            device.policy,
            facts,
            self.saved,
            entropy,
        )

    # ---------------------------------------------------------------- events
    def when(self, event: effects.Event) -> list[effects.Effect]:
        out = self.agent.handle(NOW, event)
        for effect in out:
            if isinstance(effect, effects.Save):
                self.saved = effect.state
        return out

    def hears(self, message: Message) -> list[effects.Effect]:
        where = {Receipt: topics.receipts(ME), Announcement: topics.announcement("c1")}
        topic = where.get(type(message), topics.commands(ME))
        return self.when(effects.Received(topic, self.fleet.hub_signer.seal(message)))

    def hub_state(self, epoch: int, up: bool = True) -> list[effects.Effect]:
        return self.when(effects.Received(topics.HUB_STATE, encode(HubState(hub="hub", up=up, epoch=epoch))))

    def conditions(
        self, *, allowed: bool = True, stay: int = 86_400, **facts: object
    ) -> list[effects.Effect]:
        """The board was looked at: what has changed is given, all else is well."""
        known = Facts(**{"samples_bucket": 9, **facts})
        return self.when(
            effects.Conditions(allowed, stay if allowed else 0, known, "" if allowed else "on battery")
        )

    # ---------------------------------------------------------------- what the hub writes
    def announcement(self, name: str = "c1", **changes: object) -> Announcement:
        self.sequence += 1
        row = campaign(5, name=name)
        honest = Announcement(
            campaign=name,
            hub="hub",
            sequence=self.sequence,
            closed=False,
            url=row.url,
            manifest=row.manifest,
            manifest_signature=row.manifest_signature,
            publisher=row.publisher,
            lora=LoraConfig(),
            training=Training(),
            adapter=row.adapter,
            adapter_version=0,
            beacon=formation.beacon_commitment(BEACONS),
        )
        return msgspec.structs.replace(honest, **changes)

    def card(self, **changes: object) -> BlocCard:
        """The bloc that follows from its members' READYs, ours as it is out when the card is first asked for."""
        if self.honest is None:
            own = self.saved.ready or self.device.signer.seal(stranger(ME, "c1"))
            self.honest = formed(own if name == ME else self.ready(name, 0) for name in MEMBERS)
        return msgspec.structs.replace(self.honest, **changes)

    def opening(self, number: int = 1) -> Open:
        row = campaign(5)
        return Open(
            campaign="c1",
            bloc="bloc-0",
            card=hashlib.sha256(encode(self.card())).digest(),
            round=number,
            manifest=row.manifest.sha256,
            adapter=row.adapter,
            codec=first_codec(5, 0.016, row.numbers, 5, bytes(16)),
            steps=(5,) * 5,
            roster=tuple(self.ready(name, number) for name in MEMBERS),
            window_seconds=60,
        )

    def ready(self, name: str, counter: int) -> bytes:
        if name == ME:
            return self.saved.ready
        ready = stranger(name, f"{name}/{counter}", counter=counter)
        return self.fleet.devices[name].signer.seal(ready)

    def result(self, opened: bool = True, **changes: object) -> Result:
        honest = Result(
            campaign="c1",
            bloc="bloc-0",
            round=self.saved.last_round,
            transcript=self.agent.transcript or bytes(32),
            opened=opened,
        )
        return msgspec.structs.replace(honest, **changes)

    def receipt(self, have: bytes = b"", **changes: object) -> Receipt:
        return Receipt(
            transcript=self.agent.transcript or bytes(32),
            digest=self.saved.report or bytes(32),
            have=have,
            **changes,
        )

    # ---------------------------------------------------------------- short cuts through the play
    def to(self, phase: Phase) -> Scene:
        """Plays on, with nothing going wrong, until the agent is in `phase`."""
        script = self._script(phase)
        for _ in range(20):
            if self.agent.phase is phase:
                return self
            next(script)()
        raise AssertionError(f"never came to {phase}")

    def _script(self, goal: Phase) -> Iterator[Callable[[], object]]:
        yield lambda: self.when(effects.Started())
        yield lambda: self.hears(self.announcement())
        yield lambda: self.when(effects.Fetched(campaign(5).manifest.sha256))
        yield lambda: self.hears(self.card())
        if goal is Phase.CLOSED:
            yield lambda: self.hears(self.announcement(closed=True))
        yield lambda: self.hears(self.opening())
        if goal is Phase.INTERRUPTED:
            yield lambda: self.conditions(allowed=False)
        yield lambda: self.when(effects.Fetched(campaign(5).adapter.sha256))
        yield lambda: self.when(effects.Trained(self.agent.transcript, 9.0, 3, 3, 5, 1.0))
        yield lambda: self.when(effects.Sealed(self.agent.transcript, b"\3" * 32, 150_000))
        yield lambda: self.hears(self.receipt(accepted=True))


def at(phase: Phase) -> Scene:
    return Scene().to(phase)


def names(out: list[effects.Effect]) -> list[str]:
    """The effects as words; what is published by the name of its message."""
    words = []
    for effect in out:
        word = type(effect).__name__
        if isinstance(effect, effects.Publish):
            word += " " + kind_of(effect.payload)
        if isinstance(effect, effects.SetTimer | effects.CancelTimer):
            word += " " + effect.name
        if isinstance(effect, effects.SendChunk):
            word += f" {effect.index}"
        words.append(word)
    return words


CANCELLED = [f"CancelTimer {name}" for name in ("ready", "receipt", "result", "fetch")]
