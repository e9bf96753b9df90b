"""A hub that wants to open less than a whole bloc: on the reports of real agents, all of whom took part."""

from itertools import combinations

import numpy as np
import pytest
from adversary import Bench, changed
from playbook import campaign

from fedge import topics
from fedge.errors import IntegrityError, ProtocolError
from fedge.secagg.bloc import BlocSum
from fedge.update.report import read_sum, report_layout

NUMBERS = campaign(8).numbers


def reports_to(stage: Bench, opens: dict[str, bytes]) -> list[bytes]:
    """Every device is shown the card and the OPEN that the hub chose for it; their masked bodies, in bloc order."""
    for name, envelope in opens.items():
        stage.fleet.publish("hub", topics.commands(name), stage.held[name]["bloccard"], False)
        stage.fleet.publish("hub", topics.commands(name), envelope, False)
    stage.fleet.filter = lambda to, topic, payload: [] if to == "hub" else [payload]
    stage.fleet.run()
    devices = [stage.fleet.devices[name] for name in stage.card.members]
    return [device.reports[device.seals[0]] for device in devices]


def chi_square(data: bytes) -> float:
    """Of the bytes' histogram: 255 degrees of freedom, so mean 255 and standard deviation 22.6."""
    expected = len(data) / 256
    return float(
        np.sum((np.bincount(np.frombuffer(data, np.uint8), minlength=256) - expected) ** 2 / expected)
    )


def summed(bodies: list[bytes], layout: object) -> bytes:
    words = np.sum([layout.views(body)[0] for body in bodies], axis=0, dtype=np.uint16)
    return words.tobytes()


def test_a_sum_without_one_member_is_not_opened_and_says_nothing() -> None:
    stage = Bench()
    bodies = reports_to(stage, {name: held["open"] for name, held in stage.held.items()})
    layout = report_layout(NUMBERS, stage.opening.codec.bits)
    for seven in combinations(range(8), 7):
        total = BlocSum(stage.victim.seals[0], stage.card.members, layout)
        for place in seven:
            total.add(stage.card.members[place], bodies[place])
        with pytest.raises(ProtocolError) as refusal:
            total.open()
        assert refusal.value.name == "bloc-not-whole"
        assert chi_square(summed([bodies[place] for place in seven], layout)) < 255 + 5 * 22.6
    assert chi_square(summed(bodies, layout)) > 1_000, "the whole sum is a bell, so the test can see one"


def test_two_opens_shown_to_two_halves_do_not_cancel() -> None:
    """Each device sees one good OPEN and takes part. The masks are of two transcripts and stay in the sum."""
    stage = Bench()
    other = stage.hub.seal(changed(stage.opening, window_seconds=9))
    opens = {
        name: (other if place < 4 else stage.open_envelope) for place, name in enumerate(sorted(stage.held))
    }
    bodies = reports_to(stage, opens)
    assert len({device.seals[0] for device in stage.fleet.devices.values()}) == 2, "all of them took part"
    layout = report_layout(NUMBERS, stage.opening.codec.bits)
    total = BlocSum(stage.victim.seals[0], stage.card.members, layout)
    for name, report in zip(stage.card.members, bodies, strict=True):
        total.add(name, report)
    assert chi_square(summed(bodies, layout)) < 255 + 5 * 22.6
    with pytest.raises(IntegrityError):
        read_sum(*total.open(), codec=stage.opening.codec, devices=8, numbers=NUMBERS)
