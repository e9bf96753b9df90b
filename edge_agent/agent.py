"""The device's state machine: events in, effects out. Decides everything, does nothing.

An agent follows one campaign. It fetches the bundle, says READY with a fresh prekey, and waits for an OPEN of its own
bloc. It then trains, records that the masks of this transcript are consumed, seals its masked report, sends it until
the hub accepts, and waits for the RESULT. A bloc that sat out leaves a carry for the next round.

    IDLE -> FETCHING -> OFFERED -> LOADING -> TRAINING -> SEALING -> SENDING -> AWAITING -> OFFERED ... -> CLOSED
                                   LOADING, TRAINING <-> INTERRUPTED

The order is the safety argument (protocol.md): `consumed` is durable before any mask is made and the finished report
before its first chunk leaves, so no transcript is ever masked twice and every resend has the same bytes. Whatever the
hub says is checked here against the pinned bloc, every signature and the owner's policy; the checks are in
`edge_agent.checks`. After a cut the phase follows from the saved state alone.

What the board can do and what its owner allows comes as `Conditions`, judged in `edge_agent.conditions`. A waiting
device whose facts or stay changed says a new READY under its old prekey; one that may not work says a stay of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from edge_agent import believed, checks, effects
from edge_agent.effects import AgentState, Effect, Event
from edge_agent.round import FETCH_SECONDS, Phase, RoundWorker
from fedge import topics
from fedge.errors import FedgeError, ProtocolError
from fedge.identity import Opened
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
    decode,
    decode_envelope,
)

M = TypeVar("M", bound=Message)

SPREAD_SECONDS_MIN: Final = 60.0  # a fleet that checks in as often as this is too small to need spreading
_JITTER: Final = (0.75, 1.25)


class Agent(RoundWorker):
    """One device in one campaign. `entropy(n)` gives n random bytes; `state` is what was saved last."""

    __slots__ = ()

    # ------------------------------------------------------------ entry
    def handle(self, now: float, event: Event) -> list[Effect]:
        """The effects of `event` at Unix time `now`, in the order in which they must be carried out."""
        if type(event) is effects.TimerFired and self.phase is Phase.OFFERED:
            return self._ready_again(now, event)  # nearly all that a waiting device ever does
        done: list[Effect] = []  # what was decided before a refusal stands, in the state as on the disk
        try:
            key, argument = self._read(now, event)
            handler = TRANSITIONS[self.phase].get(key) or ALWAYS.get(key)
            if handler is None:
                return self._refuse(key)
            for effect in handler(self, now, argument):
                done.append(effect)
        except ProtocolError as error:
            done.append(effects.Tell(str(error), error.name))
        except FedgeError as error:
            done.append(effects.Tell(str(error), type(error).__name__.removesuffix("Error").lower()))
        return done

    def _refuse(self, key: type) -> list[Effect]:
        name = REFUSALS[key]
        return [effects.Tell(f"{key.__name__} ignored while {self.phase.value}", name)] if name else []

    def _read(self, now: float, event: Event) -> tuple[type, object]:
        """The table's key for an event, and what the handler gets: a verified message, or the event itself."""
        if type(event) is not effects.Received:
            return type(event), event
        topic, payload, verifier = event.topic, event.payload, self.verifier
        if topic == topics.commands(self.device):
            command = self._from_own_hub(verifier.open_any(payload, checks.COMMANDS, role="hub", now=now))
            return type(command.message), (command, payload)
        if topic == topics.receipts(self.device):
            return Receipt, self._from_own_hub(verifier.open(payload, Receipt, role="hub", now=now)).message
        if topic == topics.HUB_STATE:
            return HubState, decode(payload, HubState)
        return Announcement, (verifier.open(payload, Announcement, role="hub", now=now), payload)

    def _from_own_hub(self, opened: Opened[M]) -> Opened[M]:
        """Another hub of the fleet than the campaign's has no say in it."""
        hub = self.announcement.hub if self.state.announcement else opened.subject
        if opened.subject != hub:
            raise ProtocolError(
                "wrong-hub", "another hub than the campaign's", field="hub", value=opened.subject
            )
        return opened

    # ------------------------------------------------------------ start and link
    def _started(self, now: float, event: effects.Started) -> Iterator[Effect]:
        yield self._save(boot=self.state.boot + 1)
        yield from self._resume(now)

    def _resume(self, now: float) -> Iterator[Effect]:
        """Continues from what is durable: the only way into a phase after a start or a finished round."""
        state = self.state
        if not state.announcement:
            self.phase = Phase.IDLE
        elif state.opened:
            yield from self._resume_round(now)
        elif self.announcement.closed:
            self.phase = Phase.CLOSED
        elif state.bundle != self.announcement.manifest.sha256:
            self.phase = Phase.FETCHING
            if self.allowed:
                yield effects.FetchBundle(self.announcement)
        else:
            yield from self._offer(now)

    def _resume_round(self, now: float) -> Iterator[Effect]:
        if self.state.accepted:
            self.phase = Phase.AWAITING
            yield from self._offer_report()
        elif self.state.report:
            self._begin_sending()
            yield from self._offer_report()
        elif self.state.consumed == self.transcript:
            # Masks may have been made and the report was not finished: never build it a second time.
            yield from self._sit_out("interrupted-while-sealing")
        else:
            yield self._window()
            yield from self._load()

    def _connected(self, now: float, event: effects.Connected) -> Iterator[Effect]:
        if self.phase is Phase.OFFERED:
            yield from self._say_ready()
        elif self.phase in (Phase.SENDING, Phase.AWAITING):
            yield from self._offer_report()

    def _hub_state(self, now: float, message: HubState) -> Iterator[Effect]:
        new, self.epoch = message.up and message.epoch != self.epoch, message.epoch
        if not new:
            return
        spread = self.announcement.checkin_seconds - SPREAD_SECONDS_MIN if self.phase is Phase.OFFERED else 0
        if spread > 0:  # a large fleet does not greet a new hub in one second
            yield effects.SetTimer("ready", spread * self._draw())
        else:
            yield from self._connected(now, effects.Connected())

    # ------------------------------------------------------------ campaign
    def _announced(self, now: float, argument: tuple[Opened[Announcement], bytes]) -> Iterator[Effect]:
        opened, envelope = argument
        new, current = opened.message, self.announcement if self.state.announcement else None
        if new.sequence <= self.state.sequence:
            return
        if current is not None and new.campaign != current.campaign and not current.closed:
            self.later = opened, envelope  # its turn comes when the running campaign closes
            return
        checks.announcement(opened, current, self.policy)
        if current is None or current.campaign != new.campaign:
            yield from self._follow(now, new.sequence, envelope)
            return
        yield self._save(announcement=envelope, sequence=new.sequence)
        if new.closed and not self.state.opened:
            yield from self._resume(now)
        if new.closed and self.later is not None:
            yield from self._announced(now, self.later)

    def _follow(self, now: float, sequence: int, envelope: bytes) -> Iterator[Effect]:
        """Another campaign: its bloc, rounds and adapter have nothing to do with what was before."""
        if self.phase in (Phase.TRAINING, Phase.SEALING):
            yield effects.StopWork(self.transcript)
        yield from self._cancel_timers()
        if self.state.announcement:
            yield effects.DropCarry(self.transcript)
        self.outgoing, self.later = None, None
        fresh = AgentState(
            boot=self.state.boot,
            counter=self.state.counter,
            sequence=sequence,
            announcement=envelope,
            bundle=self.state.bundle,
            rounds_opened=self.state.rounds_opened,
            seconds_per_step=self.state.seconds_per_step,
        )
        yield self._save(**msgspec.structs.asdict(fresh))
        yield from self._resume(now)

    def _fetch_when_allowed(self, now: float, event: effects.Conditions) -> Iterator[Effect]:
        waited = not self.allowed
        yield from self._note(now, event)
        if waited and self.allowed:
            yield effects.FetchBundle(self.announcement)

    def _bundle_here(self, now: float, event: effects.Fetched) -> Iterator[Effect]:
        if event.sha256 == self.announcement.manifest.sha256:
            yield self._save(bundle=event.sha256)
            yield from self._resume(now)

    def _bundle_failed(self, now: float, event: effects.FetchFailed) -> Iterator[Effect]:
        yield effects.Tell(f"bundle not here yet: {event.reason}")
        if not event.final:
            yield effects.SetTimer("fetch", FETCH_SECONDS)

    def _fetch_again(self, now: float, event: effects.TimerFired) -> Iterator[Effect]:
        if event.name == "fetch" and self.allowed:
            yield effects.FetchBundle(self.announcement)

    def _pin_card(self, now: float, argument: tuple[Opened[BlocCard], bytes]) -> Iterator[Effect]:
        opened, envelope = argument
        if self.state.card and decode_envelope(self.state.card).body == opened.body:
            return
        checks.card(
            opened.message, self.device, self.announcement.campaign, bool(self.state.card), self.policy
        )
        checks.formed(opened.message, self.signer, self.announcement, self.verifier, now)
        yield self._save(card=envelope)

    # ------------------------------------------------------------ ready and open
    def _offer(self, now: float) -> Iterator[Effect]:
        self.phase = Phase.OFFERED
        if not self.state.ready or self._ready_is_old():
            yield self._sign_ready()
        yield from self._say_ready()

    def _offer_anew(self, now: float, event: effects.Conditions) -> Iterator[Effect]:
        yield from self._note(now, event)
        if self._ready_is_old():
            yield self._sign_ready()
            yield from self._say_ready()

    def _ready_is_old(self) -> bool:
        ready = believed.ready_in(self.state.ready)
        return ready.stay_seconds != self.stay_seconds or ready.facts != self._public_facts()

    def _public_facts(self) -> Facts:
        """With the pace as a round has measured it; until then as the driver gauged it."""
        pace = self.state.seconds_per_step or self.facts.seconds_per_step
        if pace == self.facts.seconds_per_step:
            return self.facts
        return msgspec.structs.replace(self.facts, seconds_per_step=pace)

    def _sign_ready(self) -> effects.Save:
        """One prekey until a round has used it: an OPEN may hold any READY that was said with it."""
        secret = self.state.prekey or self.entropy(32)
        ready = Ready(
            campaign=self.announcement.campaign,
            device=self.device,
            counter=self.state.counter + 1,
            prekey=self.agreement.public(secret),
            stay_seconds=self.stay_seconds,
            facts=self._public_facts(),
        )
        return self._save(counter=ready.counter, prekey=secret, ready=self.signer.seal(ready))

    def _say_ready(self) -> list[Effect]:
        """Says the current READY, and again after the campaign's check-in time, so that the hub knows us present."""
        low, high = _JITTER
        seconds = self.announcement.checkin_seconds * (low + (high - low) * self._draw())
        ready = effects.Publish(topics.control(self.device), self.state.ready)
        return [ready, effects.SetTimer("ready", seconds)]

    def _draw(self) -> float:
        """In [0, 1)."""
        return int.from_bytes(self.entropy(2), "big") / 65_536

    def _ready_again(self, now: float, event: effects.TimerFired) -> list[Effect]:
        return self._say_ready() if event.name == "ready" else []

    def _missed(self, now: float, argument: tuple[Opened[Result], bytes]) -> Iterator[Effect]:
        """A round was opened with our READY and ended without us: that READY is spent, a fresh one is said."""
        result = argument[0].message
        if result.campaign == self.announcement.campaign and result.round > self.state.last_round:
            yield self._save(last_round=result.round, ready=b"", prekey=b"")
            yield from self._offer(now)

    def _open(self, now: float, argument: tuple[Opened[Open], bytes]) -> Iterator[Effect]:
        opened, envelope = argument
        card = checks.round_opening(opened.message, self.state, self.announcement, self.policy)
        own = believed.ready_in(self.state.ready)
        checks.roster(opened.message, card, own, self.verifier, now)
        yield self._save(
            opened=envelope, last_round=opened.message.round, consumed=b"", report=b"", accepted=False
        )
        yield effects.CancelTimer("ready")
        yield self._window()
        yield from self._load()

    def _open_again(self, now: float, argument: tuple[Opened[Open], bytes]) -> Iterator[Effect]:
        """The OPEN of the running round, repeated, is answered by repeating ours; any other is refused."""
        if argument[0].digest != self.transcript:
            raise ProtocolError(
                "second-open", "a round is already open", field="round", value=argument[0].message.round
            )
        if self.phase in (Phase.SENDING, Phase.AWAITING):
            yield from self._offer_report()


