"""Trace files: every shape is read, and whatever is wrong is refused with file, field and value."""

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedge.errors import DataError, NoInputError
from firmware_sim.traces import checks
from firmware_sim.traces import recorded as traces
from firmware_sim.traces.flash import trainable
from firmware_sim.traces.recorded import load

OURS = [
    {"period_s": 86_400, "sessions": [[10, 20], [20, 30], [40, 40], [50.5, 60]], "model": "any"},
    {"id": "b", "period_s": 100, "sessions": [[0, 100]]},
]
FEDSCALE = {
    "7": {"duration": 90, "finish_time": 200, "active": [0, 120], "inactive": [60, 150], "model": "x"},
}
FLASH = {
    "3": {
        "messages": "2020-02-03 21:00:00\tbattery_charged_off\n"
        "2020-02-03 22:00:00\tscreen_off\n2020-02-03 22:10:00\twifi\n2020-02-03 22:30:00\tbattery_charged_on\n"
        "2020-02-03 22:31:00\t87.0%\n2020-02-04 06:00:00\tscreen_on\n2020-02-04 07:00:00\tscreen_off\n"
        "2020-02-04 07:30:00\t4G\n"
    },
    "4": {"messages": ["2020-02-03 21:00:00\tscreen_off"]},
}


def write(folder: Path, name: str, text: str | bytes | object) -> Path:
    path = folder / name
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def packed(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(values) for name, values in arrays.items()})
    return stream.getvalue()


# ---------------------------------------------------------------- what is read
@pytest.mark.parametrize("name", ["on.json", "on.json.gz"])
def test_interval_lists(tmp_path: Path, name: str) -> None:
    found = load(write(tmp_path, name, OURS))
    assert found.name == name
    first = found.sessions(0)
    assert first is not None
    assert (first.period, list(first.starts), list(first.ends)) == (86_400.0, [10.0, 50.5], [30.0, 60.0])
    assert found.sessions(3) is found.sessions(1)
    assert found.bandwidth(0) is None


def test_fedscale_as_json(tmp_path: Path) -> None:
    found = load(write(tmp_path, "client_behave_trace.json", FEDSCALE)).sessions(0)
    assert found is not None
    assert (found.period, list(found.starts), list(found.ends)) == (200.0, [0.0, 120.0], [60.0, 150.0])


def test_flash_logs_become_the_hours_in_which_a_phone_may_train(tmp_path: Path) -> None:
    found = load(write(tmp_path, "state_traces.json", FLASH))
    assert len(found.presences) == 1  # the second phone never may
    only = found.presences[0]
    assert only.period == 2 * 86_400.0
    hours = [(start / 3_600.0, end / 3_600.0) for start, end in zip(only.starts, only.ends, strict=True)]
    assert hours == [(22.5, 30.0), (31.0, 31.5)]


def test_a_locked_phone_may_train_with_its_screen_lit_and_its_log_may_end_so() -> None:
    events = [
        (0.0, "screen_lock"),
        (1.0, "wifi"),
        (2.0, "battery_charged_on"),
        (3.0, "screen_on"),
        (9.0, "44%"),
    ]
    assert list(trainable(events)) == [(2.0, 9.0)]


def test_csv_intervals_capacities_and_rates(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "device,start,end\nx,0,5\ny,7,9\nx,100000,100010\n")
    write(tmp_path, "b.csv", "id,inference_ms_per_sample,kbps\n1,153.0,800\n2,39,80\n")
    found = load(tmp_path)
    assert [list(each.starts) for each in found.presences] == [[0.0, 100_000.0], [7.0]]
    assert [each.period for each in found.presences] == [2 * 86_400.0] * 2
    assert [each.ms_per_sample for each in found.capacities] == [153.0, 39.0]
    rate = found.bandwidth(0)
    assert rate is not None
    assert rate.seconds(123.0, 8.0) == pytest.approx(10.0)  # the capacities stand in for series
    write(tmp_path, "c.csv", "series,t,mbps\ns,0,1\ns,10,3\nother,0,9\n")
    both = load(tmp_path)
    assert (len(both.series), both.name) == (2, "a.csv, b.csv, c.csv")
    first = both.bandwidth(0)
    assert first is not None
    assert first.seconds(5.0, 5.0 + 15.0) == pytest.approx(10.0)


