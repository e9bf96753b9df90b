"""Every rule can break: one good campaign is recorded, then told again with one thing wrong, and the rule says so.

The story is that of five devices over two rounds, of which the first sits out, so that work is carried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from playbook import campaign, kind_of
from watched_fleet import WatchedFleet

from edge_agent import effects as device_effects
from edge_agent.effects import AgentState
from fedge.errors import InvariantBroken
from fedge.messages import Receipt, decode, decode_envelope
from fedge.secagg.bloc import BlocSum
from firmware_sim.rules.hub_rules import LEASE_SECONDS
from firmware_sim.rules.invariants import TRAIL_EVENTS, Invariants
from hub import effects as hub_effects
from hub.effects import BlocRow, CampaignRow, DeviceRow, RoundRow, Save

Effect = device_effects.Effect | hub_effects.Effect
Line = tuple[str, Effect]  # who, what


@dataclass
class Story:
    """What was carried out in a campaign, in order, and what its devices held."""

    lines: list[Line] = field(default_factory=list)
    sent: dict[tuple[str, bytes], np.ndarray] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)

    def told(self, lines: list[Line], **looks: object) -> Invariants:
        """Judges a version of the story."""
        number = iter(range(10**6))
        invariants = Invariants(
            lambda: (1.5, next(number)),
            **{
                "sent": lambda name, transcript: self.sent.get((name, transcript)),
                "blob": self.blobs.__getitem__,
                "seed": 9,
                "replay": "fedge sim world x --seed 9",
                **looks,
            },
        )
        for who, effect in lines:
            if who == "hub":
                invariants.hub(effect)
            else:
                invariants.device(who, effect)
        return invariants

    def where(self, wanted: Callable[[str, Effect], bool], skip: int = 0) -> int:
        """The place of a line."""
        return [at for at, line in enumerate(self.lines) if wanted(*line)][skip]

    def changed(self, at: int, *lines: Line) -> list[Line]:
        """The story with other lines in place of the one at `at`."""
        return [*self.lines[:at], *lines, *self.lines[at + 1 :]]


class RecordedFleet(WatchedFleet):
    """Writes down what it does."""

    def __init__(self, devices: int) -> None:
        self.story = Story()
        super().__init__(devices, seed=2)
        hub, device = self.invariants.hub, self.invariants.device
        self.invariants.hub = lambda effect: (self.story.lines.append(("hub", effect)), hub(effect))
        self.invariants.device = lambda name, effect: (self._note(name, effect), device(name, effect))

    def _note(self, name: str, effect: Effect) -> None:
        self.story.lines.append((name, effect))
        for transcript, sent in self.devices[name].sent.items():
            self.story.sent[name, transcript] = sent


@pytest.fixture(scope="module")
def story() -> Story:
    fleet, lost = RecordedFleet(5), []

    def one_report_lost(to: str, topic: str, payload: bytes) -> list[bytes]:
        if kind_of(payload) == "chunk" and not lost:
            fleet.now += 4_000  # the window passes
            lost.append(topic)
            fleet.hub_event(hub_effects.TimerFired("tick"))
        return [payload]

    fleet.filter = one_report_lost
    fleet.begin(campaign(5, bloc=5, rounds=2))
    fleet.settle()
    fleet.check()
    fleet.story.blobs = fleet.blobs
    looked = fleet.invariants.looked
    assert looked["sat-out"] == 1
    assert looked["opened"] == looked["exact"] == looked["fold"] == 2
    return fleet.story


def saves(kind: type, **values: object) -> Callable[[str, Effect], bool]:
    """Lines of the hub that save such a row."""

    def wanted(who: str, effect: Effect) -> bool:
        row = effect.row if isinstance(effect, Save) else None
        return isinstance(row, kind) and all(getattr(row, name) == value for name, value in values.items())

    return wanted


def does(kind: type, **values: object) -> Callable[[str, Effect], bool]:
    """Lines of a device with such an effect."""

    def wanted(who: str, effect: Effect) -> bool:
        return (
            who != "hub"
            and isinstance(effect, kind)
            and all(getattr(effect, name) == value for name, value in values.items())
        )

    return wanted


def broken(story: Story, lines: list[Line], **looks: object) -> str:
    with pytest.raises(InvariantBroken) as caught:
        story.told(lines, **looks)
    return caught.value.invariant


def states(story: Story, **values: object) -> int:
    """The first Save of a device whose state has these fields, True meaning any."""

    def wanted(who: str, effect: Effect) -> bool:
        if who == "hub" or not isinstance(effect, device_effects.Save):
            return False
        return all(
            bool(getattr(effect.state, name)) if value is True else getattr(effect.state, name) == value
            for name, value in values.items()
        )

    return story.where(wanted)


def with_state(story: Story, at: int, **changes: object) -> list[Line]:
    who, effect = story.lines[at]
    return story.changed(at, (who, device_effects.Save(msgspec.structs.replace(effect.state, **changes))))


def with_row(story: Story, at: int, **changes: object) -> list[Line]:
    return story.changed(at, ("hub", Save(msgspec.structs.replace(story.lines[at][1].row, **changes))))


def test_the_story_itself_holds(story: Story) -> None:
    told = story.told(story.lines)
    told.leverage_holds()
    told.leases_end(1e12)
    assert told.looked["accepted"] >= 10
    assert story.told(story.lines, exact_every=2**40).looked["exact"] == 0, "sampled by the transcript"


def test_what_is_broken_comes_with_all_that_is_needed(story: Story) -> None:
    at = states(story, boot=1, counter=1)
    with pytest.raises(InvariantBroken) as caught:
        story.told([*story.lines, story.lines[at]])
    error = caught.value
    assert (error.invariant, error.seed, error.at) == ("goes-back", 9, 1.5)
    assert len(error.trail) == TRAIL_EVENTS
    assert "Save" in error.trail[-1]
    assert str(error).endswith("Replay it: fedge sim world x --seed 9")
    assert error.event > len(story.lines)


# ---------------------------------------------------------------- devices
def test_a_mask_before_consumed_is_durable(story: Story) -> None:
    at = states(story, consumed=True)
    assert broken(story, story.changed(at)) == "consumed"
    assert broken(story, with_state(story, at, consumed=b"")) == "consumed"


def test_a_transcript_masked_twice_and_a_prekey_of_two_rounds(story: Story) -> None:
    at = story.where(does(device_effects.Seal))
    who, seal = story.lines[at]
    assert broken(story, story.changed(at, (who, seal), (who, seal))) == "masked-twice"
    later = story.where(lambda w, e: w == who and isinstance(e, device_effects.Seal), 1)
    again = msgspec.structs.replace(story.lines[later][1], prekey=seal.prekey)
    assert broken(story, story.changed(later, (who, again))) == "prekey-twice"


def test_a_bloc_smaller_than_its_owner_allows(story: Story) -> None:
    assert broken(story, story.lines, floor=lambda device: 6) == "leverage"


def test_a_report_that_leaves_before_it_is_durable(story: Story) -> None:
    at = states(story, report=True)
    assert broken(story, story.changed(at)) == "report-before-chunk"
    chunk = story.where(does(device_effects.SendChunk))
    who, effect = story.lines[chunk]
    other = msgspec.structs.replace(effect, digest=bytes(32))
    assert broken(story, story.changed(chunk, (who, other))) == "report-before-chunk"


def test_a_ready_that_is_not_durable(story: Story) -> None:
    at = states(story, ready=True)
    assert broken(story, story.changed(at)) == "ready-before-save"


@pytest.mark.parametrize(
    ("now", "changes", "rule"),
    [
        ({"accepted": True}, {"report": bytes(32)}, "second-report"),
        ({"accepted": True}, {"consumed": b""}, "consumed"),
        ({"accepted": True}, {"last_round": 0}, "goes-back"),
        ({"accepted": True}, {"counter": 0}, "goes-back"),
    ],
)
def test_what_a_device_must_not_forget(
    story: Story, now: dict[str, object], changes: dict[str, object], rule: str
) -> None:
    assert broken(story, with_state(story, states(story, **now), **changes)) == rule


def test_another_bloc_or_another_round_before_the_end_of_the_first(story: Story) -> None:
    at = states(story, accepted=True)
    who, effect = story.lines[at]
    state: AgentState = effect.state
    assert broken(story, with_state(story, at, card=state.ready)) == "second-partition"
    later = max(
        i
        for i, (w, e) in enumerate(story.lines)
        if w == who and isinstance(e, device_effects.Save) and e.state.opened
    )
    assert broken(story, with_state(story, at, opened=story.lines[later][1].state.opened)) == "two-rounds"


def test_work_that_is_lost_or_counted_twice(story: Story) -> None:
    kept = story.where(does(device_effects.KeepCarry))
    who, effect = story.lines[kept]
    assert (
        broken(story, story.changed(kept, (who, device_effects.DropCarry(effect.transcript)))) == "lost-work"
    )
    dropped = story.where(does(device_effects.DropCarry), 5)  # the first five follow a new campaign
    who, effect = story.lines[dropped]
    assert (
        broken(story, story.changed(dropped, (who, device_effects.KeepCarry(effect.transcript))))
        == "counted-twice"
    )


def test_a_carry_that_is_never_dropped_is_counted_twice(story: Story) -> None:
    """What the hub opens in the second sum has the first in it again."""
    opened = story.where(saves(RoundRow, state="opened"))
    who = next(w for w, e in story.lines if w != "hub")
    lines = [
        line
        for at, line in enumerate(story.lines)
        if not (at > opened and line[0] == who and isinstance(line[1], device_effects.DropCarry))
    ]
    assert broken(story, lines) == "counted-twice"


# ---------------------------------------------------------------- the hub
def the_whole_sum(story: Story) -> int:
    """Where the first complete sum is saved."""
    return story.where(
        lambda who, e: (
            isinstance(e, Save)
            and isinstance(e.row, RoundRow)
            and bool(e.row.sum)
            and BlocSum.from_bytes(e.row.sum).whole
        )
    )


def test_a_sum_without_a_member_or_with_another_report(story: Story) -> None:
    at = the_whole_sum(story)
    assert broken(story, story.changed(at)) == "whole-blocs"
    total = BlocSum.from_bytes(story.lines[at][1].row.sum)
    total._digests[total.members[0]] = bytes(32)
    assert broken(story, with_row(story, at, sum=total.to_bytes())) == "whole-blocs"


def test_words_that_nobody_sent(story: Story) -> None:
    at = the_whole_sum(story)
    total = BlocSum.from_bytes(story.lines[at][1].row.sum)
    total._total[3] ^= 1
    assert broken(story, with_row(story, at, sum=total.to_bytes())) == "exact-sum"
    assert broken(story, story.lines, sent=lambda name, transcript: None) == "lost-work"


def test_a_report_that_leaves_the_sum_again(story: Story) -> None:
    row = story.lines[the_whole_sum(story)][1].row
    empty = BlocSum(row.transcript, BlocSum.from_bytes(row.sum).members, BlocSum.from_bytes(row.sum).layout)
    at = the_whole_sum(story)
    lines = story.changed(
        at, story.lines[at], ("hub", Save(msgspec.structs.replace(row, sum=empty.to_bytes())))
    )
    assert broken(story, lines) == "lost-report"


def test_an_acknowledgement_before_the_commit(story: Story) -> None:
    def accepts(who: str, effect: Effect) -> bool:
        if (
            who != "hub"
            or not isinstance(effect, hub_effects.Publish)
            or kind_of(effect.payload) != "receipt"
        ):
            return False
        return decode(decode_envelope(effect.payload).body, Receipt).accepted

    at = story.where(accepts)
    before = max(i for i in range(at) if saves(RoundRow)(*story.lines[i]))
    assert broken(story, story.changed(before)) == "acknowledged"


def test_an_adapter_that_is_not_the_fold(story: Story) -> None:
    at = story.where(saves(CampaignRow, adapter_version=1))
    row = story.lines[at][1].row
    other = np.frombuffer(story.blobs[row.adapter.sha256], "<f4") * np.float32(1.01)
    name = hashlib.sha256(other.tobytes()).digest()
    story.blobs[name] = other.tobytes()
    ref = msgspec.structs.replace(row.adapter, sha256=name)
    assert broken(story, with_row(story, at, adapter=ref)) == "fold"
    before = story.where(saves(CampaignRow, adapter_version=0))
    assert (
        broken(
            story,
            [
                *story.lines[: before + 1],
                ("hub", Save(msgspec.structs.replace(story.lines[before][1].row, adapter=ref))),
            ],
        )
        == "fold"
    )


def test_half_a_transaction(story: Story) -> None:
    assert broken(story, story.changed(story.where(saves(RoundRow, state="opened")))) == "fold"
    assert broken(story, story.changed(story.where(saves(CampaignRow, adapter_version=1)))) == "fold"


def test_a_round_that_ends_twice(story: Story) -> None:
    at = story.where(saves(RoundRow, state="sat-out"))
    assert (
        broken(
            story,
            story.changed(
                at,
                story.lines[at],
                ("hub", Save(msgspec.structs.replace(story.lines[at][1].row, state="opened"))),
            ),
        )
        == "round-ends-once"
    )


def test_blocs_do_not_change_and_share_nobody(story: Story) -> None:
    at = story.where(saves(BlocRow))
    row: BlocRow = story.lines[at][1].row
    turned = msgspec.structs.replace(row, members=row.members[::-1])
    assert broken(story, story.changed(at, story.lines[at], ("hub", Save(turned)))) == "partition"
    second = msgspec.structs.replace(row, id="bloc-9")
    assert broken(story, story.changed(at, story.lines[at], ("hub", Save(second)))) == "partition"
    assert broken(story, with_row(story, at, members=row.members[:4])) == "leverage"


def test_what_a_hub_must_not_forget(story: Story) -> None:
    last = DeviceRow(id="d00", counter=0)
    assert broken(story, [*story.lines, ("hub", Save(last))]) == "goes-back"
    old = story.lines[story.where(saves(CampaignRow, adapter_version=0))]
    assert broken(story, [*story.lines, old]) == "goes-back"
    bloc = story.lines[story.where(saves(BlocRow))]
    assert broken(story, [*story.lines, bloc]) == "goes-back"


def test_a_round_long_after_its_window(story: Story) -> None:
    at = story.where(saves(RoundRow, state="open"))
    told = story.told(story.lines[: at + 1])
    row = story.lines[at][1].row
    told.leases_end(row.opened_at + 3_600 + LEASE_SECONDS - 1)
    with pytest.raises(InvariantBroken, match="long after its window"):
        told.leases_end(row.opened_at + 3_600 + LEASE_SECONDS + 1)


def test_the_audit_sees_two_partitions(story: Story) -> None:
    told = story.told(story.lines)
    known = told.hub_rules.campaigns["c1"]
    bloc = next(iter(known.blocs.values()))
    known.blocs["bloc-9"] = msgspec.structs.replace(bloc, id="bloc-9", members=(*bloc.members[1:], "d09"))
    with pytest.raises(InvariantBroken, match="can be resolved"):
        told.leverage_holds()
