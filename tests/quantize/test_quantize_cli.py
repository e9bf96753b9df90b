"""`fedge quantize` as a user types it: a Mistral, a key of one's own, every refusal one line and an exit code."""

import json
from pathlib import Path

import pytest
import tiny
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from transformers import MistralConfig

from fedge.cli import main
from fedge.errors import ConfigError, NoInputError
from fedge.release import MANIFEST, SIGNATURE, bundle_digest, open_manifest
from quantize.cli import own_key, read_key

PEM = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_a_mistral_becomes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_model(tmp_path / "model", MistralConfig(**tiny.SIZES, sliding_window=None))
    key, out = tmp_path / "key.pem", tmp_path / "bundle"
    key.write_bytes(tiny.PUBLISHER.private_bytes(*PEM))
    words = ["quantize", str(tmp_path / "model"), "--out", str(out), "--key", str(key), "--name", "wind"]
    assert (
        main([*words, "--lora-rank", "4", "--lora-alpha", "8", "--lora-targets", "o_proj, q_proj", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    publisher = tiny.PUBLISHER.public_key().public_bytes_raw()
    manifest = open_manifest(
        (out / MANIFEST).read_bytes(), (out / SIGNATURE).read_bytes(), publisher=publisher
    )
    assert (manifest.model, manifest.lora.r, manifest.weights_format) == ("wind", 4, "int8g")
    assert set(manifest.lora_shapes) == {"self_attn.o_proj", "self_attn.q_proj"}
    assert said["manifest_sha256"] == bundle_digest(manifest)
    assert said["gates"] == manifest.gates
    assert said["format_reason"].startswith("the source is not on a grid")
    assert manifest.gates["cut_gradient_error"] <= 1e-5


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--format", "int3"], 67, "auto, int4d"),
        (["--lora-targets", "query"], 78, "q_proj"),
        (["--lora-rank", "65"], 78, "lora-rank=65"),
        (["--key", "/nowhere.pem"], 66, "nowhere"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    more: list[str],
    code: int,
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    own_key()
    capsys.readouterr()
    assert main(["quantize", str(tiny_model), "--out", str(tmp_path / "out"), "--quiet", *more]) == code
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert said in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_the_own_key_is_made_once_and_kept_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first = own_key().private_bytes_raw()
    assert own_key().private_bytes_raw() == first
    assert (tmp_path / "fedge" / "publisher.pem").stat().st_mode & 0o777 == 0o600


def test_a_key_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(NoInputError):
        read_key(path)
    path.write_bytes(b"no key")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(path)
    path.write_bytes(generate_private_key(SECP256R1()).private_bytes(*PEM))
    with pytest.raises(ConfigError, match="another kind"):
        read_key(path)
