"""Recordings as data: WAV files of every make, bad ones, folders and lists, and paths that lead elsewhere."""

from __future__ import annotations

import json
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import whispers

from edge_agent.dataset import AudioRow, Reading, batches, load_recordings, make_batch, read_records
from edge_agent.dataset.audio_wave import read_wave
from edge_agent.dataset.preview import lines, preview_of_recordings
from fedge.audio import AudioInput
from fedge.errors import DataError

AUDIO = AudioInput(mels=16, samples=3_200)
CLASSES = whispers.CLASSES


def samples(path: Path) -> np.ndarray:
    return read_wave(path, 3_200, 16_000).samples


# ---------------------------------------------------------------- every make
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_pcm_of_every_width_is_heard(tmp_path: Path, width: int, channels: int) -> None:
    sound = whispers.tone(500, 0.1)
    both = np.stack([sound, 0.5 * sound], 1) if channels == 2 else sound
    expected = 0.75 * sound if channels == 2 else sound
    found = samples(whispers.write_wave(tmp_path / "a.wav", both, width=width))
    assert np.abs(found - expected).max() <= 1.01 * 2.0 ** (1 - 8 * width) + 1e-7


def extend(path: Path, kind: int = 1, rest: str = "000000001000800000aa00389b71") -> None:
    """The same file as WAVE_FORMAT_EXTENSIBLE, with a chunk of an odd size before its format."""
    data = path.read_bytes()
    fmt = b"\xfe\xff" + data[22:36] + struct.pack("<HHIH", 22, 8 * data[32], 0, kind) + bytes.fromhex(rest)
    body = b"WAVE" + b"LIST\x03\0\0\0abc\0" + b"fmt " + struct.pack("<I", len(fmt)) + fmt + data[36:]
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 1)])
def test_the_extensible_form_is_heard_as_the_plain_one(tmp_path: Path, width: int, channels: int) -> None:
    """Python's own reader knows it from 3.12 on."""
    sound = np.stack([whispers.tone(500, 0.1), whispers.tone(300, 0.1)][:channels], 1)
    path = whispers.write_wave(tmp_path / "a.wav", sound, width=width)
    plain = samples(path)
    extend(path)
    np.testing.assert_array_equal(samples(path), plain)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_rate_gives_the_same_sound(tmp_path: Path, rate: int) -> None:
    times = np.arange(rate) / rate
    path = whispers.write_wave(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 700 * times), rate)
    found = read_wave(path, 3_200, 16_000)
    expected = 0.5 * np.sin(2 * np.pi * 700 * np.arange(3_200) / 16_000)
    assert found.more
    assert len(found.samples) == 3_200
    assert np.abs(found.samples - expected)[400:].max() <= 1e-3  # up to the last: what follows is read, too


def test_a_giant_file_costs_what_its_beginning_costs(tmp_path: Path) -> None:
    """Three gigabytes by its header, of which a hole in the file holds all but the first second."""
    path = whispers.write_wave(tmp_path / "a.wav", whispers.tone(500, 1))
    size = 3 * 10**9
    with path.open("r+b") as stream:
        stream.seek(4)
        stream.write(struct.pack("<I", size + 36))
        stream.seek(40)
        stream.write(struct.pack("<I", size))
        stream.truncate(size + 44)
    found = read_wave(path, 3_200, 16_000)
    assert found.more
    assert np.abs(found.samples - whispers.tone(500, 1)[:3_200]).max() <= 1e-4


# ---------------------------------------------------------------- bad files
def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def _cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


def _floats(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20:22] = struct.pack("<H", 3)  # WAVE_FORMAT_IEEE_FLOAT
    path.write_bytes(data)


def _extended_floats(path: Path) -> None:
    extend(path, 3)


def _extended_by_another(path: Path) -> None:
    extend(path, rest="00" * 14)


