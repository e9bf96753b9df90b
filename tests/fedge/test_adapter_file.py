"""An adapter's file: whole, unchanged, of this bundle, or refused by name (field cases F02, F03, F04, F22's kind)."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import DataError, FedgeError, IntegrityError, NoInputError, UnsupportedError
from fedge.io.adapter_file import adapter_of, is_adapter_file, read_adapter, write_adapter
from fedge.io.safetensors_file import encode_tensors, read_file, read_tensors, widened
from fedge.lora import LoraConfig
from fedge.release import FORMAT, Manifest

SEED = bytes(range(16))
MANIFEST = Manifest(
    format=FORMAT,
    model="a model",
    architecture="LlamaForCausalLM",
    licence="mit",
    source_sha256="00",
    weights_format="int4d",
    embedding_format="int8g",
    layers=2,
    hidden=16,
    vocabulary=32,
    heads=4,
    kv_heads=2,
    head_dim=4,
    positions_max=64,
    head_tied=True,
    eos_id=0,
    pad_id=0,
    lora=LoraConfig(r=2, alpha=8.0, targets=("q_proj", "v_proj")),
    lora_shapes={"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16)},
    aux=("mask",),
    head_rows=8,
    operators=(),
    runtime_min="1.23.2",
    tensors={},
    files={},
    gates={},
    publisher="00" * 32,
)
VECTOR = np.random.default_rng(0).standard_normal(96).astype(np.float32)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", adapter_of(MANIFEST, VECTOR, a_seed=SEED, steps=7))
    return tmp_path / "a"


def rewritten(path: Path, change: object, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """The file once more with other header fields, or other tensors."""
    found = read_file(path, bytes_max=10**6)
    header = {**json.loads(found.metadata["fedge"]), **(change if isinstance(change, dict) else {})}
    values = tensors or {name: widened(path, name, raw) for name, raw in found.tensors.items()}
    path.write_bytes(encode_tensors(values, {"fedge": json.dumps(header)}))
    return path


def test_what_is_written_is_read_back(written: Path) -> None:
    adapter = read_adapter(written, MANIFEST)
    np.testing.assert_array_equal(adapter.vector, VECTOR)
    assert (adapter.header.a_seed, adapter.header.steps, adapter.header.lora) == (SEED, 7, MANIFEST.lora)
    for name, a in adapter.header.layout.frozen(SEED).items():
        np.testing.assert_array_equal(adapter.tensors[name], a)
    assert written.stat().st_size < 4 * 96 + 2_000  # A follows from its seed and is not in the file


def test_an_a_of_its_own_is_kept_in_the_file(tmp_path: Path) -> None:
    a = {name: value + 1 for name, value in adapter_of(MANIFEST, VECTOR, a_seed=SEED).tensors.items()}
    a = {name: value for name, value in a.items() if name.endswith(".A")}
    write_adapter(tmp_path / "a", adapter_of(MANIFEST, VECTOR, a=a, rule="fedit"))
    found = read_adapter(tmp_path / "a")
    assert (found.header.rule, found.header.a_seed) == ("fedit", b"")
    for name, value in a.items():
        np.testing.assert_array_equal(found.tensors[name], value)


def test_any_tool_opens_it_and_equal_adapters_are_equal_files(written: Path, tmp_path: Path) -> None:
    theirs = safetensors.numpy.load_file(written)
    assert set(theirs) == {f"L{i}/self_attn.{m}_proj.B" for i in (0, 1) for m in "qv"}
    again = tmp_path / "again"
    write_adapter(again, read_adapter(written))
    assert again.read_bytes() == written.read_bytes()


def test_an_adapter_of_another_bundle_is_refused(written: Path) -> None:
    other = msgspec.structs.replace(MANIFEST, model="another")
    with pytest.raises(IntegrityError, match="another bundle"):
        read_adapter(written, other)


def test_every_cut_and_every_flipped_bit_is_refused(written: Path) -> None:
    """F22's kind: half a file, and a file that rotted, never count as loaded."""
    whole = written.read_bytes()
    for cut in (0, 4, 8, 100, len(whole) - 1):
        written.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_adapter(written)
    written.write_bytes(whole + whole)
    with pytest.raises(DataError, match="belong to no tensor"):
        read_adapter(written)
    body = 8 + int.from_bytes(whole[:8], "little")
    for place in (body, (body + len(whole)) // 2, len(whole) - 1):
        written.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match="numbers_sha256"):
            read_adapter(written)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"version": 2, "field_of_tomorrow": 1}, UnsupportedError, "newer"),
        ({"field_of_tomorrow": 1}, DataError, "field_of_tomorrow"),
        ({"layers": 1}, DataError, "belongs nowhere"),
        ({"layers": 3}, DataError, "is missing"),
        ({"layers": 10**9}, UnsupportedError, "out of range"),
        ({"a_seed": "AAAA"}, DataError, "16 bytes"),
        (
            {"lora_shapes": {"self_attn.q_proj": [16, 16], "self_attn.v_proj": [9, 16]}},
            DataError,
            "misshapen",
        ),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    written: Path, change: dict[str, object], error: type[FedgeError], said: str
) -> None:
    with pytest.raises(error, match=said):
        read_adapter(rewritten(written, change))


