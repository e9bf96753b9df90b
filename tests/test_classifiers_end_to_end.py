"""Classifiers in a real fleet: labelled texts and labelled recordings, each device with a few of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import encoders
import msgspec
import pytest
import whispers
from test_end_to_end import running, wish

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("processes")]
DEVICES = 5


def test_a_fleet_learns_to_tell_recordings_apart(tmp_path: Path, audio_folder: Path) -> None:
    data = {
        f"device-{number}": whispers.write_recordings(tmp_path / f"person-{number}", each=4)
        for number in range(DEVICES)
    }
    _learns(tmp_path, audio_folder / "bundle", data)


def test_a_fleet_learns_to_tell_texts_apart(tmp_path: Path, classifier_folder: Callable[[str], Path]) -> None:
    data = {}
    for number in range(DEVICES):
        path = tmp_path / f"person-{number}.jsonl"
        rows = [
            {"text": f"{word} {place} {number}", "label": label}
            for place in range(8)
            for label, word in zip(encoders.CLASSES, ("yes", "no", "why"), strict=False)
        ]
        path.write_bytes(msgspec.json.Encoder().encode_lines(rows))
        data[f"device-{number}"] = path
    _learns(tmp_path, classifier_folder("bert") / "bundle", data)


def _learns(folder: Path, bundle: Path, data: dict[str, Path]) -> None:
    with running(folder, bundle, data=data, broker="embedded") as run:
        run.start(dataclasses.replace(wish(DEVICES), rate=0.05))
        run.until(lambda: run.count("closed"))
        run.check(rounds=2, blocs=1, bloc=DEVICES)