# ---------------------------------------------------------------- the machine as one table
Handler = Callable[..., Iterable[Effect]]

# In every phase; a phase's own row comes first.
ALWAYS: Final[dict[type, Handler]] = {
    effects.Started: Agent._started,
    effects.Conditions: Agent._note,
    effects.Connected: Agent._connected,
    HubState: Agent._hub_state,
    Announcement: Agent._announced,
}
_ROUND: Final[dict[type, Handler]] = {
    BlocCard: Agent._pin_card,
    Open: Agent._open_again,
    Result: Agent._result,
}
TRANSITIONS: Final[dict[Phase, dict[type, Handler]]] = {
    Phase.IDLE: {},
    Phase.FETCHING: {
        effects.Conditions: Agent._fetch_when_allowed,
        effects.Fetched: Agent._bundle_here,
        effects.FetchFailed: Agent._bundle_failed,
        effects.TimerFired: Agent._fetch_again,
        BlocCard: Agent._pin_card,
    },
    Phase.OFFERED: {
        effects.Conditions: Agent._offer_anew,
        effects.TimerFired: Agent._ready_again,
        BlocCard: Agent._pin_card,
        Open: Agent._open,
        Result: Agent._missed,
    },
    Phase.LOADING: {
        **_ROUND,
        effects.Conditions: Agent._interrupt,
        effects.Fetched: Agent._train,
        effects.FetchFailed: Agent._load_failed,
        effects.TimerFired: Agent._load_again,
    },
    Phase.TRAINING: {
        **_ROUND,
        effects.Conditions: Agent._interrupt,
        effects.Trained: Agent._consume,
        effects.WorkFailed: Agent._failed,
        effects.TimerFired: Agent._overdue,
    },
    Phase.INTERRUPTED: {**_ROUND, effects.Conditions: Agent._go_on, effects.TimerFired: Agent._overdue},
    Phase.SEALING: {
        **_ROUND,
        effects.Sealed: Agent._sealed,
        effects.WorkFailed: Agent._failed,
        effects.TimerFired: Agent._overdue,
    },
    Phase.SENDING: {**_ROUND, effects.TimerFired: Agent._receipt_late, Receipt: Agent._receipt},
    Phase.AWAITING: {**_ROUND, effects.TimerFired: Agent._result_late},
    Phase.CLOSED: {},
}
# What anything else is called when it comes at the wrong time; an empty name is not worth a line.
REFUSALS: Final[dict[type, str]] = {
    effects.Fetched: "",
    effects.FetchFailed: "",
    effects.TimerFired: "",
    effects.Trained: "stale-work",
    effects.Sealed: "stale-work",
    effects.WorkFailed: "stale-work",
    BlocCard: "no-campaign",
    Open: "no-ready",
    Receipt: "",
    Result: "",
}
