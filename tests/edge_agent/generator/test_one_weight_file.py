"""One weight file, two uses: a byte changed under the same signature shows in training and in generation alike."""

import hashlib
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny

from edge_agent.bundle import open_bundle
from edge_agent.dataset import Batch
from edge_agent.generator import Decoding
from edge_agent.trainer import Trainer
from fedge.errors import IntegrityError
from fedge.release import (
    MANIFEST,
    SIGNATURE,
    WEIGHTS,
    FileEntry,
    encode_manifest,
    open_manifest,
    sign_manifest,
)

IDS = np.random.default_rng(5).integers(1, 290, 24)


def sign_again(folder: Path) -> None:
    """The publisher signs what lies there now."""
    manifest = open_manifest((folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes())
    files = dict(manifest.files)
    data = (folder / WEIGHTS).read_bytes()
    files[WEIGHTS] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    encoded = encode_manifest(msgspec.structs.replace(manifest, files=files))
    (folder / MANIFEST).write_bytes(encoded)
    (folder / SIGNATURE).write_bytes(sign_manifest(encoded, tiny.PUBLISHER))


def loss_and_logits(folder: Path) -> tuple[float, np.ndarray]:
    bundle = open_bundle(folder)
    row = IDS[None].astype(np.int64)
    labels = np.full_like(row, -100)
    labels[:, :-1] = row[:, 1:]
    b = {name: np.zeros(shape, np.float32) for name, shape in bundle.layout.b_shapes.items()}
    losses, _ = Trainer(bundle).row_losses(Batch(row, np.ones_like(row), labels), b)
    return float(losses[0]), Decoding(bundle).read_all(IDS.tolist())


@pytest.mark.parametrize(
    "tensor", ["L0/mlp.down_proj.w.q", "L1/self_attn.v_proj.w.q", "EMB.q", "norm.weight"]
)
def test_one_flipped_byte_shows_in_the_trainer_and_in_the_generator(
    tiny_bundle: Path, tmp_path: Path, tensor: str
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    place = open_bundle(tiny_bundle).manifest.tensors[tensor]
    data = bytearray((copy / WEIGHTS).read_bytes())
    row = int(IDS[3]) * place.shape[-1] if tensor == "EMB.q" else 0  # of a token that is read
    data[place.offset + row + 2] ^= 0x20
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        open_bundle(copy)
    sign_again(copy)
    (loss, logits), (bent_loss, bent_logits) = loss_and_logits(tiny_bundle), loss_and_logits(copy)
    assert abs(loss - bent_loss) > 1e-4
    assert np.abs(logits - bent_logits).max() > 1e-3


def test_a_bundle_of_hard_links_and_one_behind_a_symbolic_link_generate(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """The runtime refuses external data behind a link out of the graph's folder: the real path is opened."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in tiny_bundle.iterdir():
        (linked / file.name).hardlink_to(file)
    (tmp_path / "current").symlink_to(linked)
    expected = Decoding(open_bundle(tiny_bundle)).read(IDS.tolist()).copy()
    for folder in (linked, tmp_path / "current"):
        assert (Decoding(open_bundle(folder)).read(IDS.tolist()) == expected).all()
