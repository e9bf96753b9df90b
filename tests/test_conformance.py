"""The simulated world does what real processes do: one script, one recorded log, two fleets that must both write it.

`FEDGE_RECORD=1 pytest tests/test_conformance.py` plays the scripts with real processes and writes the recordings anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from fedge import topics
from fedge.errors import UnavailableError
from fedge.frames import decode_frame
from firmware_sim.conformance import (
    CAMPAIGN,
    Action,
    Cue,
    Log,
    Prompter,
    Recording,
    Script,
    canonical,
    differences,
    replay_processes,
    replay_world,
)
from hub.effects import LedgerEntry

RECORDINGS = Path(__file__).parent / "recordings"
NAMES = sorted(path.stem for path in RECORDINGS.glob("*.json"))
DEVICES = ("d000000", "d000001", "d000002", "d000003", "d000004")


def recorded(name: str) -> Recording:
    return msgspec.json.decode((RECORDINGS / f"{name}.json").read_bytes(), type=Recording)


def record(recording: Recording, log: Log) -> None:
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(recording, log=log)), indent=1)
    (RECORDINGS / f"{recording.script.name}.json").write_bytes(text + b"\n")


def write_data(folder: Path, script: Script) -> dict[str, Path]:
    encoder, found = msgspec.json.Encoder(), {}
    for number, name in enumerate(script.names):
        lines = [
            {"prompt": f"how are you {line}", "completion": f"i am fine {(line * 7 + number) % 10}"}
            for line in range(48)
        ]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_bytes(encoder.encode_lines(lines))
    return found


# ---------------------------------------------------------------- the two modes
@pytest.mark.processes
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", NAMES)
def test_real_processes_write_the_recorded_log(tmp_path: Path, tiny_bundle: Path, name: str) -> None:
    recording = recorded(name)
    data = write_data(tmp_path, recording.script)
    log = canonical(replay_processes(recording.script, tmp_path / "fleet", tiny_bundle, data))
    if os.environ.get("FEDGE_RECORD"):
        record(recording, log)
    assert differences(recorded(name).log, log) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_the_world_writes_the_recorded_log(name: str, seed: int) -> None:
    recording = recorded(name)
    assert differences(recording.log, canonical(replay_world(recording.script, seed))) == []


def test_the_recordings_have_every_action_and_nothing_misplaced() -> None:
    recordings = [recorded(name) for name in NAMES]
    assert {cue.action for one in recordings for cue in one.script.cues} == set(get_args(Action))
    assert all(one.log.closed and not one.log.misplaced for one in recordings)


class Losing:
    """A world that is not like the real one: the chunks of one device's reports are lost, from its `first`th round."""

    def __init__(self, device: str, first: int, last: int) -> None:
        self.topic, self.first, self.last = topics.chunks(device), first, last
        self.transcripts: list[bytes] = []
        self.counts: dict[str, int] = {}

    def arm(self, world: object) -> None:
        pass

    def on_save(self, world: object, number: int) -> str:
        return ""

    def on_message(
        self, world: object, to: int, topic: str, payload: bytes
    ) -> list[tuple[float, bytes]] | None:
        if topic != self.topic:
            return None
        transcript = decode_frame(payload)[0].transcript
        if transcript not in self.transcripts:
            self.transcripts.append(transcript)
        return [] if self.first <= len(self.transcripts) <= self.last else None

    def on_blob(self, world: object, number: int, data: bytes) -> bytes:
        return data


def test_a_world_that_loses_one_kind_of_message_does_not_conform() -> None:
    recording = recorded("one-bloc")
    log = canonical(replay_world(recording.script, 0, faults=Losing("d000004", first=2, last=2)))
    found = differences(recording.log, log)
    assert any("window-over" in line for line in found), found


def test_a_script_that_was_not_played_to_its_end_is_no_evidence() -> None:
    cue = Cue(kind="open", round=9, action="restart-hub")
    with pytest.raises(UnavailableError, match="not played"):
        replay_world(Script(name="s", devices=5, bloc=5, rounds=1, cues=(cue,)), 0)


