"""The same sum whatever the order of arrival, and the same run for the same seed."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from playbook import Fleet, campaign, kind_of

from edge_agent import effects as device_effects
from fedge import topics
from fedge.frames import ChunkHeader, encode_frame
from fedge.messages import Open, Result, decode, decode_envelope
from hub import effects as hub_effects
from hub.effects import RoundRow

TESTS = Path(__file__).parents[1]


@given(seed=st.integers(0, 2**32), twice=st.booleans())
@settings(max_examples=12, deadline=None)
def test_any_interleaving_ends_with_the_exact_mean(seed: int, twice: bool) -> None:
    fleet = Fleet(10, seed=seed)
    fleet.filter = lambda to, topic, payload: [payload] * (1 + twice)
    fleet.begin(campaign(10, bloc=5))
    fleet.settle()
    fleet.check()
    assert len(fleet.opened()) == 4


def handed_in(order: Iterable[int]) -> np.ndarray:
    """The adapter after one round whose sealed reports reach the hub in this order."""
    fleet = Fleet(5)
    fleet.filter = lambda to, topic, payload: [] if kind_of(payload) in ("report", "chunk") else [payload]
    fleet.begin(campaign(5, bloc=5, rounds=1))
    fleet.run()
    transcript = next(iter(fleet.hub.rounds))
    for place in order:
        device = fleet.devices[f"d{place:02d}"]
        offer = next(e for e in device.agent._offer_report() if isinstance(e, device_effects.Publish))
        fleet.hub_event(hub_effects.Received(offer.topic, offer.payload))
        frame = encode_frame(ChunkHeader(transcript, device.saved.report, 0), device.reports[transcript])
        fleet.hub_event(hub_effects.Received(topics.chunks(device.name), frame))
    fleet.check()
    assert fleet.campaign.closed
    return fleet.adapter()


IN_ORDER = handed_in(range(5)).tobytes()


@given(order=st.permutations(range(5)))
@settings(max_examples=12, deadline=None)
def test_the_same_reports_in_any_order_give_the_same_bytes(order: list[int]) -> None:
    assert handed_in(order).tobytes() == IN_ORDER


def digest_of_a_run(seed: int = 11) -> str:
    """Everything that a seeded campaign with losses leaves behind: ledger, adapter, what is retained."""
    fleet, lost = Fleet(10, seed=seed), iter(range(5))

    def lose_five_receipts(to: str, topic: str, payload: bytes) -> list[bytes]:
        return [] if kind_of(payload) == "receipt" and next(lost, None) is not None else [payload]

    fleet.filter = lose_five_receipts
    fleet.begin(campaign(10, bloc=5))
    fleet.settle()
    everything = [fleet.ledger, fleet.adapter().tobytes(), list(fleet.retained.items())]
    return hashlib.sha256(msgspec.msgpack.encode(everything)).hexdigest()


def test_one_seed_is_one_run_in_every_process() -> None:
    here = digest_of_a_run()
    assert here == digest_of_a_run()
    assert here != digest_of_a_run(12)
    code = "import test_hub_order; print(test_hub_order.digest_of_a_run())"
    paths = os.pathsep.join(str(path) for path in (TESTS.parent, TESTS, TESTS / "hub"))
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_what_the_hub_says_is_bound_to_what_it_opened() -> None:
    fleet = Fleet(5)
    fleet.begin(campaign(5, bloc=5, rounds=1))
    fleet.settle()
    row = next(row for row in fleet.rows.values() if isinstance(row, RoundRow))
    assert hashlib.sha256(decode_envelope(row.envelope).body).digest() == row.transcript
    assert decode(decode_envelope(row.envelope).body, Open).round == 1
    result = decode(decode_envelope(row.result).body, Result)
    assert (result.transcript, result.opened, result.reason) == (row.transcript, True, "")
