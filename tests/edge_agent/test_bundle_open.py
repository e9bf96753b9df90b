"""Nothing of a bundle is believed before its hash is right, and nothing outside its file is read."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.bundle import TRAINING_GRAPHS, open_bundle
from fedge.errors import IntegrityError, NoInputError, UnsupportedError
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, Manifest, TensorPlace, encode_manifest, sign_manifest

FILES = [f"{name}.onnx" for name in TRAINING_GRAPHS] + [WEIGHTS, "tokenizer.json"]
Resign = Callable[..., Path]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def resigned(copy: Path) -> Resign:
    """The bundle with changed manifest fields, rightly signed by somebody else."""

    def change(**fields: object) -> Path:
        key = Ed25519PrivateKey.generate()
        manifest = msgspec.json.decode((copy / MANIFEST).read_bytes(), type=Manifest)
        publisher = key.public_key().public_bytes_raw().hex()
        data = encode_manifest(msgspec.structs.replace(manifest, publisher=publisher, **fields))
        (copy / MANIFEST).write_bytes(data)
        (copy / SIGNATURE).write_bytes(sign_manifest(data, key))
        return copy

    return change


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_bundle_opens_with_the_right_pins(tiny_bundle: Path) -> None:
    data = (tiny_bundle / MANIFEST).read_bytes()
    publisher = bytes.fromhex(msgspec.json.decode(data)["publisher"])
    bundle = open_bundle(tiny_bundle, publisher=publisher, sha256=hashlib.sha256(data).digest())
    assert bundle.layout.numbers == sum(rows * r for rows, r in bundle.layout.b_shapes.values())
    assert bundle.stamp.manifest_sha256 == hashlib.sha256(data).digest()


def test_wrong_pins_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(IntegrityError, match="publisher"):
        open_bundle(tiny_bundle, publisher=bytes(32))
    with pytest.raises(IntegrityError, match="sha256"):
        open_bundle(tiny_bundle, sha256=bytes(32))


@pytest.mark.parametrize("name", [*FILES, MANIFEST, SIGNATURE])
def test_one_flipped_bit_is_refused_by_name(copy: Path, name: str) -> None:
    flip(copy / name, at=20)
    with pytest.raises(IntegrityError, match=name.partition(".")[0]):
        open_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_refused_by_name(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=f"size.*{name}"):
        open_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(NoInputError, match=name):
        open_bundle(copy)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="not here"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["If", "Loop", "com.microsoft:EPContext", "PyOp"])
def test_an_operator_that_is_not_allowed_is_refused_by_name(resigned: Resign, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"operators='{name}'"):
        open_bundle(resigned(operators=("Add", name)))


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (TensorPlace(offset=0, shape=(10**9,), dtype="float32"), IntegrityError),
        (TensorPlace(offset=0, shape=(2**62, 4), dtype="float32"), IntegrityError),
        (TensorPlace(offset=2**40, shape=(1,), dtype="float32"), IntegrityError),
        (TensorPlace(offset=-64, shape=(1,), dtype="float32"), IntegrityError),
        (TensorPlace(offset=4, shape=(1,), dtype="float32"), IntegrityError),
        (TensorPlace(offset=0, shape=(-1,), dtype="float32"), IntegrityError),
        (TensorPlace(offset=0, shape=(1,), dtype="object"), UnsupportedError),
    ],
)
def test_a_tensor_outside_the_file_is_refused_by_name(
    resigned: Resign, place: TensorPlace, error: type[Exception]
) -> None:
    with pytest.raises(error, match="BAD"):
        open_bundle(resigned(tensors={"BAD": place}))


def test_what_is_not_in_the_manifest_is_refused_by_name(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(UnsupportedError, match="invented"):
        bundle.tensor("invented")
    with pytest.raises(UnsupportedError, match=r"invented\.onnx"):
        bundle.graph("invented")


def test_tensors_are_read_only_and_come_back_after_they_were_let_go(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    raw = (tiny_bundle / WEIGHTS).read_bytes()
    for name, place in bundle.manifest.tensors.items():
        tensor = bundle.tensor(name)
        assert raw[place.offset :].startswith(tensor.tobytes())
        assert not tensor.flags.writeable
    name = "EMB.q"
    before = bundle.tensor(name).copy()
    bundle.let_go(bundle.span([name]))
    np.testing.assert_array_equal(bundle.tensor(name), before)


def test_a_stamp_spares_the_hashing_until_a_file_looks_different(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = hashlib.file_digest

    def counting(stream: object, name: str) -> object:
        hashed.append(Path(stream.name).name)  # type: ignore[attr-defined]
        return real(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", counting)
    stamp = open_bundle(copy).stamp
    assert len(hashed) == len(stamp.looks)
    hashed.clear()
    assert open_bundle(copy, verified=stamp).stamp == stamp
    assert hashed == []
    flip(copy / WEIGHTS)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        open_bundle(copy, verified=stamp)
