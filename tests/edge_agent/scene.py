"""One agent on a stage: its events by hand, the hub's pen, and four other members who say READY when asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import msgspec
from playbook import NOW, Fleet, campaign, entropy_from, kind_of

from edge_agent import effects
from edge_agent.agent import Agent
from edge_agent.effects import AgentState
from edge_agent.round import Phase
from fedge import topics
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
    encode,
)
from fedge.update.codec import first_codec

MEMBERS = tuple(f"d{i:02d}" for i in range(5))
ME = MEMBERS[2]


class Scene:
    """One agent, a hub's pen, and four other members who say READY when asked."""

    def __init__(self) -> None:
        self.fleet = Fleet(5)  # for its identities only
        self.device = self.fleet.devices[ME]
        self.saved = AgentState()
        self.sequence = 0
        self.boots = 0
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
        )
        return msgspec.structs.replace(honest, **changes)

    def card(self) -> BlocCard:
        return BlocCard(campaign="c1", bloc="bloc-0", members=MEMBERS, beacon=bytes(32))

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
        prekey = hashlib.sha256(f"{name}/{counter}".encode()).digest()
        ready = Ready(
            campaign="c1",
            device=name,
            counter=counter,
            prekey=prekey,
            stay_seconds=9,
            facts=Facts(samples_bucket=1),
        )
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
