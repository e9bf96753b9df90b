"""A tiny model's bundle: what is in it, that it computes what torch computes, and that nothing can be changed in it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import tiny
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import helper

from fedge.errors import IntegrityError, UsageError
from fedge.io.weight_file import map_weights
from fedge.release import (
    MANIFEST,
    OPERATORS_ALLOWED,
    SIGNATURE,
    WEIGHTS,
    Manifest,
    bundle_digest,
    encode_manifest,
    open_manifest,
    sign_manifest,
)
from quantize import bundle as bundling
from quantize.bundle import quantize
from quantize.decode import LEVEL_EXACT, at_level
from quantize.fit import fit
from quantize.formats import EMBEDDING_FORMAT, FORMATS, decode
from quantize.gates import GateError
from quantize.graph import operators
from quantize.reference import Batch, random_adapter, torch_gradients
from quantize.runner import Decoder, Runner
from quantize.source import load
from quantize.weights import quantise

PUBLISHER = tiny.PUBLISHER.public_key().public_bytes_raw()


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return open_manifest((tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes())


@pytest.fixture(scope="module")
def runner(tiny_bundle: Path, manifest: Manifest) -> Runner:
    tensors = map_weights(tiny_bundle / WEIGHTS, manifest.tensors)
    return Runner(tiny_bundle, tensors, manifest.layers, manifest.head_rows)


@pytest.fixture(scope="module")
def dequantised(tiny_model: Path) -> object:
    """transformers' model whose weights are what the bundle's codes mean."""
    source = load(str(tiny_model))
    fitted = fit(source, FORMATS["int4d"], lambda phase, fraction: None)
    quantise(source, FORMATS["int4d"], lambda phase, fraction: None, fitted)
    return source.model


def padded(shape: tuple[int, int], seed: int) -> Batch:
    """Random ids; every row is shorter than the one before, padded on the right."""
    random = np.random.default_rng(seed)
    rows = [random.integers(1, 300, max(2, shape[1] - 3 * row)).tolist() for row in range(shape[0])]
    return Batch.of(rows, pad=0)


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (3, 40), (4, 64), (2, 128)], ids=str)
def test_loss_and_gradients_are_those_of_torch(
    shape: tuple[int, int], runner: Runner, dequantised: object
) -> None:
    adapter = random_adapter(dequantised, tiny.LORA, np.random.default_rng(3), scale=0.05)
    batch = padded(shape, seed=shape[1])
    loss, expected = torch_gradients(dequantised, tiny.LORA, adapter, batch)
    found_loss, found = runner.gradients(batch.ids, batch.mask, batch.labels, adapter)
    assert abs(found_loss - loss) <= 1e-5
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(value) > 1e-6, name  # a vanishing gradient would prove nothing
        assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name


def test_padding_does_not_change_the_loss(runner: Runner, dequantised: object) -> None:
    adapter = random_adapter(dequantised, tiny.LORA, np.random.default_rng(3), scale=0.05)
    together = padded((3, 20), seed=1)
    alone = [together.ids[row : row + 1, : int(together.mask[row].sum())] for row in range(3)]
    losses = [
        runner.losses(b.ids, b.mask, b.labels, adapter) for b in (Batch.of(r.tolist(), 0) for r in alone)
    ]
    found = runner.losses(together.ids, together.mask, together.labels, adapter)
    assert np.allclose(found, np.concatenate(losses), atol=1e-5)


def test_decoding_computes_the_same_loss_and_its_cache_changes_nothing(
    tiny_bundle: Path, runner: Runner, dequantised: object, tmp_path: Path
) -> None:
    adapter = random_adapter(dequantised, tiny.LORA, np.random.default_rng(3), scale=0.05)
    graph = onnx.load(str(tiny_bundle / "infer.onnx"), load_external_data=False)
    shutil.copy(tiny_bundle / WEIGHTS, tmp_path)
    onnx.save(at_level(graph, LEVEL_EXACT), tmp_path / "exact.onnx")
    decoder = Decoder(tmp_path / "exact.onnx", adapter)
    ids = np.random.default_rng(5).integers(1, 300, (2, 24))
    logits, _ = decoder.step(ids, decoder.start(2))
    batch = Batch.of(ids.tolist(), 0)
    trained = runner.losses(batch.ids, batch.mask, batch.labels, adapter).reshape(2, -1)
    rows = logits[:, :-1].astype(np.float64)
    at_label = np.take_along_axis(rows, ids[:, 1:, None], -1)[..., 0]
    assert np.abs(np.log(np.exp(rows).sum(-1)) - at_label - trained).max() <= 1e-5
    cache, stepwise = decoder.start(2), []
    for part in (ids[:, :7], *np.split(ids[:, 7:], 17, axis=1)):
        found, cache = decoder.step(part, cache)
        stepwise.append(found)
    assert np.abs(np.concatenate(stepwise, 1) - logits).max() <= 1e-5


def test_one_flipped_byte_of_the_weights_shows_in_training_and_in_decoding(
    tiny_bundle: Path, manifest: Manifest, runner: Runner, dequantised: object, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    place = manifest.tensors["L0/mlp.down_proj.w.s"]
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[place.offset + 3] ^= 1  # the exponent's low bit of the first scale
    (copy / WEIGHTS).write_bytes(data)
    broken = Runner(copy, map_weights(copy / WEIGHTS, manifest.tensors), manifest.layers, manifest.head_rows)
    adapter = random_adapter(dequantised, tiny.LORA, np.random.default_rng(3), scale=0.05)
    batch = padded((1, 12), seed=2)
    good, bad = (r.losses(batch.ids, batch.mask, batch.labels, adapter) for r in (runner, broken))
    assert np.abs(good - bad).max() > 1e-6
    logits = []
    for folder in (tiny_bundle, copy):
        decoder = Decoder(folder / "infer.onnx", adapter)
        logits.append(decoder.step(batch.ids, decoder.start(1))[0])
    assert np.abs(logits[0] - logits[1]).max() > 1e-6


def test_the_weight_file_is_laid_out_as_promised(
    tiny_bundle: Path, manifest: Manifest, tiny_model: Path
) -> None:
    tensors = map_weights(tiny_bundle / WEIGHTS, manifest.tensors)
    for name, place in manifest.tensors.items():
        assert place.offset % (4096 if tensors[name].nbytes >= 4096 else 64) == 0
    parts = {part: tensors[f"L1/self_attn.k_proj.w.{part}"] for part in "qsm"}
    weight = load(str(tiny_model)).model.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    miss = decode(parts, FORMATS["int4d"]) - weight
    assert 0 < np.linalg.norm(miss) < 0.1 * np.linalg.norm(weight)
    table = decode({part: tensors[f"EMB.{part}"] for part in "qs"}, FORMATS[EMBEDDING_FORMAT])
    assert table.shape == (304, 64)


def test_the_manifest_names_every_file_and_operator(tiny_bundle: Path, manifest: Manifest) -> None:
    found = {path.name for path in tiny_bundle.iterdir()} - {MANIFEST, SIGNATURE}
    assert found == set(manifest.files)
    for name, entry in manifest.files.items():
        data = (tiny_bundle / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.size, entry.sha256)
    used: set[str] = set()
    for path in tiny_bundle.glob("*.onnx"):
        graph = onnx.load(str(path), load_external_data=False)
        used |= operators(graph)
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
        assert b"/site-packages/" not in path.read_bytes()
    assert used == set(manifest.operators) <= OPERATORS_ALLOWED
    assert manifest.lora_shapes == {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64)}
    assert manifest.gates["cut_gradient_error"] <= 1e-5


# What `conftest.tiny_bundle` does, in a process of its own that says how far each phase came.
_AGAIN = """
import json, pathlib, sys
import tiny
from quantize.bundle import quantize
model, out, phases = *sys.argv[1:], {}
quantize(
    model, pathlib.Path(out), tiny.PUBLISHER,
    lora=tiny.LORA, name="tiny", weights_format="int4d", head_rows=tiny.HEAD_ROWS,
    progress=lambda phase, fraction: phases.update({phase: fraction}),
)
print(json.dumps(phases))
"""


def test_another_process_makes_the_same_bundle_of_the_same_model(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Byte for byte, whatever the seed of hashes, the folder, the clock and the number of threads are."""
    threads = 2 if torch.get_num_threads() == 1 else 1
    varied = {
        "PYTHONHASHSEED": "7",
        "OMP_NUM_THREADS": str(threads),
        "TZ": "UTC7",
        "OMP_WAIT_POLICY": "passive",
    }
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(
        [sys.executable, "-c", _AGAIN, str(tiny_model), "again"],
        cwd=tmp_path,
        env={**os.environ, **varied, **path},
        check=True,
        capture_output=True,
    ).stdout
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in tiny_bundle.iterdir()}
    for file in tiny_bundle.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert json.loads(said) == dict.fromkeys(("read", "quantise", "export", "gates", "sign"), 1.0)


