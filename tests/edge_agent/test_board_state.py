"""Boards as their kernels show them: trees of files under a folder, whole, partial and garbage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from edge_agent import resources
from edge_agent.board_state import Board
from edge_agent.conditions import Reading
from edge_agent.metered import Metered
from edge_agent.presence import SLOT_SECONDS, SLOTS, History
from edge_agent.uplink import Uplink

MEMINFO = "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: 2048000 kB\n"
COMMON = {"proc/meminfo": MEMINFO, "proc/uptime": "350735.47 234388.90", "proc/self/cgroup": "0::/\n"}
THERMAL = "sys/class/thermal"
CLOCK = "sys/devices/system/cpu/cpufreq/policy0"
SUPPLY = "sys/class/power_supply"

PI_4 = {
    **COMMON,
    f"{THERMAL}/thermal_zone0/type": "cpu-thermal",
    f"{THERMAL}/thermal_zone0/temp": "61341",
    f"{CLOCK}/scaling_cur_freq": "1800000",
    f"{CLOCK}/scaling_max_freq": "1800000",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    "sys/class/hwmon/hwmon1/name": "rpi_volt",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0",
}
PI_5 = {
    **PI_4,
    f"{THERMAL}/cooling_device0/type": "pwm-fan",
    f"{THERMAL}/cooling_device0/cur_state": "3",
    f"{THERMAL}/thermal_zone0/temp": "64500",
    f"{CLOCK}/scaling_cur_freq": "2400000",
    f"{CLOCK}/scaling_max_freq": "2400000",
}
JETSON = {
    **COMMON,
    f"{THERMAL}/thermal_zone0/type": "CPU-therm",
    f"{THERMAL}/thermal_zone0/temp": "48500",
    f"{THERMAL}/thermal_zone1/type": "PMIC-Die",
    f"{THERMAL}/thermal_zone1/temp": "100000",
    f"{THERMAL}/thermal_zone2/type": "GPU-therm",
    f"{THERMAL}/thermal_zone2/temp": "51000",
    f"{THERMAL}/cooling_device0/type": "thermal-cpufreq-0",
    f"{THERMAL}/cooling_device0/cur_state": "0",
}
LAPTOP = {
    **COMMON,
    f"{THERMAL}/thermal_zone0/type": "x86_pkg_temp",
    f"{THERMAL}/thermal_zone0/temp": "45000",
    f"{THERMAL}/cooling_device0/type": "Processor",
    f"{THERMAL}/cooling_device0/cur_state": "0",
    f"{SUPPLY}/AC/type": "Mains",
    f"{SUPPLY}/AC/online": "0",
    f"{SUPPLY}/BAT0/type": "Battery",
    f"{SUPPLY}/BAT0/status": "Discharging",
    f"{SUPPLY}/BAT0/capacity": "63",
    f"{SUPPLY}/hidpp_battery_0/type": "Battery",
    f"{SUPPLY}/hidpp_battery_0/scope": "Device",
    f"{SUPPLY}/hidpp_battery_0/status": "Discharging",
    f"{SUPPLY}/hidpp_battery_0/capacity": "5",
}


def grow(root: Path, tree: Mapping[str, str]) -> Path:
    for name, text in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def look(root: Path, *, busy: bool = False, own_mb: int = 0) -> Reading:
    board = Board(root, Metered([]))
    return board.read(share_on=0.5, up_seconds=9.0, upload_kbit=7.0, busy=busy, own_mb=own_mb)


# ---------------------------------------------------------------- boards
def test_a_pi_4_on_mains(tmp_path: Path) -> None:
    grow(tmp_path, PI_4)
    assert look(tmp_path, busy=True) == Reading(
        power="mains",
        charge=1.0,
        celsius=61.341,
        hot=False,
        metered=False,
        free_memory_mb=2_000,
        up_seconds=9.0,
        share_on=0.5,
        upload_kbit=7.0,
    )
    assert Board(tmp_path, Metered([])).up_seconds() == 350_735.47


def test_a_pi_that_is_slowed_down_under_load(tmp_path: Path) -> None:
    grow(tmp_path, {**PI_4, f"{CLOCK}/scaling_cur_freq": "1200000"})
    assert look(tmp_path, busy=True).hot
    assert not look(tmp_path).hot, "an idle governor is slow, too"
    grow(tmp_path, {f"{THERMAL}/thermal_zone0/temp": "41000"})
    assert not look(tmp_path, busy=True).hot, "whatever slows it down, it is not heat"


def test_a_pi_whose_supply_is_weak(tmp_path: Path) -> None:
    assert look(grow(tmp_path, {**PI_4, "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1"})).hot


def test_a_pi_5_whose_fan_turns_is_not_throttled(tmp_path: Path) -> None:
    reading = look(grow(tmp_path, PI_5), busy=True)
    assert (reading.celsius, reading.hot) == (64.5, False)


def test_a_jetson_has_a_zone_that_always_says_a_hundred(tmp_path: Path) -> None:
    reading = look(grow(tmp_path, JETSON))
    assert (reading.celsius, reading.hot) == (51.0, False)
    grow(tmp_path, {f"{THERMAL}/cooling_device0/cur_state": "2"})
    assert look(tmp_path).hot, "its clock is held down"


@pytest.mark.parametrize(
    ("changes", "power", "charge"),
    [
        ({}, "battery", 0.63),
        ({"BAT0/status": "Charging", "AC/online": "1"}, "charging", 0.63),
        ({"BAT0/status": "Full", "BAT0/capacity": "100", "AC/online": "1"}, "mains", 1.0),
        ({"BAT0/status": "Not charging", "AC/online": "1"}, "mains", 0.63),
        ({"BAT0/status": "Not charging"}, "battery", 0.63),
        ({"BAT0/status": "Discharging", "AC/online": "1"}, "battery", 0.63),
        ({"BAT0/capacity": "?", "BAT0/energy_now": "20", "BAT0/energy_full": "40"}, "battery", 0.5),
        ({"BAT0/capacity": "", "BAT0/charge_now": "9", "BAT0/charge_full": "0"}, "battery", 0.0),
        ({"BAT0/capacity": "250"}, "battery", 1.0),
        (
            {"BAT1/type": "Battery", "BAT1/status": "Unknown", "BAT1/capacity": "37"},
            "battery",
            pytest.approx(0.5),
        ),
    ],
)
def test_a_laptop(tmp_path: Path, changes: dict[str, str], power: str, charge: float) -> None:
    grow(tmp_path, {**LAPTOP, **{f"{SUPPLY}/{name}": text for name, text in changes.items()}})
    reading = look(tmp_path)
    assert (reading.power, reading.charge) == (power, charge)


def test_a_container_with_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "nowhere", busy=True) == Reading(
        up_seconds=9.0, share_on=0.5, upload_kbit=7.0, free_memory_mb=0
    )
    assert Board(tmp_path, Metered([])).up_seconds() == 0.0


def test_a_control_group_bounds_the_memory_and_what_the_worker_holds_is_given_back(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/agent"
    grow(
        tmp_path,
        {
            **PI_4,
            "proc/self/cgroup": "0::/user.slice/agent",
            f"{group}/memory.max": str(400 << 20),
            f"{group}/memory.current": str(300 << 20),
            "sys/fs/cgroup/user.slice/memory.max": "max",
            "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
        },
    )
    assert look(tmp_path).free_memory_mb == 100
    assert look(tmp_path, own_mb=150).free_memory_mb == 250
    assert resources.memory_is_bounded(tmp_path)
    grow(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids"})
    assert not resources.memory_is_bounded(tmp_path), "as a Raspberry Pi starts"


@pytest.mark.parametrize("garbage", ["", "nan?", "-5", "99999999999999999999", "\udcff", "a b c", "\0" * 300])
def test_garbage_is_read_as_nothing_and_never_raised(tmp_path: Path, garbage: str) -> None:
    for name in {**PI_5, **JETSON, **LAPTOP}:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(garbage.encode("utf-8", "surrogateescape") + b"\n")
    reading = look(tmp_path, busy=True)
    assert 0 <= reading.charge <= 1
    assert -40 < reading.celsius < 125
    assert reading.free_memory_mb >= 0


def test_a_sensor_that_refuses_to_be_read_is_none(tmp_path: Path) -> None:
    grow(tmp_path, PI_4)
    board = Board(tmp_path, Metered([]))
    (tmp_path / THERMAL / "thermal_zone0/temp").unlink()
    (tmp_path / THERMAL / "thermal_zone0/temp").mkdir()
    assert board.read(share_on=0, up_seconds=0, upload_kbit=0).celsius == 0.0


def test_a_battery_that_is_plugged_in_later_is_found(tmp_path: Path) -> None:
    grow(tmp_path, PI_4)
    board = Board(tmp_path, Metered([]))
    grow(tmp_path, LAPTOP)
    found = {board.read(share_on=0, up_seconds=0, upload_kbit=0).power for _ in range(60)}
    assert found == {"mains", "battery"}


# ---------------------------------------------------------------- the network
class Minutes:
    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


def asking(code: str, clock: Minutes | None = None) -> Metered:
    return Metered([sys.executable, "-c", code], clock or Minutes())


@pytest.mark.parametrize(
    ("said", "metered"),
    [("u 0", False), ("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False), ("", False), ("x", False)],
)
def test_what_network_manager_says(said: str, metered: bool) -> None:
    assert asking(f"print({said!r})").now() is metered


def test_no_network_manager_means_not_metered() -> None:
    assert not asking("print('u 1'); raise SystemExit(1)").now()
    assert not Metered(["/no/such/program"]).now()
    assert not Metered([]).now()


def test_the_network_is_asked_once_a_minute_and_never_waited_for_again(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    answer.write_text("u 1")
    clock = Minutes()
    network = asking(f"print(open({str(answer)!r}).read())", clock)
    assert network.now()
    answer.write_text("u 2")
    clock.at += 59
    assert network.now(), "not asked again yet"
    clock.at += 2
    assert network.now(), "the answer is not here yet"
    until = time.monotonic() + 10
    while network.now() and time.monotonic() < until:
        time.sleep(0.01)
    assert not network.now()


def test_a_child_that_hangs_is_ended() -> None:
    clock = Minutes()
    network = asking("print('u 1', flush=True)", clock)
    assert network.now()
    network._command = [sys.executable, "-c", "import time; time.sleep(60)"]
    clock.at += 61
    assert network.now()
    child = network._child
    assert child is not None
    clock.at += 3
    assert not network.now(), "unknown is not metered"
    assert child.returncode is not None


# ---------------------------------------------------------------- the record of presence
DAY = 86_400.0
BEGIN = 20_000 * DAY


def test_a_share_of_a_week_and_the_time_without_a_gap(tmp_path: Path) -> None:
    history = History(tmp_path / "presence")
    assert (history.share_on, history.up_seconds) == (0.0, 0.0)
    for slot in range(6 * 24):
        history.note(BEGIN + slot * SLOT_SECONDS)
    assert history.share_on == pytest.approx(1 / 7)
    assert history.up_seconds == DAY - SLOT_SECONDS
    assert history.is_young
    history.note(BEGIN + 2 * DAY)
    assert (history.up_seconds, history.is_young) == (0.0, False)
    for slot in range(SLOTS + 5):
        history.note(BEGIN + 3 * DAY + slot * SLOT_SECONDS)
    assert history.share_on == 1.0
    assert history.up_seconds == (SLOTS - 1) * SLOT_SECONDS
    history.note(BEGIN + 90 * DAY)
    assert history.share_on == pytest.approx(1 / SLOTS)


def test_the_record_outlives_the_process_and_is_small(tmp_path: Path) -> None:
    path = tmp_path / "presence"
    one = History(path)
    for slot in range(7):
        one.note(BEGIN + slot * SLOT_SECONDS)
    two = History(path)
    two.note(BEGIN + 7 * SLOT_SECONDS)
    assert two.up_seconds == 7 * SLOT_SECONDS, "a restart is no gap"
    for slot in range(2 * SLOTS):
        two.note(BEGIN + slot * SLOT_SECONDS)
    assert path.stat().st_size < 300


def test_the_record_is_written_seldom(tmp_path: Path) -> None:
    path = tmp_path / "presence"
    history = History(path)
    written = set()
    for second in range(0, 7_200, 10):
        history.note(BEGIN + second)
        written.add(path.stat().st_mtime_ns)
    assert len(written) == 4


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path) -> None:
    history = History(tmp_path / "presence")
    history.note(BEGIN)
    history.note(BEGIN + SLOT_SECONDS)
    history.note(BEGIN - 5 * DAY)
    assert history.up_seconds == SLOT_SECONDS


@pytest.mark.parametrize("text", ["", "x", "1 2", "9 3 ff", "1 2 zz", "1 2 -5", f"1 2 {1 << SLOTS:x}", "é"])
def test_a_record_that_cannot_be_read_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "presence").write_text(text)
    history = History(tmp_path / "presence")
    assert history.share_on == 0.0
    history.note(BEGIN)
    assert History(tmp_path / "presence").share_on == pytest.approx(1 / SLOTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_takes_nothing_delays_the_record(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    history = History(tmp_path / "presence")
    history.note(BEGIN)
    assert history.share_on > 0


# ---------------------------------------------------------------- the uplink
def test_the_rate_is_what_arrives_smoothed() -> None:
    uplink = Uplink()
    uplink.sent(0.0, 50_000)
    uplink.sent(0.1, 50_000)
    uplink.answered(1.0)
    assert uplink.kbit == 800.0
    uplink.sent(5.0, 100_000)
    uplink.answered(5.5)
    assert uplink.kbit == pytest.approx(800 + 0.3 * 800)


def test_small_or_cut_bursts_tell_nothing() -> None:
    uplink = Uplink(5.0)
    uplink.answered(1.0)
    uplink.sent(1.0, 9_000)
    uplink.answered(2.0)
    uplink.sent(3.0, 100_000)
    uplink.cut()
    uplink.answered(9.0)
    assert uplink.kbit == 5.0