def _rate(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[24:28] = struct.pack("<I", 1_000)
    path.write_bytes(data)


def _many_channels(path: Path) -> None:
    with wave.open(str(path), "wb") as target:
        target.setparams((6, 2, 16_000, 0, "NONE", ""))
        target.writeframes(bytes(6 * 2 * 100))


def _no_wave(path: Path) -> None:
    path.write_bytes(b"ID3\x04" + bytes(200))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_cut_off, "cut off: its header promises 3,200 frames, 2,950 are there"),
        (_cut_in_header, "ends within its header"),
        (_floats, "unknown format"),
        (_extended_floats, "unknown format: 3.*Save it as PCM: ffmpeg"),
        (_extended_by_another, "unknown.*Save it as PCM: ffmpeg"),
        (_rate, "rate is 1000 Hz"),
        (_many_channels, "6 channels"),
        (_no_wave, "does not start with RIFF"),
        (Path.unlink, "is no file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_file_is_told_with_its_name_and_reason(tmp_path: Path, spoil: object, reason: str) -> None:
    path = whispers.write_wave(tmp_path / "bad.wav", whispers.tone(500, 0.2))
    spoil(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=reason) as caught:
        samples(path)
    assert "bad.wav" in str(caught.value)


def test_a_bad_file_stops_or_is_passed_over_as_the_owner_says(tmp_path: Path) -> None:
    whispers.write_recordings(tmp_path, 2)
    _cut_off(tmp_path / "low" / "1.wav")
    with pytest.raises(DataError, match=r"low/1\.wav cannot be heard"):
        load_recordings(tmp_path, AUDIO, CLASSES)
    found = load_recordings(tmp_path, AUDIO, CLASSES, reading=Reading(skip_lines=1))
    assert (len(found.rows), found.counts.bad) == (5, 1)


# ---------------------------------------------------------------- folders and lists
def test_a_folder_for_each_class(tmp_path: Path) -> None:
    """In an order that has no class by itself, or holding out every fifth would hold out one class."""
    whispers.write_recordings(tmp_path, 10, seconds=0.5)
    found = load_recordings(tmp_path, AUDIO, CLASSES)
    labels = [row.label for row in found.rows]
    assert [labels.count(number) for number in range(3)] == [10, 10, 10]
    assert len(set(labels[:8])) == len(set(labels[4::5])) == 3
    assert found.counts.shortened == 30
    batch = make_batch(found.rows[:4], pad_id=0)
    assert (batch.ids.shape, batch.ids.dtype, batch.mask.shape) == ((4, 16, 20), np.float32, (4, 10))
    assert batch.classes is not None
    assert batch.classes.tolist() == labels[:4]
    assert not (batch.labels >= 0).any()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_names_files_beside_it(tmp_path: Path, form: str) -> None:
    whispers.write_recordings(tmp_path / "clips", 1)
    rows = [(f"clips/{name}/0.wav", name) for name in CLASSES]
    text = (
        "\n".join(["audio,label", *(f"{path},{label}" for path, label in rows)])
        if form == "csv"
        else "\n".join(json.dumps({"audio": path, "label": label}) for path, label in rows)
    )
    path = tmp_path / f"list.{form}"
    path.write_text(text)
    assert [row.label for row in load_recordings(path, AUDIO, CLASSES).rows] == [0, 1, 2]
    moved = tmp_path / "elsewhere" / path.name  # as a trial's parts lie in another folder than the recordings
    moved.parent.mkdir()
    path.rename(moved)
    with pytest.raises(DataError, match="is no file"):
        load_recordings(moved, AUDIO, CLASSES)
    assert len(load_recordings(moved, AUDIO, CLASSES, reading=Reading(folder=str(tmp_path))).rows) == 3


def test_paths_stay_in_the_folder_of_their_list(tmp_path: Path) -> None:
    outside = whispers.write_wave(tmp_path / "outside.wav", whispers.tone(500, 0.2))
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "link.wav").symlink_to(outside)
    for path in ("../outside.wav", str(outside), "link.wav", "x/../../outside.wav"):
        (inside / "list.jsonl").write_text(json.dumps({"audio": path, "label": "low"}))
        with pytest.raises(DataError, match="leads out of the folder"):
            load_recordings(inside / "list.jsonl", AUDIO, CLASSES)


def test_what_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    whispers.write_recordings(tmp_path / "data", 1)
    with pytest.raises(DataError, match="no such class") as caught:
        load_recordings(tmp_path / "data", AUDIO, ("low", "middle"))
    assert caught.value.value == "high"
    whispers.write_wave(tmp_path / "data" / "loose.wav", whispers.tone(500, 0.2))
    with pytest.raises(DataError, match=r"loose\.wav has no label"):
        list(read_records(tmp_path / "data"))
    with pytest.raises(DataError, match="is one recording"):
        list(read_records(tmp_path / "data" / "loose.wav"))
    (tmp_path / "data" / "loose.wav").unlink()
    (tmp_path / "data" / "list.csv").write_text("audio,label\nlow/0.wav,low\n")
    with pytest.raises(DataError, match="a list of recordings"):
        list(read_records(tmp_path / "data"))
    (tmp_path / "texts.jsonl").write_text('{"text": "hello", "label": "low"}\n')
    with pytest.raises(DataError, match="hears recordings"):
        load_recordings(tmp_path / "texts.jsonl", AUDIO, CLASSES)
    (tmp_path / "bare.jsonl").write_text('{"audio": "low/0.wav"}\n')
    with pytest.raises(DataError, match="field is missing"):
        load_recordings(tmp_path / "bare.jsonl", AUDIO, CLASSES)


def test_sound_beside_a_text_is_the_owners_business(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello there", "audio": {"array": [0, 1]}}\n')
    (record,) = read_records(path)
    assert type(record).__name__ == "Passage"


def test_empty_recordings_are_left_out_and_counted(tmp_path: Path) -> None:
    whispers.write_recordings(tmp_path, 1)
    whispers.write_wave(tmp_path / "low" / "1.wav", np.zeros(0))
    found = load_recordings(tmp_path, AUDIO, CLASSES)
    assert (found.counts.examples, found.counts.kept, found.counts.empty) == (4, 3, 1)


# ---------------------------------------------------------------- memory
def test_features_beyond_the_room_are_made_again_and_are_the_same(tmp_path: Path) -> None:
    whispers.write_recordings(tmp_path, 2)
    kept = load_recordings(tmp_path, AUDIO, CLASSES)
    some = load_recordings(tmp_path, AUDIO, CLASSES, kept_bytes_max=2 * 4 * 16 * 20)
    rows = [row for row in some.rows if isinstance(row, AudioRow)]
    assert [row.kept is not None for row in rows] == [True, True, False, False, False, False]
    for one, other in zip(*(batches(d.rows, size=4, seed=1, pad_id=0) for d in (kept, some)), strict=False):
        assert np.array_equal(one.ids, other.ids)
        break
    (rows[-1].path).unlink()
    with pytest.raises(DataError, match="is no file"):
        rows[-1].features()


def test_the_owner_sees_what_would_be_heard(tmp_path: Path) -> None:
    whispers.write_recordings(tmp_path, 2, seconds=0.3)
    found = preview_of_recordings(tmp_path, AUDIO, CLASSES, Reading())
    said = "\n".join(lines(found, colour=False))
    assert "6 recordings" in said
    assert "6 are learnt, 0.2 s of each" in said
    assert "6 are longer" in said
    assert "label low: 2" in said
