"""What must hold all the same: judged from outside, while a world runs, by what its machines made durable and said.

`Invariants` sees every effect of every device and of the hub after it was carried out (`device`, `hub`), and the
whole fleet from time to time. The first rule that is broken raises InvariantBroken with the seed, the last events and
the command that replays them. Judging draws no randomness and changes nothing: a world runs the same with and without.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Final, NoReturn

from fedge.errors import InvariantBroken
from fedge.limits import BLOC_DEVICES_MIN
from fedge.secagg.leverage import leverages
from firmware_sim.rules.device_rules import DeviceRules
from firmware_sim.rules.hub_rules import HubRules, Sent

TRAIL_EVENTS: Final = 50
# The singular values of more are not worth their time: the partition rule covers them.
LEVERAGE_DEVICES_MAX: Final = 64
HUB: Final = "hub"

Clock = Callable[[], tuple[float, int]]  # seconds since the start, number of the event


class Invariants:
    """All rules over one world. `clock` says when; the other looks into the world are those of HubRules.

    `exact_every`: of how many opened sums one is worked out again word by word; which ones, their transcripts say.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        sent: Sent,
        blob: Callable[[bytes], bytes],
        floor: Callable[[str], int] = lambda device: BLOC_DEVICES_MIN,
        exact_every: int = 1,
        seed: int = 0,
        replay: str = "",
    ) -> None:
        self._clock = clock
        self._seed, self._replay = seed, replay
        self._trail: deque[tuple[float, str, object]] = deque(maxlen=TRAIL_EVENTS)
        self.hub_rules = HubRules(
            self.fail,
            lambda: self.device_rules,
            sent=sent,
            blob=blob,
            exact_every=exact_every,
        )
        self.device_rules = DeviceRules(self.fail, self.hub_rules.fate, floor)

    # ------------------------------------------------------------ what happens
    def device(self, name: str, effect: object) -> None:
        """An effect of a device was carried out."""
        at, _ = self._clock()
        self._trail.append((at, name, effect))
        self.device_rules.carried_out(at, name, effect)

    def hub(self, effect: object) -> None:
        """An effect of the hub was carried out; a Save is durable."""
        self._trail.append((self._clock()[0], HUB, effect))
        self.hub_rules.carried_out(effect)

    # ------------------------------------------------------------ from time to time
    def leases_end(self, unix: float) -> None:
        """No round is open long after its window. Call it while the hub is up."""
        row = self.hub_rules.overdue(unix)
        if row is not None:
            self.fail("lease", f"round {row.round} of {row.bloc} is open long after its window")

    def leverage_holds(self) -> None:
        """The audit itself over every sum ever opened, for fleets small enough."""
        for known in self.hub_rules.campaigns.values():
            if len(known.partition) > LEVERAGE_DEVICES_MAX:
                continue
            blocs = {member: bloc for bloc in known.blocs.values() if bloc.opened for member in bloc.members}
            opened = {bloc.members: None for bloc in blocs.values()}
            for device, share in leverages(opened).items():
                if share > 1 / len(blocs[device].members) + 1e-9:
                    self.fail("leverage", f"{share:.3f} of {device}'s update can be resolved")

    # ------------------------------------------------------------ what was seen
    @property
    def looked(self) -> Counter[str]:
        """How often there was something to judge: opened and sat-out rounds, exact sums, folds, accepted reports."""
        return self.hub_rules.looked

    @property
    def trail(self) -> tuple[str, ...]:
        """The last events, oldest first."""
        return tuple(f"{at:12.3f} {who:>8} {_short(effect)}" for at, who, effect in self._trail)

    def fail(self, invariant: str, text: str) -> NoReturn:
        """Raises InvariantBroken with everything that is needed to see it again."""
        at, event = self._clock()
        raise InvariantBroken(
            invariant, text, seed=self._seed, event=event, at=at, trail=self.trail, replay=self._replay
        )


def _short(effect: object, chars_max: int = 160) -> str:
    text = repr(effect)
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."