def test_what_is_no_adapter_is_not_taken_for_one(tmp_path: Path, written: Path) -> None:
    assert is_adapter_file(written)
    (tmp_path / "other").write_bytes(encode_tensors({"x": np.zeros(3, np.float32)}))
    assert not is_adapter_file(tmp_path / "other")
    assert not is_adapter_file(tmp_path)
    with pytest.raises(DataError, match="no adapter file"):
        read_adapter(tmp_path / "other")
    with pytest.raises(NoInputError):
        read_adapter(tmp_path / "nowhere")


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    vector = VECTOR.copy()
    vector[5] = np.nan
    with pytest.raises(DataError, match="not finite"):
        write_adapter(tmp_path / "a", adapter_of(MANIFEST, vector, a_seed=SEED))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the container
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body", "said"),
    [
        ({"x": {**ENTRY, "data_offsets": [0, 4]}}, b"0123", "another size"),
        ({"x": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16), "impossible place"),
        ({"x": {**ENTRY, "data_offsets": [0, 800]}}, bytes(8), "impossible place"),
        ({"x": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8), "impossible place"),
        ({"x": {**ENTRY, "shape": [-1, -2]}}, bytes(8), "impossible shape"),
        ({"x": {**ENTRY, "shape": [2**62, 4]}}, bytes(8), "another size"),
        ({"x": ENTRY, "y": ENTRY}, bytes(8), "impossible place"),
        ({"x": {"dtype": "F32"}}, bytes(8), "header"),
        ({"x": 3}, bytes(8), "header"),
        ({"__metadata__": {"a": 1}}, b"", "header"),
    ],
)
def test_a_tensor_file_that_lies_about_places_is_refused(
    tmp_path: Path, header: dict[str, object], body: bytes, said: str
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(DataError, match=said):
        read_tensors(tmp_path / "t", bytes_max=10**6)


def test_a_header_length_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="no header"):
        read_tensors(tmp_path / "t", bytes_max=10**6)
    with pytest.raises(DataError, match="too large"):
        read_tensors(tmp_path / "t", bytes_max=4)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abL/.", min_size=1, max_size=6), st.lists(st.integers(0, 3), max_size=3), max_size=4
    )
)
def test_our_files_and_those_of_the_library_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    tensors = {
        name: np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    ours = encode_tensors(tensors)
    path = tmp_path_factory.mktemp("t") / "t"
    for data in (ours, safetensors.numpy.save(tensors, {"format": "pt"})):
        path.write_bytes(data)
        found = read_tensors(path, bytes_max=10**6)
        assert {n: widened(path, n, raw).tolist() for n, raw in found.items()} == {
            n: t.tolist() for n, t in tensors.items()
        }
    if tensors:
        theirs = safetensors.numpy.load(ours)
        assert all((theirs[n] == t).all() and theirs[n].shape == t.shape for n, t in tensors.items())
