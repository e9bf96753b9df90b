"""One round on the device: load, train, consume, seal, send, await.

The order is the safety argument (protocol.md): `consumed` is durable before any mask is made and the finished report
before its first chunk leaves, so no transcript is ever masked twice and every resend has the same bytes. A round that
cannot be finished is declined, and its work carried into the next.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final

import msgspec

from edge_agent import believed, checks, effects
from edge_agent.conditions import STAY_SECONDS_MAX
from edge_agent.effects import AgentState, Effect
from edge_agent.policy import Policy
from fedge import topics
from fedge.errors import ProtocolError
from fedge.frames import Outgoing
from fedge.identity import Opened, Signer, Verifier
from fedge.messages import (
    UNKNOWN_ROUND,
    Announcement,
    Decline,
    Facts,
    Open,
    Receipt,
    Report,
    Result,
    Training,
)
from fedge.secagg.agreement import AGREEMENT, Agreement

RECEIPT_SECONDS: Final = 6.0  # about three round trips of a poor link; then the report is offered again,
RECEIPT_DOUBLINGS: Final = 4  # each time after twice as long: a slow line is still sending
# It asks again for the outcome of an accepted report, each time after twice as long, so often: the RESULT is pushed,
# and a slow member may take the whole window.
RESULT_SECONDS: Final = 30.0
RESULT_DOUBLINGS: Final = 4
FETCH_SECONDS: Final = 30.0
SILENCES_TOLD: Final = 5  # after so many unanswered offers the owner hears what is probably wrong


class Phase(Enum):
    """Where an agent is in its campaign."""

    IDLE = "idle"
    FETCHING = "fetching"
    OFFERED = "offered"
    LOADING = "loading"
    TRAINING = "training"
    # The owner's policy or the board stopped the work; it goes on inside the window.
    INTERRUPTED = "interrupted"
    SEALING = "sealing"
    SENDING = "sending"
    AWAITING = "awaiting"
    CLOSED = "closed"

    # There is one object of each; Enum's own hash runs in Python, a hundredth of all that a simulated fleet does.
    __hash__ = object.__hash__


def data_seed(training: Training, device: str, number: int) -> int:
    """What orders the rows of `device` in round `number`: other batches each time, the same when trained again."""
    text = f"{training.data_seed}/{device}/{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


class RoundWorker(ABC):
    """What an agent knows, and all that it does between an OPEN and its RESULT."""

    __slots__ = (
        "agreement",
        "allowed",
        "device",
        "entropy",
        "epoch",
        "facts",
        "later",
        "outgoing",
        "phase",
        "policy",
        "signer",
        "silences",
        "state",
        "stay_seconds",
        "verifier",
    )

    def __init__(
        self,
        device: str,
        signer: Signer,
        verifier: Verifier,
        policy: Policy,
        facts: Facts,
        state: AgentState,
        entropy: Callable[[int], bytes],
        agreement: Agreement = AGREEMENT,
    ) -> None:
        self.device, self.signer, self.verifier = device, signer, verifier
        self.policy, self.facts, self.state, self.entropy = policy, facts, state, entropy
        self.agreement = agreement
        self.allowed, self.stay_seconds = True, STAY_SECONDS_MAX  # until Conditions say otherwise
        self.phase = Phase.IDLE
        self.epoch = -1
        self.silences = 0
        self.outgoing: Outgoing | None = None
        self.later: tuple[Opened[Announcement], bytes] | None = None

    @abstractmethod
    def _resume(self, now: float) -> Iterator[Effect]:
        """Continues from what is durable."""

    # ------------------------------------------------------------ what the state says
    @property
    def announcement(self) -> Announcement:
        """The campaign as last announced."""
        return believed.campaign_in(self.state.announcement)

    @property
    def open_message(self) -> Open:
        """The OPEN of the running round."""
        return believed.open_in(self.state.opened)[0]

    @property
    def transcript(self) -> bytes:
        """The running round's transcript hash, or empty."""
        return believed.open_in(self.state.opened)[1] if self.state.opened else b""

    def _save(self, **changes: object) -> effects.Save:
        self.state = msgspec.structs.replace(self.state, **changes)
        return effects.Save(self.state)

    def _cancel_timers(self) -> Iterator[Effect]:
        for timer in ("ready", "receipt", "result", "fetch"):
            yield effects.CancelTimer(timer)

    # ------------------------------------------------------------ training and sealing
    def _load(self) -> Iterator[Effect]:
        """The only way to work: its beginning, again after a cut, and again after an interruption."""
        if not self.allowed:
            self.phase = Phase.INTERRUPTED
            return
        self.phase = Phase.LOADING
        yield effects.FetchBlob(self.announcement.url, self.open_message.adapter)

    def _train(self, now: float, event: effects.Fetched) -> Iterator[Effect]:
        opening, campaign = self.open_message, self.announcement
        if event.sha256 != opening.adapter.sha256:
            return
        self.phase = Phase.TRAINING
        place = self._place
        yield effects.Train(
            transcript=self.transcript,
            manifest=opening.manifest,
            publisher=campaign.publisher,
            adapter=opening.adapter.sha256,
            training=campaign.training,
            steps=opening.steps[place],
            data_seed=data_seed(campaign.training, self.device, opening.round),
            depth=opening.depths[place] if opening.depths else 0,
            round=opening.round,
        )

    @property
    def _place(self) -> int:
        """Our place in the bloc, and so in every roster of it."""
        return believed.card_in(self.state.card)[0].members.index(self.device)

    def _interrupt(self, now: float, event: effects.Conditions) -> Iterator[Effect]:
        """Work that is no longer allowed stops. Nothing is declined: there may be time enough in the window.

        Sealing is never stopped. It is short, and a transcript whose masks may exist is not sealed a second time.
        """
        yield from self._note(now, event)
        if not self.allowed:
            self.phase = Phase.INTERRUPTED
            yield effects.StopWork(self.transcript)
            yield effects.CancelTimer("fetch")

    def _go_on(self, now: float, event: effects.Conditions) -> Iterator[Effect]:
        yield from self._note(now, event)
        if self.allowed:
            yield from self._load()

    def _note(self, now: float, event: effects.Conditions) -> Iterator[Effect]:
        """Conditions as they are from now on; the owner hears when work is no longer allowed, and why."""
        before, self.allowed, self.facts = self.allowed, event.allowed, event.facts
        self.stay_seconds = event.stay_seconds if event.allowed else 0
        if before and not event.allowed:
            yield effects.Tell(f"not working now: {event.reason}")

    def _consume(self, now: float, event: effects.Trained) -> Iterator[Effect]:
        if event.transcript != self.transcript:
            return
        opening = self.open_message
        try:
            checks.owner_allows(opening, self.policy)
        except ProtocolError as error:
            yield effects.Tell(str(error), error.name)
            yield from self._sit_out("policy")
            return
        self.phase = Phase.SEALING
        pace = float(f"{event.seconds / max(event.steps, 1):.2g}")
        yield self._save(consumed=event.transcript, seconds_per_step=pace)
        yield effects.Seal(
            transcript=event.transcript,
            codec=opening.codec,
            position=self._place,
            roster=believed.mask_roster_in(self.state.opened),
            prekey=self.state.prekey,
            entropy=self.entropy(32),
            loss_sum=event.loss_sum,
            labels=event.labels,
            samples=event.samples,
            steps=event.steps,
        )

    def _sealed(self, now: float, event: effects.Sealed) -> Iterator[Effect]:
        if event.transcript != self.transcript:
            return
        yield self._save(report=event.digest, report_size=event.size, prekey=b"")
        self._begin_sending()
        yield from self._offer_report()

    def _failed(self, now: float, event: effects.WorkFailed) -> Iterator[Effect]:
        if event.transcript == self.transcript:
            yield effects.Tell(f"no report for this round: {event.reason}")
            yield from self._sit_out(event.name)

    def _load_failed(self, now: float, event: effects.FetchFailed) -> Iterator[Effect]:
        yield effects.Tell(f"adapter not here yet: {event.reason}")
        if event.final:
            yield from self._sit_out("adapter-unavailable")
        else:
            yield effects.SetTimer("fetch", FETCH_SECONDS)

    def _load_again(self, now: float, event: effects.TimerFired) -> Iterator[Effect]:
        if event.name == "fetch":
            yield effects.FetchBlob(self.announcement.url, self.open_message.adapter)
        else:
            yield from self._overdue(now, event)

    def _window(self) -> effects.SetTimer:
        """A round's lease on this device; a RESULT that is lost must not leave it at work for ever."""
        return effects.SetTimer("result", self.open_message.window_seconds + RESULT_SECONDS)

    def _overdue(self, now: float, event: effects.TimerFired) -> Iterator[Effect]:
        """The window is over and no RESULT has come: the work is stopped, and the decline asks how the round ended."""
        if event.name == "result":
            if self.phase in (Phase.TRAINING, Phase.SEALING):
                yield effects.StopWork(self.transcript)
            yield from self._sit_out("window-over")

    def _sit_out(self, reason: str) -> Iterator[Effect]:
        """Declines the running round: what was to be sent is carried, and the RESULT ends the round."""
        opening = self.open_message
        decline = Decline(
            campaign=opening.campaign,
            bloc=opening.bloc,
            device=self.device,
            transcript=self.transcript,
            reason=reason,
        )
        yield self._save(consumed=self.transcript, prekey=b"")
        self.phase, self.silences = Phase.AWAITING, 0
        yield effects.Publish(topics.control(self.device), self.signer.seal(decline))
        yield effects.SetTimer("result", RESULT_SECONDS)

    # ------------------------------------------------------------ sending
    def _begin_sending(self) -> None:
        self.phase, self.silences = Phase.SENDING, 0
        self.outgoing = Outgoing(self.state.report_size)

    def _offer_report(self) -> Iterator[Effect]:
        if not self.state.report:
            yield from self._sit_out("no-report")
            return
        opening = self.open_message
        report = Report(
            campaign=opening.campaign,
            bloc=opening.bloc,
            device=self.device,
            transcript=self.transcript,
            digest=self.state.report,
            size=self.state.report_size,
            offer=self.outgoing.offer() if self.outgoing is not None else 0,
        )
        yield effects.Publish(topics.control(self.device), self.signer.seal(report))
        if self.phase is Phase.AWAITING:
            yield effects.SetTimer("result", RESULT_SECONDS * 2**self.silences)
        else:
            yield effects.SetTimer("receipt", RECEIPT_SECONDS * 2 ** min(self.silences, RECEIPT_DOUBLINGS))

    def _receipt(self, now: float, message: Receipt) -> Iterator[Effect]:
        if (
            message.transcript != self.transcript
            or message.digest != self.state.report
            or self.outgoing is None
        ):
            return
        self.silences = 0
        if message.refused:
            yield effects.Tell(f"the hub refused the report: {message.refused}", message.refused)
        if message.accepted or message.refused:
            self.phase, self.outgoing = Phase.AWAITING, None
            yield self._save(accepted=message.accepted)
            yield effects.CancelTimer("receipt")
            yield effects.SetTimer("result", RESULT_SECONDS)
            return
        self.outgoing.acknowledge(message.have, message.offer)
        yield from self._send_chunks()

    def _send_chunks(self) -> Iterator[Effect]:
        assert self.outgoing is not None
        for index in self.outgoing.take():
            yield effects.SendChunk(topics.chunks(self.device), self.transcript, self.state.report, index)
        yield effects.SetTimer("receipt", RECEIPT_SECONDS)

    def _receipt_late(self, now: float, event: effects.TimerFired) -> Iterator[Effect]:
        if event.name != "receipt" or self.outgoing is None:
            return
        self.silences += 1
        if self.silences == SILENCES_TOLD:
            yield effects.Tell(
                f"the hub never answers what this device publishes on {topics.control(self.device)}: "
                "check the link, the hub, and the broker's access list",
                "hub-silent",
            )
        yield from self._offer_report()

    def _result_late(self, now: float, event: effects.TimerFired) -> Iterator[Effect]:
        if event.name == "result":
            self.silences = min(self.silences + 1, RESULT_DOUBLINGS)
            yield from self._offer_report()

    # ------------------------------------------------------------ the end of a round
    def _result(self, now: float, argument: tuple[Opened[Result], bytes]) -> Iterator[Effect]:
        result = argument[0].message
        if result.transcript != self.transcript:
            return
        transcript = self.transcript
        if self.phase in (Phase.TRAINING, Phase.SEALING):
            yield effects.StopWork(transcript)
        yield from self._cancel_timers()
        # A hub that does not know the round cannot say that its sum was never opened: count nothing twice.
        lost = result.opened or result.reason == UNKNOWN_ROUND
        yield effects.DropCarry(transcript) if lost else effects.KeepCarry(transcript)
        self.outgoing = None
        yield self._save(
            opened=b"",
            consumed=b"",
            report=b"",
            report_size=0,
            accepted=False,
            ready=b"",
            prekey=b"",
            rounds_opened=self.state.rounds_opened + int(result.opened),
        )
        yield from self._resume(now)