# ---------------------------------------------------------------- what the comparison sees
def entry(kind: str, round_: int = 0, device: str = "", **detail: str | float) -> LedgerEntry:
    bloc = "bloc-0" if kind in ("formed", "open", "report", "opened", "sat-out") else ""
    return LedgerEntry(
        at=0.0, kind=kind, campaign=CAMPAIGN, bloc=bloc, device=device, round=round_, detail=detail
    )


def ledger() -> list[LedgerEntry]:
    """Five devices, one round that is opened and one that sits out."""
    return [
        entry("campaign"),
        *(entry("ready", device=device) for device in DEVICES),
        entry("formed", members=",".join(DEVICES)),
        entry("open", 1),
        *(entry("report", 1, device) for device in DEVICES),
        entry("opened", 1, training_loss=2.0),
        entry("open", 2),
        entry("report", 2, DEVICES[0]),
        entry("sat-out", 2, reason="window-over"),
        entry("closed"),
    ]


Change = Callable[[list[LedgerEntry]], list[LedgerEntry]]


def without(kind: str, device: str = "") -> Change:
    return lambda old: [one for one in old if not (one.kind == kind and device in ("", one.device))]


def twice(kind: str) -> Change:
    return lambda old: [one for one in old for _ in range(1 + (one.kind == kind))]


def with_reason(reason: str) -> Change:
    return lambda old: [
        msgspec.structs.replace(one, detail={"reason": reason}) if one.kind == "sat-out" else one
        for one in old
    ]


def with_members(*members: str) -> Change:
    return lambda old: [
        msgspec.structs.replace(one, detail={"members": ",".join(members)}) if one.kind == "formed" else one
        for one in old
    ]


@pytest.mark.parametrize(
    "change",
    [
        without("ready", DEVICES[2]),
        without("report", DEVICES[1]),
        without("report"),
        without("open"),
        without("opened"),
        without("closed"),
        twice("report"),
        twice("opened"),
        with_reason("window-open"),
        with_members(*DEVICES[:4], "d000009"),
        lambda old: [*old[:8], old[13], *old[8:13], *old[14:]],  # opened before anybody reported
        lambda old: [*old, entry("report", 2, DEVICES[0])],  # taken after the campaign had closed
        lambda old: [*old[:-1], entry("quarantined", device=DEVICES[0]), old[-1]],
    ],
)
def test_a_difference_that_matters_is_seen(change: Change) -> None:
    changed = change(ledger())
    assert changed != ledger()
    assert differences(canonical(ledger()), canonical(changed))


def test_what_only_time_decides_is_not_compared() -> None:
    old = ledger()
    reports = old[8:13]
    late = [msgspec.structs.replace(one, at=one.at + 100.0) for one in old]
    assert canonical(late) == canonical(old)
    assert canonical([*old[:8], *reversed(reports), *old[13:]]) == canonical(old)
    others = [one for one in old if not (one.round == 2 and one.kind == "report")]
    assert canonical(others) == canonical(old)
    assert canonical([*old[:5], entry("refused", device=DEVICES[0]), *old[5:]]) == canonical(old)


def test_a_whole_log_has_nothing_misplaced() -> None:
    log = canonical(ledger())
    assert log.misplaced == ()
    assert [(one.number, one.ended, one.reason, one.reported) for one in log.blocs[0].rounds] == [
        (1, "opened", "", DEVICES),
        (2, "sat-out", "window-over", ()),
    ]


def test_a_cue_is_given_once_and_must_be_given() -> None:
    cue = Cue(kind="report", round=1, of=DEVICES[1], action="kill-device", device=DEVICES[1])
    prompter = Prompter(Script(name="s", devices=5, bloc=5, rounds=1, cues=(cue,)))
    with pytest.raises(UnavailableError, match="not played"):
        prompter.check()
    given = [prompter.take(one) for one in [*ledger(), *ledger()]]
    assert [cues for cues in given if cues] == [[cue]]
    prompter.check()
