"""The fleet's newest adapter for a device's owner: from its downloads or the hub, and nothing but what was named."""

import hashlib
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from desk import Desk, serving

from edge_agent.bundle import open_bundle
from edge_agent.effects import AgentState
from edge_agent.fleet_adapter import FleetAdapter, take
from edge_agent.home import Home
from edge_agent.journal import Journal
from fedge.cli import main
from fedge.errors import DataError, NoInputError, UnavailableError, UsageError
from fedge.io.adapter_file import read_adapter
from fedge.messages import Announcement, BlobRef, Training
from fedge.release import MANIFEST
from fedge.rules import rule_of

SEED = bytes(range(16))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "desk")


@pytest.fixture
def home(desk: Desk) -> Home:
    return desk.device("dev", 1)


def state_of(bundle: Path, rule: str = "ffa") -> bytes:
    """An adapter file of the rule, of numbers that can be told apart."""
    size = rule_of(rule, open_bundle(bundle).manifest.layout, SEED).numbers
    return np.random.default_rng(3).standard_normal(size).astype("<f4").tobytes()


def follow(desk: Desk, home: Home, bundle: Path, content: bytes, url: str = "", rule: str = "ffa") -> bytes:
    """The device follows a campaign whose newest adapter is `content`, and has its bundle. Returns the hash."""
    manifest, digest = (bundle / MANIFEST).read_bytes(), hashlib.sha256(content).digest()
    said = Announcement(
        campaign="c1",
        hub="hub",
        sequence=7,
        closed=False,
        url=url or "https://localhost:9",
        manifest=BlobRef(hashlib.sha256(manifest).digest(), len(manifest)),
        manifest_signature=(bundle / "manifest.sig").read_bytes(),
        publisher=bytes(32),
        lora=open_bundle(bundle).manifest.lora,
        training=Training(rule=rule, a_seed=SEED),
        adapter=BlobRef(digest, len(content)),
        adapter_version=3,
    )
    Journal(home.state).save(AgentState(announcement=desk.signer("hub", "hub").seal(said)))
    shutil.copytree(bundle, home.blobs / f"{said.manifest.sha256.hex()}.bundle")
    return digest


@pytest.mark.parametrize("rule", ["ffa", "fedit", "core"])
def test_the_adapter_of_every_rule_comes_from_the_devices_downloads(
    desk: Desk, home: Home, tiny_bundle: Path, tmp_path: Path, rule: str
) -> None:
    content, out = state_of(tiny_bundle, rule), tmp_path / "fleet.fedge"
    digest = follow(desk, home, tiny_bundle, content, rule=rule)
    (home.blobs / digest.hex()).write_bytes(content)
    taken = take(home, out)
    assert (taken.campaign, taken.version, taken.closed) == ("c1", 3, False)
    manifest = open_bundle(tiny_bundle).manifest
    assert Path(taken.bundle, MANIFEST).read_bytes() == (tiny_bundle / MANIFEST).read_bytes()
    expected = rule_of(rule, manifest.layout, SEED).tensors(np.frombuffer(content, "<f4"))
    found = read_adapter(out, manifest).tensors
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_what_is_not_here_is_fetched_from_the_hub_and_leaves_the_downloads_alone(
    desk: Desk, home: Home, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served, content, out = tmp_path / "served", state_of(tiny_bundle), tmp_path / "fleet.fedge"
    served.mkdir()
    (served / "adapter").write_bytes(content)
    with serving(desk, served) as (url, asked):
        digest = follow(desk, home, tiny_bundle, content, url)
        assert main(["agent", "adapter", "--home", str(home.folder), "--out", str(out), "--json"]) == 0
    assert asked == [f"/b/{digest.hex()}"]
    taken = msgspec.json.decode(capsys.readouterr().out, type=FleetAdapter)
    assert taken.adapter == str(out)
    assert out.is_file()
    assert [path.suffix for path in home.blobs.iterdir()] == [".bundle"]


def test_a_spoilt_download_is_not_taken(desk: Desk, home: Home, tiny_bundle: Path, tmp_path: Path) -> None:
    content = state_of(tiny_bundle)
    digest = follow(desk, home, tiny_bundle, content)
    (home.blobs / digest.hex()).write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(UnavailableError, match="when the hub can be reached"):
        take_soon(home, tmp_path / "fleet.fedge")


def take_soon(home: Home, out: Path) -> FleetAdapter:
    """Without waiting for a hub that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedge.io.fetch.Fetcher._pause", lambda self, failures: None)
        return take(home, out)


def test_what_does_not_fit_the_bundle_is_refused(
    desk: Desk, home: Home, tiny_bundle: Path, tmp_path: Path
) -> None:
    for content, message in ((b"abc", "float32"), (bytes(4 * 7), "another length")):
        digest = follow(desk, home, tiny_bundle, content)
        (home.blobs / digest.hex()).write_bytes(content)
        with pytest.raises(DataError, match=message):
            take(home, tmp_path / "fleet.fedge")
        shutil.rmtree(home.blobs)
        home.create()
    assert not (tmp_path / "fleet.fedge").exists()


def test_who_has_nothing_yet_is_told_what_to_do(
    desk: Desk, home: Home, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(NoInputError, match="enroll"):
        take(Home(tmp_path / "nobody"), tmp_path / "fleet.fedge")
    with pytest.raises(NoInputError, match="fedge agent run"):
        take(home, tmp_path / "fleet.fedge")
    follow(desk, home, tiny_bundle, state_of(tiny_bundle))
    shutil.rmtree(home.blobs)
    with pytest.raises(NoInputError, match="run --blobs"):
        take(home, tmp_path / "fleet.fedge")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="replace something else"):
        take(home, tmp_path / "letter.txt")