def test_packed_rates(tmp_path: Path) -> None:
    data = packed(
        t=np.float32([0, 1, 2, 0, 5]), mbps=np.float32([1, 2, 3, 4, 4]), offsets=[0, 3, 5], names=["p", "q"]
    )
    found = load(write(tmp_path, "rates.npz", data))
    assert [each.name for each in found.series] == ["rates/0", "rates/1"]
    assert found.series[0].seconds(0.0, 6.0) == pytest.approx(3.0)
    assert found.series[1].mean_kbit == pytest.approx(4_000.0)


def test_heat_samples(tmp_path: Path) -> None:
    text = "device,result,t_s,mhz_real,load_pct,temp_c\npi5,r,10,2400,50,40.5\npi5,r,20,2400,100,44\npi4,q,1,1,2,3\n"
    found = load(write(tmp_path, "series.csv", text)).heat
    assert [(run.board, run.name, run.load.tolist()) for run in found] == [
        ("pi5", "r", [0.5, 1.0]),
        ("pi4", "q", [0.02]),
    ]


def test_a_folder_is_read_whole_and_what_is_no_trace_is_left(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", "on.json", OURS)
    write(tmp_path, "NOTICE", "who made them")
    write(tmp_path, "summary.json", {"on": {"traces": 80}})
    write(tmp_path, "other.csv", "name,size\na,1\n")
    assert load(tmp_path).name == "on.json"


# ---------------------------------------------------------------- what is refused
BAD_JSON: dict[str, tuple[object, str, str]] = {
    "no JSON": ("{oops", "no JSON", "file"),
    "overlap": ([{"period_s": 9, "sessions": [[0, 5], [4, 6]]}], "begins before", "[0].sessions[1]"),
    "backwards": ([{"period_s": 9, "sessions": [[5, 4]]}], "its end not first", "[0].sessions[0]"),
    "outside": ([{"period_s": 9, "sessions": [[5, 10]]}], "within 0 and 9", "[0].sessions[0]"),
    "negative": ([{"period_s": 9, "sessions": [[-1, 5]]}], "within 0 and 9", "[0].sessions[0]"),
    "no period": ([{"period_s": 0, "sessions": [[0, 0]]}], "from 1 to", "[0].sessions: period"),
    "never on": ([{"period_s": 9, "sessions": []}], "never on", "[0].sessions"),
    "text": ([{"period_s": 9, "sessions": [["a", 2]]}], "not what this trace holds", "$[0].sessions[0][0]"),
    "triple": ([{"period_s": 9, "sessions": [[1, 2, 3]]}], "not what this trace holds", "$[0].sessions[0]"),
    "lengths": ({"c": {"finish_time": 9, "active": [1], "inactive": []}}, "equally long", "c"),
    "time": ({"c": {"messages": "yesterday\twifi"}}, "date time<TAB>event", "c.messages[0]"),
    "no rate": ({"c": {"computation": 5, "communication": 0}}, "from 0.001", "c: kbit/s"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_refused_with_file_field_and_value(tmp_path: Path, case: str) -> None:
    content, what, field = BAD_JSON[case]
    with pytest.raises(DataError, match=r"bad\.json: ") as caught:
        load(write(tmp_path, "bad.json", content))
    assert what in caught.value.what
    assert caught.value.field == field
    assert caught.value.value is not None


BAD_CSV = {
    "word": ("device,start,end\na,0,x\n", "line 2: end", "x"),
    "infinite": ("device,start,end\na,0,1\na,2,inf\n", "line 3: end", "inf"),
    "missing": ("device,start,end\na,0\n", "line 2: end", ""),
    "overlap": ("device,start,end\na,0,5\na,4,6\n", "a[1]", (4.0, 6.0)),
    "back in time": ("t,mbps\n0,1\n5,1\n3,1\n", ": t[2]", 3.0),
    "negative": ("t,mbps\n0,1\n5,-1\n", ": mbps[1]", -1.0),
    "dead link": ("t,mbps\n0,0\n5,0\n", ": mbps", 0.0),
    "hot": ("device,result,t_s,load_pct,temp_c\npi5,r,1,50,999\n", "pi5/r: temp_c[0]", 999.0),
    "overload": ("device,result,t_s,load_pct,temp_c\npi5,r,1,500,50\n", "pi5/r: load_pct[0]", 5.0),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_refused_with_file_field_and_value(tmp_path: Path, case: str) -> None:
    text, field, value = BAD_CSV[case]
    with pytest.raises(DataError, match=r"bad\.csv: ") as caught:
        load(write(tmp_path, "bad.csv", text))
    assert (caught.value.field, caught.value.value) == (field, value)


BAD_NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "no zip": (lambda: b"PK, not really", "file"),
    "objects": (lambda: packed(t=np.array([0, {}], dtype=object), mbps=[1, 1]), "file"),
    "lengths": (lambda: packed(t=[0, 1], mbps=[1]), "mbps"),
    "words": (lambda: packed(t=["a", "b"], mbps=[1, 2]), "t"),
    "matrix": (lambda: packed(t=[[0, 1]], mbps=[[1, 2]]), "t"),
    "not a number": (lambda: packed(t=[0, 1], mbps=[1, np.nan]), "0: mbps[1]"),
    "offsets": (lambda: packed(t=[0, 1], mbps=[1, 1], offsets=[0, 2, 1]), "offsets"),
    "beyond": (lambda: packed(t=[0, 1], mbps=[1, 1], offsets=[0, 9]), "offsets"),
    "order": (lambda: packed(t=[0, 1, 1], mbps=[1, 1, 1]), "0: t[2]"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_is_refused_with_its_field(tmp_path: Path, case: str) -> None:
    make, field = BAD_NPZ[case]
    with pytest.raises(DataError, match=r"bad\.npz: ") as caught:
        load(write(tmp_path, "bad.npz", make()))
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["client_behave_trace", "x.pkl"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="pickle") as caught:
        load(write(tmp_path, name, pickle.dumps(FEDSCALE)))
    assert "JSON" in caught.value.hint


def test_broken_gzip_nothing_there_and_no_trace(tmp_path: Path) -> None:
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(OURS).encode())[:-9])
    with pytest.raises(DataError, match="no whole gzip"):
        load(tmp_path / "cut.json.gz")
    with pytest.raises(NoInputError):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no trace"):
        load(write(tmp_path, "notes.txt", "hello"))


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "on.json", OURS)
    monkeypatch.setattr(traces, "DEVICES_MAX", 1)
    with pytest.raises(DataError, match="more than 1 devices"):
        load(path)
    monkeypatch.setattr(traces, "FILES_MAX", 0)
    with pytest.raises(DataError, match="more than 0 files"):
        load(tmp_path)
    monkeypatch.setattr("firmware_sim.traces.formats.FILE_BYTES_MAX", 10)
    with pytest.raises(DataError, match="too large"):
        load(path)
    with pytest.raises(DataError, match="unpacks to too much"):
        load(write(tmp_path, "r.npz", packed(t=[0, 1], mbps=[1, 1])))
    monkeypatch.undo()
    monkeypatch.setattr(checks, "POINTS_MAX", 1)
    with pytest.raises(DataError, match="too many rows"):
        load(write(tmp_path, "a.csv", "device,start,end\nx,0,5\nx,7,9\n"))
