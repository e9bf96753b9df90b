"""The words of `fedge hub`: what they print, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from playbook import Fleet, campaign

from fedge import limits
from fedge.authority import fingerprint
from fedge.cli import main
from fedge.errors import ConfigError
from fedge.io.adapter_file import read_adapter
from fedge.io.peft_folder import read_peft
from fedge.joining import JoinToken
from fedge.lora import AdapterLayout, LoraConfig
from fedge.messages import Training
from fedge.release import (
    FORMAT,
    MANIFEST,
    SIGNATURE,
    FileEntry,
    Manifest,
    encode_manifest,
    open_manifest,
    sign_manifest,
)
from fedge.rules import usual_rate, usual_rows
from hub.blobs import Blobs
from hub.campaigns import Wish, check
from hub.effects import LedgerEntry
from hub.standing import standing
from hub.store import FILE, Store

LAYERS, SHAPES, RANK = 2, {"self_attn.q_proj": (12, 8), "self_attn.v_proj": (6, 8)}, 4
NUMBERS = LAYERS * RANK * (12 + 6)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "hub"
    assert main(["hub", "init", "--home", str(home), "--fleet", "lab"]) == 0
    store = Store.open(home / FILE)
    store.set_fact("url", "https://hub.example:8443")
    store.close()
    return home


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle in everything but its graphs, which the hub never opens."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    files = {"weights.bin": b"w" * 100, "tokenizer.json": b"{}"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    key = Ed25519PrivateKey.generate()
    manifest = Manifest(
        format=FORMAT,
        model="lab/Tiny-Llama",
        architecture="llama",
        licence="apache-2.0",
        source_sha256="0" * 64,
        weights_format="int4d",
        embedding_format="int8g",
        layers=LAYERS,
        hidden=8,
        vocabulary=32,
        heads=2,
        kv_heads=1,
        head_dim=4,
        positions_max=64,
        head_tied=True,
        eos_id=0,
        pad_id=0,
        lora=LoraConfig(r=RANK, alpha=8.0),
        lora_shapes=SHAPES,
        aux=("mask",),
        head_rows=32,
        operators=("Add",),
        runtime_min="1.20",
        tensors={},
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
        gates={},
        publisher=key.public_key().public_bytes_raw().hex(),
    )
    data = encode_manifest(manifest)
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(sign_manifest(data, key))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["hub", *words])
    out, err = capsys.readouterr()
    return code, out, err


def save_first_campaign(home: Path) -> None:
    """What a running hub does with its inbox."""
    store = Store.open(home / FILE)
    (number, row), *_ = store.asked()
    store.transaction([row], taken=number)
    store.close()


def test_init_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "init", "--home", str(tmp_path / "h"))
    assert code == 0
    assert "created" in out
    assert "fedge hub up" in err
    code, _, err = run(capsys, "init", "--home", str(tmp_path / "h"))
    assert code == 78
    assert len(err.splitlines()) == 1


def test_tokens(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "token", "--home", str(home), "--count", "3", "--minutes", "5")
    tokens = [JoinToken.parse(line) for line in out.split()]
    assert code == 0
    assert len({token.secret for token in tokens}) == 3
    assert {token.url for token in tokens} == {"https://hub.example:8443"}
    pin = fingerprint((home / "authority/authority.pem").read_bytes())
    assert {token.authority for token in tokens} == {pin}


@pytest.mark.parametrize(
    "words", [("--count", "0"), ("--count", "10001"), ("--minutes", "0"), ("--minutes", "nan")]
)
def test_senseless_tokens(home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str]) -> None:
    code, out, err = run(capsys, "token", "--home", str(home), *words)
    assert (code, out) == (64, "")
    assert len(err.splitlines()) == 1


def test_a_token_before_the_hub_has_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "init", "--home", str(tmp_path / "h"))
    code, _, err = run(capsys, "token", "--home", str(tmp_path / "h"))
    assert code == 64
    assert "fedge hub up" in err


@pytest.mark.parametrize("word", ["up", "token", "status", "ledger"])
def test_where_there_is_no_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, _, err = run(capsys, word, "--home", str(tmp_path / "nowhere"))
    assert code == 66
    assert "fedge hub init" in err
    assert not (tmp_path / "nowhere").exists()


def test_a_campaign_from_start_to_export(
    home: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys,
        "campaign",
        "start",
        "--home",
        str(home),
        "--bundle",
        str(bundle),
        "--name",
        "first",
        "--seed",
        "3",
    )
    assert (code, out) == (0, "first\n")
    assert "fedge hub up" in err  # it does not run yet
    assert "waiting" in run(capsys, "campaign", "list", "--home", str(home))[1]
    save_first_campaign(home)
    shown = json.loads(run(capsys, "campaign", "show", "first", "--home", str(home), "--json")[1])
    assert (shown["numbers"], shown["bloc"], shown["rounds"]) == (NUMBERS, 8, 8)
    code, out, _ = run(capsys, "export", "first", "--home", str(home), "--out", str(tmp_path / "adapter"))
    assert code == 0
    adapter = read_peft(tmp_path / "adapter", AdapterLayout.of(LAYERS, SHAPES, RANK))
    assert adapter.base_model_name == "lab/Tiny-Llama"
    assert all(not tensor.any() for name, tensor in adapter.tensors.items() if name.endswith(".B"))
    assert all(
        np.isfinite(tensor).all() and tensor.any()
        for name, tensor in adapter.tensors.items()
        if name.endswith(".A")
    )
    file = tmp_path / "file"
    assert run(capsys, "export", "first", "--home", str(home), "--out", str(file), "--as", "file")[0] == 0
    manifest = open_manifest((bundle / MANIFEST).read_bytes(), (bundle / SIGNATURE).read_bytes())
    same = read_adapter(file, manifest)
    for name, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(same.tensors[name], tensor)


def test_everything_a_device_will_fetch_is_there(
    home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle), "--name", "first")
    blobs = Blobs(home / "blobs")
    wanted = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir() if path.name != SIGNATURE
    ]
    assert all(blobs.path(name) is not None for name in wanted)
    row = Store.open(home / FILE, read_only=True).asked()[0][1]
    assert blobs.read(row.adapter) == bytes(4 * NUMBERS)
    assert len(row.training.a_seed) == 16
    assert row.url == "https://hub.example:8443"


def test_a_campaigns_name_is_used_once(home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("campaign", "start", "--home", str(home), "--bundle", str(bundle), "--name", "first")
    assert run(capsys, *words)[0] == 0
    assert run(capsys, *words)[0] == 64
    save_first_campaign(home)
    assert run(capsys, *words)[0] == 64


def test_a_name_is_made_when_none_is_given(
    home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle))
    assert out.startswith("tiny-llama-20")


def test_every_mistake_is_named_at_once(home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bloc", "4", "--devices", "3", "--rounds", "0", "--rate", "-1", "--name", "Not A Name")
    code, _, err = run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle), *words)
    assert code == 78
    assert len(err.splitlines()) == 1
    for field in ("bloc=4", "devices=3", "rounds=0", "rate=-1", "name='Not A Name'"):
        assert field in err
    assert Store.open(home / FILE, read_only=True).asked() == []
    assert list((home / "blobs").iterdir()) == []


def test_the_schedulers_knobs(home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--work-seconds 90 --training-max 32 --rest-seconds 300 --quota 2.5 --form-seconds 600"
    words += " --hours-max 12 --server-rate 2 --normalise-steps --name first --window-seconds 60"
    run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle), *words.split())
    row = Store.open(home / FILE, read_only=True).asked()[0][1]
    assert (row.training_devices_max, row.rest_seconds, row.quota, row.form_seconds) == (
        32,
        300.0,
        2.5,
        600.0,
    )
    assert (row.seconds_max, row.server_rate, row.normalise_steps, row.layers) == (
        43_200.0,
        2.0,
        True,
        LAYERS,
    )
    assert row.work_seconds == 60.0, "work must fit the window"


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("work_seconds", 0.0),
        ("work_seconds", float("nan")),
        ("training_max", 7),
        ("rest_seconds", -1.0),
        ("quota", 0.5),
        ("quota", float("nan")),
        ("form_seconds", 1.0),
        ("hours_max", float("inf")),
        ("server_rate", 0.0),
        ("server_rate", 101.0),
        ("window_seconds", 5),
    ],
)
def test_a_schedule_that_no_fleet_can_follow(knob: str, value: float) -> None:
    with pytest.raises(ConfigError, match=knob.removesuffix("_seconds")):
        check(dataclasses.replace(Wish("c"), **{knob: value}), NUMBERS)


def test_devices_and_blocs_of_a_hub_that_never_ran(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("devices", "blocs"):
        code, _, err = run(capsys, word, "--home", str(home))
        assert code == 66
        assert "fedge hub up" in err
        assert run(capsys, word, "--home", str(home), "--top", "0")[0] == 64


def test_devices_and_blocs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(5)
    fleet.begin(campaign(5, bloc=5, rounds=9, rest_seconds=60.0))
    fleet.run()
    found = msgspec.structs.replace(standing(fleet.hub, fleet.now), at=time.time())
    (home / "standing.json").write_bytes(msgspec.json.encode(found))
    code, out, _ = run(capsys, "blocs", "--home", str(home))
    assert code == 0
    assert "bloc-0" in out
    assert "resting" in out
    assert json.loads(run(capsys, "blocs", "--home", str(home), "--json")[1])["blocs"][0]["opened"] == 1
    assert "5 resting" in run(capsys, "devices", "--home", str(home))[1]


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0])
def test_a_senseless_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        check(Wish("c", rate=rate), NUMBERS)


def test_an_adapter_too_large_for_a_report() -> None:
    with pytest.raises(ConfigError, match="lower rank"):
        check(Wish("c"), limits.TRANSFER_BYTES_MAX // 2)
    check(Wish("c"), 184_320)


def test_pairs_come_two_at_a_time_at_the_least() -> None:
    with pytest.raises(ConfigError, match=r"batch_rows=1: 2 to 256"):
        check(Wish("c", batch_rows=1), NUMBERS, rows_min=2)
    check(Wish("c", batch_rows=2), NUMBERS, rows_min=2)
    check(Wish("c", batch_rows=1), NUMBERS)
    assert usual_rows("embed") > usual_rows("generate") == Training().batch_rows
    assert usual_rate("ffa", "embed") < usual_rate("ffa", "classify") == Training().rate


def test_a_changed_bundle(home: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "weights.bin").write_bytes(b"x" * 100)
    code, _, err = run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle))
    assert code == 79
    assert "weights.bin" in err
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes().replace(b"lab/Tiny", b"lab/Tony"))
    assert run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(bundle))[0] == 79


def test_no_bundle(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "campaign", "start", "--home", str(home), "--bundle", str(tmp_path))
    assert code == 66
    assert "fedge quantize" in err


def test_the_ledger(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(home / FILE)
    store.transaction(
        [
            LedgerEntry(
                at=time.time(), kind="opened", campaign="c", bloc="bloc-0", round=2, detail={"loss": 3.25}
            )
        ]
    )
    store.close()
    assert "opened    c bloc-0 round 2 loss=3.25" in run(capsys, "ledger", "--home", str(home))[1]
    line = json.loads(run(capsys, "ledger", "--home", str(home), "--json")[1])
    assert (line["id"], line["kind"], line["detail"]) == (1, "opened", {"loss": 3.25})


def test_status_of_a_hub_that_does_not_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "status", "--home", str(home))
    assert code == 0
    assert "not running" in out
    told = json.loads(run(capsys, "status", "--home", str(home), "--json")[1])
    assert (told["running"], told["devices"], told["campaigns"]) == (False, [], [])


def test_unknown_names(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("revoke", "d-9"),
        ("campaign", "show", "c"),
        ("export", "c", "--out", str(tmp_path / "o")),
    ):
        code, _, err = run(capsys, *words, "--home", str(home))
        assert code == 66
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("init",),
        ("up",),
        ("token",),
        ("campaign",),
        ("campaign", "start"),
        ("revoke",),
        ("export",),
        ("devices",),
        ("blocs",),
        ("ledger",),
        ("status",),
    ],
)
def test_help_teaches(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["hub", *words, "--help"])
    assert ended.value.code == 0
    assert "usage: fedge hub" in capsys.readouterr().out