def test_the_digest_of_a_manifest_is_that_of_its_file(tiny_bundle: Path, manifest: Manifest) -> None:
    assert bundle_digest(manifest) == hashlib.sha256((tiny_bundle / MANIFEST).read_bytes()).hexdigest()


@pytest.mark.parametrize("change", [b'"layers": 2', b'"pad_id": 0', b'"r": 8'])
def test_a_changed_manifest_is_refused(tiny_bundle: Path, change: bytes) -> None:
    data, signature = (tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes()
    assert change in data
    with pytest.raises(IntegrityError, match="signature"):
        open_manifest(data.replace(change, change[:-1] + b"3"), signature)


def test_wrong_signer_hash_and_signature_are_refused(tiny_bundle: Path, manifest: Manifest) -> None:
    data, signature = (tiny_bundle / MANIFEST).read_bytes(), (tiny_bundle / SIGNATURE).read_bytes()
    assert (
        open_manifest(data, signature, publisher=PUBLISHER, sha256=hashlib.sha256(data).digest()) == manifest
    )
    with pytest.raises(IntegrityError, match="somebody else"):
        open_manifest(data, signature, publisher=bytes(32))
    with pytest.raises(IntegrityError, match="not the one announced"):
        open_manifest(data, signature, sha256=bytes(32))
    with pytest.raises(IntegrityError, match="signature"):
        open_manifest(data, bytes([signature[0] ^ 1]) + signature[1:])
    with pytest.raises(IntegrityError, match="signature"):
        open_manifest(data, signature[:63])


@pytest.mark.parametrize("name", ["../weights.bin", ".hidden", "manifest.sig"])
def test_a_file_name_that_leaves_the_folder_is_refused_even_when_signed(
    manifest: Manifest, name: str
) -> None:
    key = Ed25519PrivateKey.generate()
    files = {**manifest.files, name: next(iter(manifest.files.values()))}
    owner = key.public_key().public_bytes_raw().hex()
    data = encode_manifest(msgspec.structs.replace(manifest, files=files, publisher=owner))
    with pytest.raises(IntegrityError, match="file name"):
        open_manifest(data, sign_manifest(data, key))


def test_an_existing_folder_is_never_touched(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        quantize(str(tiny_model), tmp_path / "out", tiny.PUBLISHER, lora=tiny.LORA)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_gate_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looping = helper.make_graph([helper.make_node("Loop", ["n", "go"], ["x"])], "loop", [], [])
    monkeypatch.setattr(bundling, "training_graphs", lambda *_: {"loop.onnx": helper.make_model(looping)})
    monkeypatch.setattr(bundling, "inference_graph", lambda *_, **__: onnx.ModelProto())
    with pytest.raises(GateError, match=r"operators that devices refuse.*Loop"):
        quantize(str(tiny_model), tmp_path / "out", tiny.PUBLISHER, lora=tiny.LORA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_export_leaves_no_bundle(tiny_model: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "fedge", "quantize", str(tiny_model), "--out", str(out), "--quiet"]
    home = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=home, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob(".out.*.part/weights.bin")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(how)
        process.wait()
    assert not out.exists()
    left = list(tmp_path.glob(".out*"))
    if how is signal.SIGTERM:
        assert (process.returncode, left) == (143, [])
    else:
        with bundling._staging(out):  # the next export begins by clearing up
            assert not any(path in left for path in tmp_path.glob(".out*"))
