"""Settings: the file, the flags over it, and every contradiction named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.errors import ConfigError, NoInputError
from hub.config import HubConfig, default_home, load_config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'https_port = 9443\nmqtt_port = 9883\npublic_names = ["a.example"]\n'
    )
    config = load_config(tmp_path, {"mqtt_port": 1234, "bind": None})
    assert (config.https_port, config.mqtt_port, config.bind) == (9443, 1234, "0.0.0.0")
    assert config.address == "a.example"
    assert config.folder == tmp_path.resolve()


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_config(tmp_path, {}) == HubConfig(home=str(tmp_path.resolve()))


def test_a_foreign_broker(tmp_path: Path) -> None:
    assert load_config(tmp_path, {"broker": "mqtts://b.example:8884"}).foreign_broker == ("b.example", 8884)
    assert load_config(tmp_path, {"broker": "mqtts://b.example"}).foreign_broker == ("b.example", 8883)
    assert load_config(tmp_path, {"broker": "auto"}).foreign_broker is None


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"https_port": 65_536}, "https_port"),
        ({"mqtt_port": -1}, "mqtt_port"),
        ({"https_port": 4_000, "mqtt_port": 4_000}, "mqtt_port"),
        ({"bind": "everywhere"}, "bind"),
        ({"broker": "rabbit"}, "broker"),
        ({"broker": "mqtt://plain.example"}, "broker"),
        ({"broker": "mqtts://"}, "broker"),
        ({"broker": "mqtts://a:notaport"}, "broker"),
        ({"public_names": ("bad_name!",)}, "public_names"),
        ({"public_names": ("-a.example",)}, "public_names"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, flags: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(tmp_path, flags)
    assert field in str(told.value)


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("https_port: 1\n")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_config(tmp_path, {})


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="fedge hub init"):
        load_config(tmp_path / "nowhere", {})


def test_the_default_home_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/fedge/hub")
