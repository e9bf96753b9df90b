"""The owner's policy: defaults, and every mistake named by its field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_agent.policy import TEMPLATE, Policy, load_policy
from fedge.errors import ConfigError, StorageError


def load(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "policy.toml").write_text(text)
    return load_policy(tmp_path / "policy.toml")


def test_no_file_and_the_template_both_mean_the_defaults(tmp_path: Path) -> None:
    assert load_policy(tmp_path / "policy.toml") == Policy() == load(tmp_path, TEMPLATE)


def test_the_template_shows_every_field_with_its_default(tmp_path: Path) -> None:
    shown = load(tmp_path, re.sub(r"^# (\w+ = )", r"\1", TEMPLATE, flags=re.MULTILINE))
    assert shown == Policy()
    assert all(f"# {field} = " in TEMPLATE for field in Policy.__struct_fields__)


def test_an_owner_may_demand_more(tmp_path: Path) -> None:
    key = "ab" * 32
    policy = load(
        tmp_path, f'bloc_devices_min = 20\nplan_share_max = 1.5\npublishers = ["{key}"]\nthreads_max = 1\n'
    )
    assert policy == Policy(bloc_devices_min=20, plan_share_max=1.5, publishers=(key,), threads_max=1)
    policy = load(tmp_path, 'hours = "22:00-06:00"\nbattery_min = 0.5\nmetered = true\ncelsius_max = 70\n')
    assert policy == Policy(hours="22:00-06:00", battery_min=0.5, metered=True, celsius_max=70)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("bloc_devices_min = 4", "bloc_devices_min"),
        ("bloc_devices_min = '8'", "bloc_devices_min"),
        ("plan_share_max = 3", "plan_share_max"),
        ('publishers = ["abc"]', "publishers"),
        ("threads_max = -1", "threads_max"),
        ("memory_mb_max = 1.5", "memory_mb_max"),
        ("hours = '22-6'", "hours"),
        ("hours = '22:00-24:00'", "hours"),
        ("hours = '22:00-06:00\\n'", "hours"),
        ("battery_min = 25", "battery_min"),
        ("metered = 1", "metered"),
        ("celsius_max = -3", "celsius_max"),
        ("bytes_per_day_max = 1e6", "bytes_per_day_max"),
        ("rounds_max = -1", "rounds_max"),
        ("bloc_device_min = 9", "bloc_device_min"),
        ("bloc_devices_min 9", "no TOML"),
    ],
)
def test_a_mistake_is_named_and_never_means_the_defaults(tmp_path: Path, line: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, line)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match="cannot read"):
        load_policy(tmp_path / "policy.toml")
