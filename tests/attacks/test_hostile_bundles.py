"""Bundles that lie: signed by somebody, and still refused before any runtime opens a file of theirs.

The attacker holds a key of their own and re-signs what they changed, so every signature and hash is right.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edge_agent.bundle import open_bundle
from fedge.cli import main
from fedge.errors import FedgeError, IntegrityError, UnsupportedError
from fedge.graph_audit import graph_facts
from fedge.release import MANIFEST, SIGNATURE, WEIGHTS, FileEntry, Manifest, encode_manifest, sign_manifest

Change = Callable[[onnx.ModelProto], None]
Lie = Callable[..., Path]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def lie(copy: Path) -> Lie:
    """The bundle with one graph changed and the manifest made to agree, rightly signed by the attacker."""

    def change(how: Change | None = None, graph: str = "block_fwd.onnx", **fields: object) -> Path:
        manifest = msgspec.json.decode((copy / MANIFEST).read_bytes(), type=Manifest)
        if how is not None:
            model = onnx.load(copy / graph, load_external_data=False)
            how(model)
            (copy / graph).write_bytes(model.SerializeToString())
        key = Ed25519PrivateKey.generate()
        data = (copy / graph).read_bytes()
        files = manifest.files | {graph: FileEntry(len(data), hashlib.sha256(data).hexdigest())}
        fields = {"publisher": key.public_key().public_bytes_raw().hex(), "files": files, **fields}
        signed = encode_manifest(msgspec.structs.replace(manifest, **fields))
        (copy / MANIFEST).write_bytes(signed)
        (copy / SIGNATURE).write_bytes(sign_manifest(signed, key))
        return copy

    return change


def node(operator: str, domain: str = "") -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, ["x"], ["evil"], domain=domain))


def tensor(**entries: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        stolen = TensorProto(
            name="stolen", data_type=TensorProto.UINT8, dims=[16], data_location=TensorProto.EXTERNAL
        )
        for key, value in entries.items():
            stolen.external_data.add(key=key, value=value)
        model.graph.initializer.append(stolen)

    return change


def hidden_in_a_constant(model: onnx.ModelProto) -> None:
    stolen = TensorProto(name="inner", data_type=TensorProto.UINT8, dims=[4])
    stolen.external_data.add(key="location", value="../secret")
    model.graph.node.append(helper.make_node("Constant", [], ["evil"], value=stolen))


def inside_a_node(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "inner", [], [])
    model.graph.node.append(helper.make_node("Identity", ["x"], ["evil"], body=inner))


def function(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("", "Add", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))


def two_places(model: onnx.ModelProto) -> None:
    tensor(location=WEIGHTS)(model)
    model.graph.initializer[-1].external_data.add(key="location", value="/etc/passwd")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (node("If"), UnsupportedError, "operator='If'"),
        (node("Loop"), UnsupportedError, "operator='Loop'"),
        (node("EPContext", "com.microsoft"), UnsupportedError, "EPContext"),
        (node("PyOp", "evil"), UnsupportedError, "evil:PyOp"),
        (node("Add", "evil"), UnsupportedError, "evil:Add"),
        (node("Tanh"), IntegrityError, "does not name.*Tanh"),
        (inside_a_node, UnsupportedError, "graph inside a node"),
        (function, UnsupportedError, "functions of its own"),
        (two_places, UnsupportedError, "two places"),
        (tensor(location="/etc/passwd"), IntegrityError, "/etc/passwd"),
        (tensor(location="../identity.json"), IntegrityError, "identity.json"),
        (tensor(location="./weights.bin"), IntegrityError, "location"),
        (tensor(location="tokenizer.json"), IntegrityError, "tokenizer.json"),
        (tensor(location=""), IntegrityError, "location"),
        (hidden_in_a_constant, IntegrityError, "secret"),
        (
            tensor(location=WEIGHTS, offset="9999999999", length="16"),
            IntegrityError,
            "outside the weight file",
        ),
        (tensor(location=WEIGHTS, offset="-64", length="16"), IntegrityError, "outside the weight file"),
        (
            tensor(location=WEIGHTS, offset="0", length="99999999999"),
            IntegrityError,
            "outside the weight file",
        ),
        (tensor(location=WEIGHTS, offset="zero"), IntegrityError, "cannot be read"),
    ],
)
def test_a_graph_that_would_do_more_than_compute_is_refused(
    lie: Lie, change: Change, error: type[FedgeError], said: str
) -> None:
    with pytest.raises(error, match=said):
        open_bundle(lie(change))


def test_the_changed_bundle_of_these_tests_is_otherwise_good(lie: Lie) -> None:
    """The guard on the test above: what is refused there is refused for its lie and not for the copy."""
    open_bundle(lie(lambda model: None))


def test_verify_names_every_fault_in_a_line_each(lie: Lie, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lie(node("If"), runtime_min="99.0", operators=("Add", "Loop"))
    (folder / "extra.so").write_bytes(b"\x7fELF")
    (folder / "ce.onnx").write_bytes(b"no graph")
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert main(["bundle", "verify", str(folder), "--json"]) == IntegrityError.exit_code
    told = capsys.readouterr()
    faults = "\n".join(fault["what"] for fault in json.loads(told.out)["faults"])
    for said in ("weights.bin", "ce.onnx", "operator='If'", "operators='Loop'", "extra.so", "99.0"):
        assert said in faults
    assert told.err.count("\n") == 1


def test_verify_finds_nothing_wrong_with_a_good_bundle_and_pins_its_signer(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher = json.loads((tiny_bundle / MANIFEST).read_bytes())["publisher"]
    (tmp_path / "key").write_text(publisher + "\n")
    for pin in (publisher, str(tmp_path / "key")):
        assert main(["bundle", "verify", str(tiny_bundle), "--publisher", pin]) == 0
    assert main(["bundle", "verify", str(tiny_bundle), "--publisher", "00" * 32]) == 79
    assert "somebody else" in capsys.readouterr().err
    assert main(["bundle", "verify", str(tiny_bundle), "--publisher", "me"]) == 64
    assert main(["bundle", "verify", str(tiny_bundle), "--sha256", "00" * 32]) == 79
    assert main(["bundle", "verify", str(tmp_path)]) == 66


def test_a_link_in_the_place_of_a_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.parent / "elsewhere").write_bytes((copy / WEIGHTS).read_bytes())
    (copy / WEIGHTS).unlink()
    (copy / WEIGHTS).symlink_to(copy.parent / "elsewhere")
    assert main(["bundle", "verify", str(copy)]) == 79
    assert "is a link" in capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 3, 99])
def test_a_bundle_of_another_format_says_which_side_to_update(
    copy: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """F09: a newer one may have fields that this version has never heard of."""
    fields: dict[str, Any] = json.loads((copy / MANIFEST).read_bytes())
    fields |= {"format": version, "field_of_tomorrow": [1]}
    key = Ed25519PrivateKey.generate()
    data = json.dumps(fields).encode()
    (copy / MANIFEST).write_bytes(data)
    (copy / SIGNATURE).write_bytes(sign_manifest(data, key))
    assert main(["bundle", "show", str(copy)]) == UnsupportedError.exit_code
    told = capsys.readouterr().err
    assert f"format={version}" in told
    assert ("update fedge" in told) == (version > 2)
    assert ("fedge quantize" in told) == (version < 2)


def test_a_runtime_that_is_too_old_is_named(lie: Lie, capsys: pytest.CaptureFixture[str]) -> None:
    """F09: refused by version, with what to do, before a session is made."""
    folder = lie(runtime_min="99.0")
    assert main(["bundle", "verify", str(folder)]) == UnsupportedError.exit_code
    assert "upgrade onnxruntime" in capsys.readouterr().out


# ---------------------------------------------------------------- the walk over the bytes
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_are_refused(data: bytes) -> None:
    with suppress(IntegrityError):
        assert graph_facts(data).operators


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_byte_of_a_real_graph_raises_nothing_else(tiny_bundle: Path, data: st.DataObject) -> None:
    whole = bytearray((tiny_bundle / "block_fwd.onnx").read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(IntegrityError):
        graph_facts(bytes(whole))


def test_the_walk_sees_what_the_library_sees(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        facts, model = graph_facts(path.read_bytes()), onnx.load(path, load_external_data=False)
        assert facts.operators == {
            f"{n.domain}:{n.op_type}" if n.domain else n.op_type for n in model.graph.node
        }
        assert facts.opsets == {opset.domain: opset.version for opset in model.opset_import}
        assert facts.ir_version == model.ir_version
        outside = [t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
        assert [external.tensor for external in facts.external] == outside
